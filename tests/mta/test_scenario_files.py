# SPDX-License-Identifier: GPL-3.0-or-later
"""The notation of scenarios: what is wrong in a file is told with its line; the tables are up to date."""

from pathlib import Path

import pytest

from .notation import escape, unescape
from .play import Outcome, differences
from .scenario import Expected, Mail, ScenarioError, Sent, all_scenarios, read
from .smtp import Answer
from .tables import DOCUMENT, document, reasons

BEGINNING = "title: A test.\nfilter: obey\n"
SCENARIO = BEGINNING + "C: NOOP\nS: 250 2.0.0 Ok\ndelivered: ann@client.test -> bob@sink.test\n| Hi\n"


def written(directory: Path, text: str) -> Path:
    path = directory / "example.txt"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("filter: obey\ndelivered: nothing\n", "example.txt:1: a scenario begins with its title"),
        ("title: A test.\ndelivered: nothing\n", "there is no filter"),
        (BEGINNING, "nothing says what is delivered"),
        (BEGINNING + "nonsense\n", "example.txt:3: this is no line of a scenario: 'nonsense'"),
        (BEGINNING + "S: fine\n", "example.txt:3: a reply has a code of three digits: 'fine'"),
        (BEGINNING + "S: 550-one\nC: NOOP\n", "example.txt:4: a reply has no last line"),
        (BEGINNING + "C: \\q\n", "example.txt:3: a backslash that means nothing"),
        (BEGINNING + "delivered: ann@client.test\n", "example.txt:3: a message goes from one to others"),
        (BEGINNING + "delivered: <a -> <b>\n", "example.txt:3: this is no address"),
        (BEGINNING + "| text\n", "example.txt:3: content stands below the message"),
        (BEGINNING + "F: mail <ann@client.test>\n", "example.txt:3: the stage 'mail' is not watched"),
        (BEGINNING + "postfix: name\n", "example.txt:3: a setting has a name and a value"),
        (BEGINNING + "postfix> S: 250\n", "example.txt:3: a difference needs a reason"),
        (BEGINNING + "postfix[why]> S: x\ndelivered: nothing\n", "example.txt:3: a reply has a code"),
        (BEGINNING + "only: exim because\n", "example.txt:3: there is no server 'exim'"),
        (BEGINNING + "only: postfix\n", "example.txt:3: a scenario for one server needs a reason"),
        (BEGINNING + "unmodelled: postfix\n", "example.txt:3: say of which servers, and why"),
        (BEGINNING + "or: 500\ndelivered: nothing\n", "example.txt:3: another reply stands below a reply"),
        ("title: A test.\n    mail: die()\n", "example.txt:2: an order for a filter stands below it"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(ScenarioError) as raised:
        read(written(tmp_path, text))
    assert problem in str(raised.value)


def test_a_line_for_one_server_counts_there_only(tmp_path: Path) -> None:
    text = SCENARIO.replace(
        "S: 250 2.0.0 Ok", "postfix[why]> S: 250 one\nsendmail[why]> S: 251-two\nsendmail[why]> S: 251 lines"
    )
    scenario = read(written(tmp_path, text))
    assert scenario.on("postfix").steps[-1] == Expected(4, 250, ("one",))
    assert scenario.on("sendmail").steps[-1] == Expected(6, 251, ("two", "lines"))


def test_another_version_may_say_something_else(tmp_path: Path) -> None:
    scenario = read(written(tmp_path, SCENARIO.replace("2.0.0 Ok\n", "2.0.0 Ok\nor: 500 5.5.2 Unknown\n")))
    for answer, count in (
        (Answer(500, ("5.5.2 Unknown",)), 0),
        (Answer(500, ("Unknown",)), 1),
        (Answer(250, ("2.0.0 Ok",)), 0),
    ):
        found = differences(scenario, scenario.on("postfix"), Outcome((*GREETED, answer), (MAIL,), (), ()))
        assert len(found) == count


def test_a_dialogue_begins_with_greeting_and_ehlo(tmp_path: Path) -> None:
    steps = read(written(tmp_path, SCENARIO)).on("postfix").steps
    assert steps[:3] == (Expected(0, 220), Sent(b"EHLO client.test\r\n"), Expected(0, 250))


MAIL = Mail(0, "<ann@client.test>", ("<bob@sink.test>",), b"Hi\r\n")
GREETED = (Answer(220, ("hello",)), Answer(250, ("client.test",)))
FINE = Outcome((*GREETED, Answer(250, ("2.0.0 Ok",))), (MAIL,), (), ())


@pytest.mark.parametrize(
    ("outcome", "problems"),
    [
        (FINE, []),
        (Outcome((*GREETED, Answer(451, ("no",))), (MAIL,), (), ()), [":4: expected 250 2.0.0 Ok, got 451 no"]),
        (Outcome((*GREETED, Answer(250, ("Ok",))), (MAIL,), (), ()), [":4: expected 250 2.0.0 Ok, got 250 Ok"]),
        (Outcome(GREETED, (MAIL,), (), ()), [":4: expected 250 2.0.0 Ok, and there was no reply"]),
        (Outcome(FINE.replies, (), (), ()), [":5: not delivered: <ann@client.test> -> <bob@sink.test>"]),
        (Outcome(FINE.replies, (MAIL, MAIL), (), ()), [":0: delivered besides: <ann@client.test> -> <bob@sink.test>"]),
        (Outcome(FINE.replies, (), (MAIL,), ()), [":5: not delivered", ":0: held besides"]),
        (Outcome(FINE.replies, (MAIL,), (), ("mail <x>",)), [":0: the filter was shown"]),
    ],
)
def test_what_differs_is_told(tmp_path: Path, outcome: Outcome, problems: list[str]) -> None:
    scenario = read(written(tmp_path, SCENARIO))
    found = differences(scenario, scenario.on("postfix"), outcome)
    assert len(found) == len(problems)
    assert all(problem in text for text, problem in zip(found, problems, strict=True))


def test_another_body_is_told(tmp_path: Path) -> None:
    scenario = read(written(tmp_path, SCENARIO))
    other = Mail(0, MAIL.sender, MAIL.recipients, b"Ho\r\n")
    (found,) = differences(scenario, scenario.on("postfix"), Outcome(FINE.replies, (other,), (), ()))
    assert "delivered differently" in found


@pytest.mark.parametrize("raw", [b"", b"\\ \r\n\t\0\x7f\xff", "grüße 📬".encode(), b"x" * 1000 + b"y", b"(*)"])
def test_any_bytes_can_be_written(raw: bytes) -> None:
    assert unescape(escape(raw)) == raw
    assert escape(raw).isprintable()


def test_every_difference_has_a_reason_and_every_reason_a_difference() -> None:
    used = {line.reason for scenario in all_scenarios() for line in scenario.lines if line.reason}
    assert used == reasons().keys()


def test_the_tables_of_the_document_are_up_to_date() -> None:
    assert DOCUMENT.read_text() == document(DOCUMENT.read_text()), "run: python -m tests.mta.tables"
