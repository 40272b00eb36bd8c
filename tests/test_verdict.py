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


# What strangers may write into a text that a handler quotes: as it is, and as it is sent.
QUOTED = [
    ("a\rb", "a b"),
    ("a\nb", "a b"),
    ("a\r\nb", "a b"),
    ("folded\n \tvalue", "folded value"),
    ("ends\n", "ends "),
    ("a\n\nb", "a  b"),
    ("a\0b", "a?b"),
    ("a\tb", "a\tb"),
    ("\x1b[2Jred\x07\x7f", "?[2Jred??"),
    ("A\u008a250 2.1.5 fine", "A?250 2.1.5 fine"),
    ("\u0080\u008d\u009b", "???"),
    ("\udc8d\udc8a250 \udc80", "??250 ?"),
    ("\ud800 \udbff \udc00 \udfff", "? ? ? ?"),
]


@pytest.mark.parametrize(("text", "sent"), QUOTED)
def test_a_line_stays_one_line_whatever_it_quotes(text: str, sent: str) -> None:
    reply = Reply(550, "5.7.1", "fine", text)
    assert reply.encoded == reply.encoded_for_8_bits == (b"fine", sent.encode())
    assert reply.lines == ("fine", text)


def test_no_byte_that_becomes_nul_or_a_line_end_with_seven_bits_is_sent_to_a_server_that_may_be_sendmail() -> None:
    stray, beyond = range(0xDC80, 0xDD00), (0x10000, 0x1F40A, 0x1F600, 0x1F64D, 0x2000B, 0x10FFFF)
    for character in map(chr, (*range(0xA0, 0xD800), *stray, *range(0xE000, 0x10000), *beyond)):
        raw = character.encode("utf-8", "surrogateescape")
        sent = b"?" if {0x80, 0x8A, 0x8D} & set(raw) else raw
        assert Reply(550, "5.7.1", f"A{character}250 fine").encoded == (b"A" + sent + b"250 fine",)


def test_characters_that_sendmail_would_make_line_ends_of_are_left_to_servers_with_eight_bits() -> None:
    reply = Reply(550, "5.7.1", "отправлено, \u010d, \u4e0a", "č")
    assert reply.encoded[0].decode() == "отп?авлено, ?, ?"
    assert reply.encoded_for_8_bits == ("отправлено, \u010d, \u4e0a".encode(), "č".encode())
    assert str(reply) == "550 5.7.1 отправлено, \u010d, \u4e0a\n550 5.7.1 č"


@pytest.mark.parametrize("count", [0, 33])
def test_a_reply_has_1_to_32_lines(count: int) -> None:
    with pytest.raises(ValueError, match="1 to 32 lines"):
        Reply(550, "5.7.1", *["line"] * count)


def test_32_lines_are_allowed() -> None:
    assert len(Reply(550, "5.7.1", *["line"] * 32).encoded) == 32


def test_percent_signs_are_doubled_exactly_once() -> None:
    assert Reply(550, "5.7.1", "100% %%s").encoded == (b"100%% %%%%s",)


@pytest.mark.parametrize(
    ("text", "sent"),
    [
        ("x" * 980, b"x" * 980),
        ("%" * 490, b"%" * 980),
        ("x" * 981, b"x" * 977 + b"..."),
        ("%" * 491, b"%" * 976 + b"..."),
        ("ü" * 491, "ü".encode() * 488 + b"..."),
        ("\U0001f600" * 246, "\U0001f600".encode() * 244 + b"..."),
        ("\udcff" * 2000, b"\xff" * 977 + b"..."),
        ("x" * 1_000_000, b"x" * 977 + b"..."),
    ],
    ids=lambda value: repr(value[:3]),
)
def test_a_line_is_cut_between_two_characters_where_libmilter_would_send_none_of_it(text: str, sent: bytes) -> None:
    assert Reply(550, None, text).encoded_for_8_bits == (sent,)


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
