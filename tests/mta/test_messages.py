# SPDX-License-Identifier: GPL-3.0-or-later
"""Whole messages and observers inside a real Postfix: what filters see and edit, and what is delivered then."""

import json
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.filter_process import FilterProcess, RunFilter, running_filters

from .postfix import Postfix, open_directory
from .sink import Delivery, Sink
from .smtp import Answer, SmtpClient

FILTERS = Path(__file__).parent / "filters"
BOB, CARL = "bob@sink.test", "carl@sink.test"
TEMPFAIL = "451 4.7.1 Service unavailable - try again later"

TRACE = re.compile(rb"\AReceived: from [^\r]*\r\n\tby mta\.test \(Postfix\)(?:[^\r]|\r\n[ \t])*\r\n")

HEADER = (
    b"From: <ann@client.test>\r\n"
    b"X-Twin: 1\r\n"
    b"To: <bob@sink.test>\r\n"
    b"Subject: gr\xc3\xbc\xc3\x9fe\r\n"
    b"X-Twin: 2\r\n"
    b"X-Folded: one\r\n two \xe9\r\n\tthree\r\n"
    b"x-twin: 3\r\n"
    b"X-Twin: 4\r\n"
    b"X-Latin: caf\xe9 \xff\r\n"
    b"X-Spaces:   three before, two after  \r\n"
    b"X-No-Space:value\r\n"
    b"X-Tab:\tvalue\r\n"
    b"X-Empty:\r\n"
    b"X-Only-Spaces:  \r\n"
    b"\r\n"
)
BODY = b"Hi \xff\r\n.\r\n..\r\n.dot\r\n\r\nend\r\n"
CONTENTS = {
    "all-kinds-of-fields": HEADER + BODY,
    "no-body": b"X-Twin: 1\r\nSubject: hello\r\n\r\n",
    "no-header": b"\r\nonly text\r\n",
    "nothing": b"\r\n",
    "100-fields": b"".join(b"X-%d: %d\r\n" % (number % 7, number) for number in range(100)) + b"\r\ntext\r\n",
    "NUL-in-the-body": b"Subject: hello\r\n\r\na\0b\0\r\n\0\r\n",
    "long-lines": b"X-Long: " + b"\xc3\xa4" * 3000 + b"\r\n\r\n" + b"x" * 200_000 + b"\r\n",
    "1-MB": HEADER + b"0123456789abcde\r\n" * 62_000,
    "3-MB": HEADER + b".0123456789 \xe9\xff\r\n" * 200_000,  # beyond spool_size: in a file
}

# What Postfix itself makes of a message, before it shows it to a filter.
NORMALISED = {
    "no-empty-line": (b"Subject: hello\r\n", b"Subject: hello\r\n\r\n"),
    "bare-LF": (b"Subject: hello\nX-A: b\n\nHi\nbob\r\n", b"Subject: hello\r\nX-A: b\r\n\r\nHi\r\nbob\r\n"),
    "space-before-the-colon": (b"Subject : hello\r\n\r\nHi\r\n", b"Subject: hello\r\n\r\nHi\r\n"),
    "bcc": (b"Bcc: <eve@sink.test>\r\nSubject: hello\r\n\r\nHi\r\n", b"Subject: hello\r\n\r\nHi\r\n"),
    "text-in-the-header": (
        b"Subject: hello\r\nno colon\r\nTo: bob\r\n",
        b"Subject: hello\r\n\r\nno colon\r\nTo: bob\r\n",
    ),
}

# By their names in editor.py.
EDITS = (
    "change-fields",
    "delete-fields",
    "delete-some-of-a-name",
    "make-one-of-several",
    "insert-fields",
    "add-fields",
    "rename-a-field",
    "reverse-all",
    "change-envelope",
    "make-a-bounce",
    "odd-body",
    "no-body",
    "long-body",
    "upper-case",
    "everything",
)


@dataclass(frozen=True)
class Edited:
    """A message as the editor printed it."""

    received: bytes
    sender: str
    recipients: dict[str, frozenset[str]]
    fields: list[tuple[str, str]]
    body: bytes

    @classmethod
    def of(cls, line: str) -> "Edited":
        told: dict[str, Any] = json.loads(line)
        return cls(
            told["received"].encode("latin-1"),
            told["sender"],
            {address: frozenset(params) for address, *params in told["recipients"]},
            [(name, value) for name, value in told["fields"]],
            told["body"].encode("latin-1"),
        )


class Editor:
    """The filter editor.py, and a Postfix that asks it."""

    def __init__(self, filter_process: FilterProcess, postfix: Postfix) -> None:
        self.filter_process = filter_process
        self.postfix = postfix
        self.port = postfix.milter_service(filter_process.socket)

    def edited(self, answer: Answer) -> Edited:
        """The message that was accepted with this answer, which has its queue id."""
        assert answer.code == 250, f"{answer}: {self.filter_process}"
        return Edited.of(self.filter_process.stdout.wait_for(f'"queue_id": "{answer.text.split()[-1]}"'))

    def send(self, edit: str, content: bytes, recipients: tuple[str, ...] = (BOB, CARL)) -> tuple[Edited, Delivery]:
        """A message to be edited in that way: as its filter has it, and as it was delivered."""
        with session(self.port) as client:
            answer = client.send(f"{edit}@client.test", recipients, content, "BODY=8BITMIME")
        return self.edited(answer), self.postfix.sink.next()


@contextmanager
def session(port: int) -> Iterator[SmtpClient]:
    """An SMTP session that has begun with EHLO."""
    with SmtpClient(port) as client:
        assert client.ehlo().code == 250
        yield client


@pytest.fixture(scope="module")
def run_lasting_filter(postfix_of_session: Postfix) -> Iterator[RunFilter]:
    """Filters that all tests of this file share, so that Postfix need not restart for each."""
    with running_filters(umask=0) as run:
        yield run


@pytest.fixture(scope="module")
def lasting_directory() -> Iterator[Path]:
    with open_directory() as directory:
        yield directory


@pytest.fixture(scope="module")
def editor_process(run_lasting_filter: RunFilter, lasting_directory: Path) -> FilterProcess:
    return run_lasting_filter(FILTERS / "editor.py", f"unix:{lasting_directory}/editor")


@pytest.fixture
def editor(postfix: Postfix, editor_process: FilterProcess) -> Editor:
    return Editor(editor_process, postfix)


def without_trace(delivery: Delivery) -> bytes:
    """The message as delivered, without Postfix's own Received."""
    return TRACE.sub(b"", delivery.content, count=1)


def fields_of(content: bytes) -> list[tuple[str, str]]:
    """The header fields of a message as the library shows them."""
    return [(name, value.removeprefix(" ").replace("\r\n", "\n")) for name, value in Delivery("", (), content).fields]


def assert_delivered(delivery: Delivery, edited: Edited) -> None:
    """What is delivered is what the filter saw when it had edited the message."""
    assert fields_of(without_trace(delivery)) == edited.fields
    assert delivery.body == edited.body
    assert delivery.sender == edited.sender
    params = dict(zip(delivery.recipients, delivery.rcpt_params, strict=True))
    assert params.keys() == edited.recipients.keys()
    for address, wanted in edited.recipients.items():
        assert wanted <= params[address]


class TestReceiving:
    @pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
    def test_a_message_is_seen_and_delivered_byte_for_byte(self, editor: Editor, content: bytes) -> None:
        edited, delivery = editor.send("nothing", content)

        assert edited.received == content
        assert edited.fields == fields_of(content)
        assert without_trace(delivery) == content
        assert_delivered(delivery, edited)

    @pytest.mark.parametrize(("content", "seen"), NORMALISED.values(), ids=NORMALISED)
    def test_what_postfix_makes_of_a_message_is_seen(self, editor: Editor, content: bytes, seen: bytes) -> None:
        edited, delivery = editor.send("nothing", content)

        assert edited.received == seen
        assert_delivered(delivery, edited)


class TestEditing:
    @pytest.mark.parametrize("edit", EDITS)
    def test_what_the_filter_wants_is_delivered(self, editor: Editor, edit: str) -> None:
        edited, delivery = editor.send(edit, HEADER + BODY)

        assert edited.received == HEADER + BODY
        assert edited != Edited(
            edited.received, f"{edit}@client.test", {BOB: frozenset(), CARL: frozenset()}, fields_of(HEADER), BODY
        )
        assert_delivered(delivery, edited)

    @pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
    def test_all_edits_together_fit_each_message(self, editor: Editor, content: bytes) -> None:
        edited, delivery = editor.send("everything", content)

        assert edited.received == content
        assert_delivered(delivery, edited)
        assert delivery.sender == "new@client.test"
        assert set(delivery.recipients) == {CARL, "dora@sink.test", "fred@sink.test"}
        assert {("X-Top", " first"), ("X-Twin", " the only one"), ("X-Scanned", " clean")} <= set(delivery.fields)
        assert delivery.body == b"prefixed\r\n" + (b"\r\n" + content).partition(b"\r\n\r\n")[2]

    def test_a_long_body_is_read_edited_and_delivered(self, editor: Editor) -> None:
        body = b"".join(b".%07d abc\r\n" % number for number in range(210_000))

        edited, delivery = editor.send("upper-case", HEADER + body)

        assert edited.received == HEADER + body
        assert delivery.body == body.upper()
        assert fields_of(without_trace(delivery)) == fields_of(HEADER)

    def test_a_second_filter_sees_the_first_ones_edits(
        self, postfix: Postfix, sink: Sink, editor_process: FilterProcess, run_filter: RunFilter
    ) -> None:
        second = run_filter(FILTERS / "editor.py", "inet:0@127.0.0.1")
        port = postfix.milter_service([editor_process.socket, second.socket])

        with session(port) as client:
            answer = client.send("everything@client.test", [BOB, CARL], HEADER + BODY, "BODY=8BITMIME")

        queue_id = f'"queue_id": "{answer.text.split()[-1]}"'
        first_saw, second_saw = (Edited.of(process.stdout.wait_for(queue_id)) for process in (editor_process, second))
        assert fields_of(second_saw.received) == first_saw.fields
        assert second_saw.received.endswith(b"\r\n\r\n" + first_saw.body)
        assert fields_of(without_trace(sink.next())) == second_saw.fields


class TestSessions:
    def test_each_message_of_a_session_is_edited_for_itself(self, editor: Editor) -> None:
        edits = ["everything", "nothing", "upper-case", "delete-fields", "nothing", "everything"]
        contents = [b"X-Number: %d\r\n" % number + HEADER + b"x\r\n" * 10**number for number in range(len(edits))]

        with session(editor.port) as client:
            answers = []
            for edit, content in zip(edits, contents, strict=True):
                client.mail("given-up@client.test")
                client.rcpt("eve@sink.test")
                assert client.command("RSET").code == 250
                answers.append(client.send(f"{edit}@client.test", [BOB, CARL], content, "BODY=8BITMIME"))

        delivered = {delivery.values("X-Number")[0]: delivery for delivery in editor.postfix.deliveries()}
        assert len(delivered) == len(edits)
        for number, (answer, content) in enumerate(zip(answers, contents, strict=True)):
            edited = editor.edited(answer)
            assert edited.received == content
            assert_delivered(delivered[str(number)], edited)

    def test_a_client_that_leaves_within_a_message_leaves_nothing(self, editor: Editor) -> None:
        for commands in ([], ["RCPT TO:<bob@sink.test>"], ["RCPT TO:<bob@sink.test>", "DATA"]):
            client = SmtpClient(editor.port)
            client.ehlo()
            client.mail("nothing@client.test")
            for command in commands:
                client.command(command)
            client.write(b"X-Left: behind\r\n\r\nleft behind\r\n")
            client.drop()

        edited, delivery = editor.send("nothing", HEADER + BODY)

        assert edited.received == HEADER + BODY
        assert_delivered(delivery, edited)


class TestFailing:
    def test_a_message_whose_handler_raises_is_to_be_tried_again_and_none_of_its_edits_remain(
        self, editor: Editor
    ) -> None:
        with session(editor.port) as client:
            failed = client.send("failing@client.test", [BOB, CARL], HEADER + BODY, "BODY=8BITMIME")
            passed = client.send("nothing@client.test", [BOB, CARL], HEADER + BODY, "BODY=8BITMIME")

        assert str(failed) == TEMPFAIL
        (delivery,) = editor.postfix.deliveries()
        assert_delivered(delivery, editor.edited(passed))
        assert without_trace(delivery) == HEADER + BODY
        editor.filter_process.stderr.wait_for("RuntimeError: failed after the edits")

    def test_a_message_for_which_there_is_no_room_is_to_be_tried_again(self, editor: Editor) -> None:
        content = CONTENTS["3-MB"]

        with session(editor.port) as client:
            with files_no_larger_than(2_000_000, editor.filter_process):
                failed = client.send("nothing@client.test", BOB, content, "BODY=8BITMIME")
                small = client.send("nothing@client.test", BOB, HEADER + BODY, "BODY=8BITMIME")
            passed = client.send("nothing@client.test", BOB, content, "BODY=8BITMIME")

        assert str(failed) == TEMPFAIL
        assert [editor.edited(answer).received for answer in (small, passed)] == [HEADER + BODY, content]
        sizes = sorted(len(delivery.body) for delivery in editor.postfix.deliveries())
        assert sizes == [len(BODY), len(content) - len(HEADER)]
        editor.filter_process.stderr.wait_for("the message could not be kept for on_message in ")


@contextmanager
def files_no_larger_than(size: int, process: FilterProcess) -> Iterator[None]:
    """For the process this is a full disk: Python ignores the signal, so that write() fails."""
    soft, hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="module")
def observing_process(run_lasting_filter: RunFilter, lasting_directory: Path) -> FilterProcess:
    return run_lasting_filter(FILTERS / "observing.py", f"unix:{lasting_directory}/observing")


class TestObserving:
    def test_observers_see_all_in_order_and_nobody_waits_for_them(
        self, postfix: Postfix, run_filter: RunFilter, socket_dir: Path
    ) -> None:
        observing = run_filter(FILTERS / "observing.py", f"unix:{socket_dir}/filter")
        # A batch has room for 64 KiB: these come in several ones.
        names = [f"X-{number}" for number in range(90)]
        content = "".join(f"{name}: {'x' * 1000}\n" for name in names) + "\n"
        body = "".join(f"line {number:010}\r\n" for number in range(10_000))

        with session(postfix.milter_service(observing.socket)) as client:
            answers = [client.send("first@client.test", [BOB, CARL], content + body)]
            client.mail("given-up@client.test")
            client.rcpt(BOB)
            client.command("RSET")
            answers.append(client.send("second@client.test", BOB, "Subject: hello\n\nHi\n"))

        assert [answer.code for answer in answers] == [250, 250]
        assert len(postfix.deliveries()) == 2
        observing.stop()
        seen = [json.loads(line) for line in observing.stdout.lines]
        assert [event[:2] for event in seen] == [
            ["connect", "[127.0.0.1]"],
            ["helo", "client.test"],
            ["mail", "first@client.test"],
            ["rcpt", BOB],
            ["rcpt", CARL],
            ["data"],
            *(["header", name] for name in names),
            ["eoh"],
            ["body", body[:65535]],
            ["body", body[65535 : 2 * 65535]],
            ["body", body[2 * 65535 :]],
            ["eom"],
            ["mail", "given-up@client.test"],
            ["rcpt", BOB],
            ["abort"],
            ["mail", "second@client.test"],
            ["rcpt", BOB],
            ["data"],
            ["header", "Subject"],
            ["eoh"],
            ["body", "Hi\r\n"],
            ["eom"],
            ["close"],
        ]

    @pytest.mark.parametrize("stage", ["mail", "rcpt", "data", "header", "eoh", "body", "eom"])
    def test_an_observers_failure_is_answered_at_the_end_of_its_message(
        self, postfix: Postfix, observing_process: FilterProcess, stage: str
    ) -> None:
        port = postfix.milter_service(observing_process.socket)

        with session(port) as client:
            before = [client.mail(f"poison-{stage}@client.test"), client.rcpt(BOB), client.command("DATA")]
            client.write(HEADER + b"Hi\r\n")
            failed = client.command(".")
            passed = client.send("fine@client.test", CARL, "Subject: hello\n\nHi\n")

        assert [answer.code for answer in before] == [250, 250, 354]
        assert str(failed) == TEMPFAIL
        assert passed.code == 250
        (delivery,) = postfix.deliveries()
        assert delivery.recipients == (CARL,)

    @pytest.mark.parametrize("stage", ["mail", "rcpt"])
    def test_an_observers_failure_in_a_message_that_is_given_up_concerns_no_other(
        self, postfix: Postfix, observing_process: FilterProcess, stage: str
    ) -> None:
        port = postfix.milter_service(observing_process.socket)

        with session(port) as client:
            client.mail(f"poison-{stage}@client.test")
            client.rcpt(BOB)
            client.command("RSET")
            passed = client.send("fine@client.test", CARL, "Subject: hello\n\nHi\n")

        assert passed.code == 250
        assert len(postfix.deliveries()) == 1
