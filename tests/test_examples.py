# SPDX-License-Identifier: GPL-3.0-or-later
"""The programs in examples/: their filters under test, and each as a user runs it."""

import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from milter import Milter
from milter.testing import MTA, Client, MTAFactory
from tests.filter_process import REPOSITORY, RunFilter, running_filters

NAMES = sorted(path.stem for path in (REPOSITORY / "examples").glob("*.py"))


def app_of(example: str) -> Milter:
    app = importlib.import_module(f"examples.{example}").app
    assert isinstance(app, Milter)
    return app


@pytest.fixture
def run_filter() -> Iterator[RunFilter]:
    with running_filters() as run:
        yield run


@pytest.mark.parametrize("example", NAMES)
def test_an_example_runs(run_filter: RunFilter, example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLAMAV_ON_ERROR", "accept")  # there is none
    monkeypatch.setenv("GREYLIST_STORE", str(tmp_path / "greylist.db"))
    monkeypatch.setenv("SPF_NAMESERVER", "127.0.0.1:1")
    process = run_filter(f"examples/{example}.py", "inet:0@127.0.0.1")
    with MTA(process.socket) as mta:
        assert mta.send(client="127.0.0.1").accepted
    process.stop()


def test_client_addresses_prints_each_client(capsys: pytest.CaptureFixture[str]) -> None:
    with MTA(app_of("client_addresses")) as mta:
        mta.send(client="192.0.2.1")
        mta.send(client="2001:db8::8")
        mta.send(client=None)
    assert capsys.readouterr().out == "connect from 192.0.2.1:49152\nconnect from [2001:db8::8]:49152\n"


def test_recipient_counter_counts_for_each_message_anew(capsys: pytest.CaptureFixture[str]) -> None:
    with MTA(app_of("recipient_counter")) as mta, mta.connect() as session:
        counts = [
            session.send(recipients=[f"bob{number}@mta.example" for number in range(count)]).headers for count in (1, 3)
        ]
    assert [headers["X-Recipient-Count"] for headers in counts] == ["1", "3"]
    assert capsys.readouterr().out.splitlines() == [
        "message 1 of client.example: 1 recipients",
        "message 2 of client.example: 3 recipients",
    ]


def test_show_stages_prints_the_conversation(capsys: pytest.CaptureFixture[str]) -> None:
    with MTA(app_of("show_stages")) as mta, mta.connect() as session:
        give_up(session.client)
        session.send(message=b"Subject: test\n\ntext\n")
    stages = " ".join(line.split()[1] for line in capsys.readouterr().out.splitlines())
    assert stages == ("NEGOTIATE CONNECT HELO UNKNOWN MAIL ABORT MAIL RCPT DATA HEADER EOH BODY EOM CLOSE")


def give_up(client: Client) -> None:
    client.connect_info()
    client.helo()
    client.unknown("FOO")
    client.mail("<ann@client.example>")
    client.abort()


def test_guard_takes_mail_for_the_inside_from_who_has_logged_in(milter_mta: MTAFactory) -> None:
    mta = milter_mta(app_of("guard"))
    refused = mta.send(recipients=["boss@Internal.example", "bob@mta.example"])
    taken = mta.send(recipients="boss@internal.example", macros={"auth_authen": "ann"})
    assert refused.recipients == ["bob@mta.example"]
    assert refused.refused == {
        "boss@Internal.example": "550 5.7.1 internal addresses are not for you, we are 100% sure"
    }
    assert taken.recipients == ["boss@internal.example"]


@pytest.mark.parametrize("like", ["postfix", "sendmail"])
def test_guard_refuses_a_subject(milter_mta: MTAFactory, like: str) -> None:
    result = milter_mta(app_of("guard"), like=like).send(message="Subject: forbidden\n\n")
    assert (result.stage, result.reply) == (
        "eoh",
        "554-5.7.1 this subject is forbidden\n554 5.7.1 choose another one",
    )


def test_guard_marks_what_passes_and_answers_a_ping(milter_mta: MTAFactory) -> None:
    mta = milter_mta(app_of("guard"))
    marked = mta.send(message="Subject: test\n\ntext\n")
    answered = mta.send(message="Subject: test\n\nping\n")
    assert (marked.headers["X-Guard"], marked.body) == ("passed", b"text\r\n")
    assert answered.body == b"pong\r\n"


@pytest.mark.parametrize("example", NAMES)
def test_the_filter_has_the_name_of_its_file(example: str) -> None:
    assert app_of(example).name == example
