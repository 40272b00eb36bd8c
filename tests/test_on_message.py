# SPDX-License-Identifier: GPL-3.0-or-later
"""Whole messages: gathered by the shim, read and edited by handlers of on_message, changed by the MTA."""

import contextlib
import os
import resource
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from milter import Actions, Context, ContextError, EomContext, Message, Milter, Reply, Status
from milter.testing import (
    AddHeader,
    Client,
    Command,
    Delivery,
    DeliveryModel,
    Envelope,
    Postfix,
    Sendmail,
    Session,
    Steps,
    Verdict,
)
from milter.testing import Message as Mail
from tests.conftest import Serve, begin_message, send_content

ENVELOPE = Envelope.of("ann@client.example", "bob@mta.example", "eve@mta.example")
EXACT = {
    "plain": b"Subject: test\r\n\r\ntext\r\n",
    "8-bit": b"Subject: \xe4\xff\r\n\r\n\xff\xfe\r\n",
    "folded": b"Subject: one\r\n two\r\n\tthree\r\nTo: bob\r\n\r\ntext\r\n",
    "empty value": b"Subject:\r\nX-Space: \r\nX-Spaces:  \r\n\r\ntext\r\n",
    "repeated": b"Received: 1\r\nreceived: 2\r\nRECEIVED: 3\r\n\r\ntext\r\n",
    "no space after the colon": b"Subject:test\r\nTo:\tbob\r\n\r\ntext\r\n",
    "NUL in the body": b"Subject: test\r\n\r\na\0b\0\0c\r\n",
    "no body": b"Subject: test\r\n\r\n",
    "no header": b"\r\ntext\r\n",
    "nothing": b"\r\n",
    "bare line ends in the body": b"Subject: test\r\n\r\na\nb\rc\r\n",
    "a long body": b"Subject: test\r\n\r\n" + b"0123456789abcde\n" * 20000,
}


def keeper(app: Milter[Any, Any]) -> list[bytes]:
    """Register a handler that keeps what each message is."""
    kept: list[bytes] = []

    @app.on_message
    def keep(ctx: EomContext, message: Message) -> Status:
        assert message.size == len(message.as_bytes())
        kept.append(message.as_bytes())
        return Status.CONTINUE

    return kept


def send_exactly(client: Client, data: bytes, chunk: int = 65535) -> Verdict:
    """Send a message as it lies here, header lines and body, and return the verdict."""
    head, _, body = (b"\r\n" + data).partition(b"\r\n\r\n")
    begin_message(client)
    for line in head.replace(b"\r\n\t", b"\n\t").replace(b"\r\n ", b"\n ").split(b"\r\n")[1:]:
        name, _, value = line.decode("utf-8", "surrogateescape").partition(":")
        client.header(name, value)
    client.eoh()
    for start in range(0, len(body), chunk):
        client.body(body[start : start + chunk])
    return client.end_of_message().answer.verdict


# ---- Collecting


def test_with_on_message_alone_only_the_end_of_the_message_is_answered(serve: Serve) -> None:
    app = Milter("test")
    keeper(app)
    agreed = serve(app).client().negotiate()
    silent = (
        Steps.NOREPLY_CONNECT
        | Steps.NOREPLY_HELO
        | Steps.NOREPLY_MAIL
        | Steps.NOREPLY_RCPT
        | Steps.NOREPLY_DATA
        | Steps.NOREPLY_HEADER
        | Steps.NOREPLY_EOH
        | Steps.NOREPLY_BODY
        | Steps.NOREPLY_UNKNOWN
    )
    assert agreed.steps & silent == silent
    assert not agreed.steps & (Steps.NO_HEADER | Steps.NO_BODY)


@pytest.mark.parametrize("spool_size", [0, 1 << 20])
@pytest.mark.parametrize("data", EXACT.values(), ids=EXACT)
def test_as_bytes_is_what_the_mta_sent(serve: Serve, data: bytes, spool_size: int) -> None:
    app = Milter("test", spool_size=spool_size)
    kept = keeper(app)
    client = serve(app).greeted()
    assert send_exactly(client, data) is Verdict.CONTINUE
    assert kept == [data]


def test_several_messages_of_a_connection_are_kept_apart(serve: Serve) -> None:
    app = Milter("test", spool_size=100)
    kept = keeper(app)
    client = serve(app).greeted()
    messages = [b"Subject: %d\r\n\r\n" % number + b"x" * size for number, size in enumerate((10, 500, 0, 70000, 20))]
    for message in messages:
        send_exactly(client, message, chunk=1000)
    assert kept == messages


def test_an_aborted_message_leaves_nothing_to_the_next(serve: Serve) -> None:
    app = Milter("test")
    kept = keeper(app)
    client = serve(app).greeted()
    begin_message(client)
    client.header("Subject", " first")
    client.eoh()
    client.body(b"first")
    client.abort()
    send_exactly(client, b"Subject: second\r\n\r\nsecond")
    assert kept == [b"Subject: second\r\n\r\nsecond"]


@pytest.mark.parametrize("version", [2, 3, 4, 5, 6])
def test_old_mtas_take_one_space_off_each_value(serve: Serve, version: int) -> None:
    app = Milter("test")
    kept = keeper(app)
    client = serve(app).client()
    client.negotiate(version, steps={2: 0x7F, 3: 0x17F}.get(version, 0x37F))
    client.connect_info()
    client.helo()
    assert send_exactly(client, b"Subject:test\r\n\r\ntext") is Verdict.CONTINUE
    assert kept == [b"Subject: test\r\n\r\ntext"]


def test_handlers_of_headers_see_no_space_that_only_on_message_asked_for(serve: Serve) -> None:
    app = Milter("test")
    kept = keeper(app)
    seen: list[tuple[str, str]] = []

    @app.on_header
    def header(ctx: Context, name: str, value: str) -> None:
        seen.append((name, value))

    @app.on_eom
    def eom(ctx: EomContext) -> None:
        seen.append(("options", str(bool(ctx.options & ctx.options.LEADING_SPACE))))
        ctx.add_header("X-Added", "value")
        ctx.insert_header(1, "X-Inserted", "value")
        ctx.replace_header("A", 1, "new")

    client = serve(app).greeted()
    begin_message(client)
    for value in (" a", "b", "  c", ""):
        client.header("A", value)
    client.eoh()
    end = client.end_of_message()
    assert seen == [("A", "a"), ("A", "b"), ("A", " c"), ("A", ""), ("options", "False")]
    assert kept == [b"A: a\r\nA:b\r\nA:  c\r\nA:\r\n\r\n"]
    assert [change.value for change in end.changes] == [" value", " value", " new"]  # type: ignore[union-attr]


def test_on_eom_and_on_message_run_in_the_order_of_their_registration(serve: Serve) -> None:
    app = Milter("test")
    order: list[str] = []

    @app.on_message
    def first(ctx: EomContext, message: Message) -> None:
        order.append("first")

    @app.on_eom
    def second(ctx: EomContext) -> None:
        order.append("second")

    @app.on_message
    def third(ctx: EomContext, message: Message) -> None:
        order.append(f"third, for {message.recipients[0]}")

    send_exactly(serve(app).greeted(), EXACT["plain"])
    assert order == ["first", "second", "third, for bob@mta.example"]


def test_replying_handlers_of_the_body_may_skip_and_the_message_is_whole(serve: Serve) -> None:
    app = Milter("test")
    kept = keeper(app)
    chunks: list[bytes] = []

    @app.on_body
    def body(ctx: Context, chunk: bytes) -> Status:
        chunks.append(chunk)
        return Status.SKIP

    send_exactly(serve(app).greeted(), b"\r\n0123456789", chunk=3)
    assert chunks == [b"012"]
    assert kept == [b"\r\n0123456789"]


# ---- The spool


def open_files() -> list[str]:
    """What the descriptors of this process lead to."""
    if not os.path.exists("/proc/self/fd"):
        pytest.skip("open files are told in /proc")
    files = []
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # another thread may close one meanwhile
            files.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    return files


@pytest.mark.parametrize("excess", [-1, 0, 1])
def test_a_message_lies_in_a_file_of_the_chosen_directory_when_it_is_larger_than_the_spool_size(
    serve: Serve, tmp_path: Path, excess: int
) -> None:
    header = len(b"Subject\0 test\0")  # as the shim keeps it
    app = Milter("test", spool_size=5000, spool_directory=tmp_path)
    files: list[str] = []

    @app.on_message
    def look(ctx: EomContext, message: Message) -> None:
        files.extend(name for name in open_files() if name.startswith(str(tmp_path)) and "(deleted)" in name)
        with message.open() as file:
            assert file.read() == message.as_bytes()

    data = b"Subject: test\r\n\r\n" + b"x" * (5000 - header + excess)
    client = serve(app).greeted()
    before = len(open_files())
    assert send_exactly(client, data, chunk=777) is Verdict.CONTINUE
    assert len(files) == (1 if excess > 0 else 0)
    assert len(open_files()) == before
    assert [path.name for path in tmp_path.iterdir()] == ["filter.sock"]


@pytest.mark.parametrize(
    ("on_error", "verdict"),
    [
        (Status.TEMPFAIL, Verdict.TEMPFAIL),
        (Status.REJECT, Verdict.REJECT),
        (Reply(452, "4.3.1", "no room"), Verdict.REPLY),
    ],
)
def test_a_spool_that_cannot_be_written_is_answered_by_on_error(
    serve: Serve, tmp_path: Path, on_error: Status | Reply, verdict: Verdict, caplog: pytest.LogCaptureFixture
) -> None:
    directory = tmp_path / "spool"
    directory.mkdir()
    app = Milter("test", spool_size=100, spool_directory=directory, on_error=on_error)
    kept = keeper(app)
    client = serve(app).greeted()
    directory.rmdir()
    assert send_exactly(client, EXACT["a long body"]) is verdict
    assert kept == []
    assert "keep failed in on_message" in caplog.text
    assert "No such file or directory" in caplog.text
    directory.mkdir()
    assert send_exactly(client, EXACT["a long body"]) is Verdict.CONTINUE
    assert kept == [EXACT["a long body"]]


def test_a_full_disk_loses_and_truncates_nothing(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    app = Milter("test", spool_size=1000)
    kept = keeper(app)
    client = serve(app).greeted()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        assert send_exactly(client, EXACT["a long body"]) is Verdict.TEMPFAIL
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert kept == []
    assert "File too large" in caplog.text
    assert send_exactly(client, EXACT["a long body"]) is Verdict.CONTINUE
    assert kept == [EXACT["a long body"]]


# ---- Afterwards


@pytest.mark.parametrize("spool_size", [0, 1 << 20])
@pytest.mark.parametrize("size", [10, 100_000])
def test_a_message_that_was_kept_is_valid_or_raises(serve: Serve, size: int, spool_size: int) -> None:
    app = Milter("test", spool_size=spool_size)
    kept: list[Message] = []

    @app.on_message
    def keep(ctx: EomContext, message: Message) -> None:
        message.headers["Subject"]
        kept.append(message)

    client = serve(app).greeted()
    for letter in (b"a", b"b"):
        send_exactly(client, b"Subject: test\r\n\r\n" + letter * size)
    client.close()
    for letter, message in zip((b"a", b"b"), kept, strict=True):
        assert message.headers["Subject"] == "test"
        if size == 10 and spool_size:
            assert message.body == letter * size
        else:
            with pytest.raises(ContextError, match="no longer"):
                _ = message.body
        with pytest.raises(ContextError):
            message.headers["Subject"] = "late"


def test_a_thread_that_reads_for_ever_gets_the_message_or_an_exception(serve: Serve) -> None:
    app = Milter("test")
    kept: list[Message] = []
    seen: list[bool] = []
    entered = threading.Event()

    @app.on_message
    def keep(ctx: EomContext, message: Message) -> None:
        kept.append(message)
        threading.Thread(target=read, args=(message,)).start()
        entered.wait(10)

    def read(message: Message) -> None:
        entered.set()
        try:
            seen.append(message.body == b"x" * 200_000)
        except ContextError:
            seen.append(True)

    client = serve(app).greeted()
    for _ in range(50):
        entered.clear()
        send_exactly(client, b"\r\n" + b"x" * 200_000)
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join(10)
    assert seen == [True] * 50


# ---- Editing


def deliver(serve: Serve, app: Milter[Any, Any], data: bytes, mta: type[DeliveryModel]) -> Delivery:
    client = serve(app).client()
    version = "Postfix 3.7.11" if mta is Postfix else "8.17.1.9"
    transcript = client.send_message(ENVELOPE, Mail.parse(data), Session(macros={"v": version}))
    return transcript.delivery(mta(transcript.negotiated.steps))


MTAS = pytest.mark.parametrize("mta", [Postfix, Sendmail])


@MTAS
def test_edits_become_changes(serve: Serve, mta: type[DeliveryModel]) -> None:
    app = Milter("test")

    @app.on_message
    def edit(ctx: EomContext, message: Message) -> None:
        message.headers["Subject"] = "new"
        del message.headers["X-Spam"]
        message.headers.insert(1, "X-Second", "inserted")
        message.headers["X-Scanned"] = "clean"
        message.recipients.remove("eve@mta.example")
        message.recipients.add("carl@mta.example")
        message.sender = "list@mta.example"
        message.body = b"new\r\n"

    data = b"From: ann\r\nX-Spam: 1\r\nSubject: old\r\nX-Spam: 2\r\nTo: bob\r\n\r\nold\r\n"
    delivery = deliver(serve, app, data, mta)
    assert [header.raw for header in delivery.without_trace().headers] == [
        "From: ann",
        "X-Second: inserted",
        "Subject: new",
        "To: bob",
        "X-Scanned: clean",
    ]
    assert delivery.message.body == b"new\r\n"
    assert delivery.envelope == Envelope.of("list@mta.example", "bob@mta.example", "carl@mta.example")


def test_the_fewest_changes_are_sent_and_a_value_set_to_what_it_was_is_none(serve: Serve) -> None:
    app = Milter("test")

    @app.on_message
    def edit(ctx: EomContext, message: Message) -> None:
        message.headers["Subject"] = "test"
        message.sender = "<ann@client.example>"
        message.recipients.add("bob@mta.example")
        message.body = message.body
        message.headers["X-Scanned"] = "clean"

    client = serve(app).greeted()
    begin_message(client)
    client.header("Subject", " test")
    client.eoh()
    client.body(b"text\r\n")
    assert client.end_of_message().changes == (AddHeader("X-Scanned", " clean"),)


def test_many_and_large_changes_are_sent_whole(serve: Serve) -> None:
    app = Milter("test")
    body = bytes(range(256)) * 4096

    @app.on_message
    def edit(ctx: EomContext, message: Message) -> None:
        for number in range(200):
            message.headers.add(f"X-{number}", str(number) * 20)
        message.body = body

    delivery = deliver(serve, app, EXACT["plain"], Postfix)
    assert len(delivery.without_trace().headers) == 201
    # The MTA ends lines itself.
    assert delivery.message.body.replace(b"\r\n", b"\n") == body.replace(b"\r\n", b"\n") + b"\n"


@pytest.mark.parametrize("verdict", [Status.REJECT, Status.TEMPFAIL, Status.DISCARD, Reply(550, "5.7.1", "no")])
def test_no_edit_is_sent_unless_the_message_is_accepted(serve: Serve, verdict: Status | Reply) -> None:
    app = Milter("test")

    @app.on_message
    def edit(ctx: EomContext, message: Message) -> Status | Reply:
        message.headers["X-Scanned"] = "clean"
        message.body = b"new"
        return verdict

    client = serve(app).greeted()
    begin_message(client)
    assert send_content(client).events == ()


@pytest.mark.parametrize("verdict", [Status.CONTINUE, Status.ACCEPT, None])
def test_edits_are_sent_with_each_verdict_that_accepts(serve: Serve, verdict: Status | None) -> None:
    app = Milter("test")

    @app.on_message
    def edit(ctx: EomContext, message: Message) -> Status | None:
        message.headers["X-Scanned"] = "clean"
        return verdict

    client = serve(app).greeted()
    begin_message(client)
    assert send_content(client).changes == (AddHeader("X-Scanned", " clean"),)


def test_a_later_handler_sees_the_edits_of_an_earlier_one_and_may_refuse_them_all(serve: Serve) -> None:
    app = Milter("test")
    subjects: list[str] = []

    @app.on_message
    def edit(ctx: EomContext, message: Message) -> None:
        message.headers["Subject"] = "new"

    @app.on_message
    def refuse(ctx: EomContext, message: Message) -> Status:
        subjects.append(message.headers["Subject"])
        return Status.REJECT

    client = serve(app).greeted()
    begin_message(client)
    assert send_content(client).events == ()
    assert subjects == ["new"]


@pytest.mark.parametrize("policy", [Status.ACCEPT, Status.CONTINUE])
def test_edits_of_a_handler_that_raised_are_not_sent_even_if_the_policy_lets_the_message_pass(
    serve: Serve, policy: Status
) -> None:
    app = Milter("test", on_error=policy)

    @app.on_message
    def edit(ctx: EomContext, message: Message) -> None:
        message.headers["X-Scanned"] = "clean"
        raise RuntimeError("half done")

    client = serve(app).greeted()
    begin_message(client)
    end = send_content(client)
    assert end.events == ()
    assert not end.answer.rejects


@pytest.mark.parametrize("actions", [Actions.NONE, Actions.REPLACE_BODY])
def test_edits_that_the_mta_did_not_grant_are_an_error_before_any_is_sent(
    serve: Serve, actions: Actions, caplog: pytest.LogCaptureFixture
) -> None:
    app = Milter("test", actions=actions)

    @app.on_message
    def edit(ctx: EomContext, message: Message) -> None:
        message.body = b"new"
        message.headers["X-Scanned"] = "clean"

    client = serve(app).greeted()
    begin_message(client)
    end = send_content(client)
    assert end.events == ()
    assert end.answer.verdict is Verdict.TEMPFAIL
    assert "ADD_HEADER" in caplog.text
    assert "did not grant" in caplog.text


def test_an_mta_that_hangs_up_before_the_changes_is_no_trouble_for_the_next(serve: Serve) -> None:
    app = Milter("test")
    gone = threading.Event()
    aborted = []

    @app.on_message
    def edit(ctx: EomContext, message: Message) -> None:
        if message.headers["Subject"] == "first":
            assert gone.wait(10)
        message.body = b"x" * 1_000_000

    @app.on_close
    def close(ctx: Context) -> None:
        aborted.append(ctx.id)

    peer = serve(app)
    client = peer.greeted()
    begin_message(client)
    client.header("Subject", " first")
    client.eoh()
    client.send(Command.END_OF_MESSAGE)
    client.close()
    gone.set()
    assert send_exactly(peer.greeted(), EXACT["plain"]) is Verdict.CONTINUE
