# SPDX-License-Identifier: GPL-3.0-or-later
"""Replies: what is refused when they are made, and what libmilter gets."""

import pytest

from milter import Reply, Status
from milter.verdict import MEANINGFUL


@pytest.mark.parametrize(("code", "status"), [(400, Status.TEMPFAIL), (499, Status.TEMPFAIL), (599, Status.REJECT)])
def test_the_class_of_the_code_decides_between_tempfail_and_reject(code: int, status: Status) -> None:
    assert Reply(code, None, "text").status is status


@pytest.mark.parametrize("code", [0, 99, 200, 250, 399, 600, 5500, -550, "550", 550.0, None, True])
def test_a_code_that_is_no_refusal_is_refused(code: object) -> None:
    with pytest.raises(ValueError, match="code"):
        Reply(code, None, "text")  # type: ignore[arg-type]


@pytest.mark.parametrize("enhanced", ["", "5", "5.7", "5.7.1.1", "6.7.1", "5.7.x", "5.7.1 ", "5.1234.1", "٥.7.1", 571])
def test_an_enhanced_code_of_the_wrong_form_is_refused_with_an_example(enhanced: object) -> None:
    with pytest.raises(ValueError, match=r"looks like '5\.7\.1'"):
        Reply(550, enhanced, "text")  # type: ignore[arg-type]


@pytest.mark.parametrize(("code", "enhanced"), [(550, "4.7.1"), (450, "5.7.1"), (550, "2.0.0")])
def test_an_enhanced_code_of_another_class_is_refused(code: int, enhanced: str) -> None:
    with pytest.raises(ValueError, match="same class"):
        Reply(code, enhanced, "text")


@pytest.mark.parametrize(("text", "name"), [("a\rb", "CR"), ("a\nb", "LF"), ("a\0b", "NUL")])
def test_a_line_end_or_nul_in_a_line_is_refused_by_name(text: str, name: str) -> None:
    with pytest.raises(ValueError, match=f"line 2 .* {name}"):
        Reply(550, "5.7.1", "fine", text)


@pytest.mark.parametrize("count", [0, 33])
def test_a_reply_has_1_to_32_lines(count: int) -> None:
    with pytest.raises(ValueError, match="1 to 32 lines"):
        Reply(550, "5.7.1", *["line"] * count)


def test_32_lines_are_allowed() -> None:
    assert len(Reply(550, "5.7.1", *["line"] * 32).encoded) == 32


def test_percent_signs_are_doubled_exactly_once() -> None:
    assert Reply(550, "5.7.1", "100% %%s").encoded == (b"100%% %%%%s",)


def test_a_line_may_have_980_bytes_after_escaping_and_no_more() -> None:
    assert len(Reply(550, None, "%" * 490).encoded[0]) == 980
    with pytest.raises(ValueError, match="982 bytes"):
        Reply(550, None, "%" * 491)
    with pytest.raises(ValueError, match="981 bytes"):
        Reply(550, None, "x" * 981)
    with pytest.raises(ValueError, match="bytes"):
        Reply(550, None, "é" * 491)


def test_text_is_sent_as_utf_8_and_bytes_go_back_as_they_came() -> None:
    assert Reply(550, None, "erwünscht \udcff").encoded == ("erwünscht ".encode() + b"\xff",)


def test_replies_are_values() -> None:
    reply = Reply(550, "5.7.1", "a", "b")
    assert reply == Reply(550, "5.7.1", "a", "b")
    assert hash(reply) == hash(Reply(550, "5.7.1", "a", "b"))
    assert reply != Reply(550, "5.7.1", "a")
    assert reply != "550 5.7.1 a"
    assert eval(repr(reply)) == reply
    assert str(reply) == "550 5.7.1 a\n550 5.7.1 b"
    with pytest.raises(AttributeError):
        reply.code = 450  # type: ignore[misc]


def test_no_stage_before_a_message_knows_discard_and_an_unknown_command_can_only_be_refused() -> None:
    from milter import Stage

    assert Status.DISCARD not in MEANINGFUL[Stage.CONNECT] | MEANINGFUL[Stage.HELO]
    assert MEANINGFUL[Stage.UNKNOWN] == {Status.CONTINUE, Status.REJECT, Status.TEMPFAIL}
    assert {stage for stage in Stage if Status.SKIP in MEANINGFUL[stage]} == {Stage.HEADER, Stage.BODY}


def test_a_line_that_is_no_str_is_refused_by_its_number() -> None:
    with pytest.raises(ValueError, match=r"line 2 of the reply must be a str, not b'two'"):
        Reply(550, "5.7.1", "one", b"two")  # type: ignore[arg-type]
