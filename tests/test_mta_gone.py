# SPDX-License-Identifier: GPL-3.0-or-later
"""An MTA that closes its connection while a handler runs: the answer has no reader, so the handler need not go on."""

import asyncio
import itertools
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from milter import Context, ContextError, EomContext, Message, Milter, Status, loop
from milter.testing import Client, Verdict
from tests.conftest import Peer, Serve, begin_message, send_message

LIMIT = 30.0
"""Seconds after which something hangs."""

COMMANDS = {
    "connect": b"Cclient.example\x004\x00\x00192.0.2.1\0",
    "helo": b"Hclient.example\0",
    "mail": b"M<ann@client.example>\0",
    "rcpt": b"R<bob@mta.example>\0",
    "data": b"T",
    "header": b"LSubject\0test\0",
    "eoh": b"N",
    "body": b"Btext\r\n",
    "eom": b"E",
}
"""What a client says, in order."""


def send_up_to(client: Client, stage: str) -> None:
    """What comes before this is answered, where there is an answer."""
    client.negotiate()
    before: dict[str, Callable[[], Any]] = {
        "connect": client.connect_info,
        "helo": client.helo,
        "mail": lambda: client.mail("<ann@client.example>"),
        "rcpt": lambda: client.rcpt("<bob@mta.example>"),
        "data": client.data,
        "header": lambda: client.header("Subject", "test"),
        "eoh": client.eoh,
        "body": lambda: client.body(b"text\r\n"),
    }
    for name in itertools.takewhile(lambda name: name != stage, before):
        before[name]()
    command = COMMANDS[stage]
    client.send(command[:1], command[1:])
    if stage == "header":  # which is answered at its end
        client.send(b"N")


class Waits:
    """A coroutine that waits until somebody ends it."""

    def __init__(self) -> None:
        self.begun, self.cancelled, self.go_on = threading.Event(), threading.Event(), threading.Event()
        self.looks = threading.Semaphore(0)

    def let_it_be_looked_after(self) -> None:
        """While it waits."""
        assert self.begun.wait(LIMIT)
        while self.looks.acquire(blocking=False):
            pass
        for _ in range(5):
            assert self.looks.acquire(timeout=LIMIT)

    async def handler(self, *arguments: Any) -> Status:
        self.begun.set()
        try:
            await asyncio.to_thread(self.go_on.wait, LIMIT)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return Status.CONTINUE


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[Waits]:
    """Looked after without a pause."""
    waits = Waits()
    wait = loop._Job.wait

    def counted(job: Any, seconds: float) -> bool:
        waits.looks.release()
        return wait(job, seconds)

    monkeypatch.setattr(loop, "_LOOK", 0.01)
    monkeypatch.setattr(loop._Job, "wait", counted)
    yield waits
    waits.go_on.set()


def go(peer: Peer, client: Client) -> None:
    peer.forget(client)
    client.close()


@pytest.mark.parametrize("stage", COMMANDS)
def test_a_coroutine_is_cancelled_when_its_mta_is_gone(
    serve: Serve, waits: Waits, caplog: pytest.LogCaptureFixture, stage: str
) -> None:
    caplog.set_level(logging.INFO)
    app = Milter("test", on_error="shutdown")
    closed = threading.Event()
    for before in COMMANDS:
        getattr(app, f"on_{before}")(waits.handler if before == stage else lambda *arguments: Status.CONTINUE)
    app.on_close(lambda ctx: closed.set())
    peer = serve(app)
    client = peer.client()
    send_up_to(client, stage)
    assert waits.begun.wait(LIMIT)
    go(peer, client)
    assert waits.cancelled.wait(LIMIT)
    assert closed.wait(LIMIT)
    line = next(record.getMessage() for record in caplog.records if "was cancelled" in record.getMessage())
    assert line.startswith(
        f"Waits.handler was cancelled, since the MTA has closed its connection, in on_{stage} (client "
    )
    assert [record for record in caplog.records if record.levelno > logging.INFO] == [], "it is no failure"
    assert not peer.server.asked_to_stop


def test_commands_that_it_sent_before_do_not_hide_it(serve: Serve, waits: Waits) -> None:
    app = Milter("test")
    app.on_rcpt(waits.handler)
    peer = serve(app)
    client = peer.client()
    send_up_to(client, "rcpt")
    assert waits.begun.wait(LIMIT)
    client.send(b"A")
    client.send(b"Q")
    go(peer, client)
    assert waits.cancelled.wait(LIMIT)


def test_an_mta_that_says_more_without_waiting_still_waits(serve: Serve, waits: Waits) -> None:
    app = Milter("test")
    app.on_rcpt(waits.handler)
    client = serve(app).client()
    send_up_to(client, "rcpt")
    client.send(b"A")
    waits.let_it_be_looked_after()
    waits.go_on.set()
    assert client.receive().letter == b"c"
    begin_message(client)
    assert not waits.cancelled.is_set()


@pytest.mark.parametrize("stage", ["abort", "close"])
def test_what_runs_at_the_end_of_a_connection_runs_to_its_end(serve: Serve, waits: Waits, stage: str) -> None:
    """The MTA waits for none of these, and often is gone."""
    app = Milter("test")
    ended = threading.Event()

    async def clean_up(ctx: Context) -> None:
        await waits.handler()
        ended.set()

    getattr(app, f"on_{stage}")(clean_up)
    peer = serve(app)
    client = peer.greeted()
    begin_message(client)
    client.abort()
    assert stage == "close" or waits.begun.wait(LIMIT)
    go(peer, client)
    waits.let_it_be_looked_after()
    waits.go_on.set()
    assert ended.wait(LIMIT)


@pytest.mark.parametrize("stage", ["rcpt", "header"])
def test_what_only_observes_runs_to_its_end(serve: Serve, waits: Waits, stage: str) -> None:
    app = Milter("test")
    ended = threading.Event()

    async def observe(*arguments: Any) -> None:
        await waits.handler()
        ended.set()

    getattr(app, f"on_{stage}")(observe)
    peer = serve(app)
    client = peer.greeted()
    begin_message(client)
    client.header("Subject", "test")
    client.abort()
    assert waits.begun.wait(LIMIT)
    go(peer, client)
    waits.let_it_be_looked_after()
    waits.go_on.set()
    assert ended.wait(LIMIT)


def test_one_that_fails_on_its_way_out_is_told_with_its_traceback(
    serve: Serve, waits: Waits, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    app = Milter("test")
    closed = threading.Event()

    @app.on_message
    async def scan(ctx: EomContext, message: Message) -> Status:
        try:
            return await waits.handler()
        finally:
            raise ZeroDivisionError("on its way out")

    app.on_close(lambda ctx: closed.set())
    peer = serve(app)
    client = peer.client()
    send_up_to(client, "eom")
    assert waits.begun.wait(LIMIT)
    go(peer, client)
    assert closed.wait(LIMIT)
    assert "scan was cancelled, since the MTA has closed its connection, in on_eom" in caplog.text
    assert "ZeroDivisionError: on its way out" in caplog.text


def test_one_that_does_not_end_is_left_behind(
    serve: Serve, waits: Waits, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(loop, "_GRACE", 0.01)
    app = Milter("test")
    closed = threading.Event()

    @app.on_eom
    async def stay(ctx: EomContext) -> Status:
        while not waits.go_on.is_set():
            try:
                await waits.handler()
            except asyncio.CancelledError:
                continue
        return Status.ACCEPT

    app.on_close(lambda ctx: closed.set())
    peer = serve(app)
    client = peer.client()
    send_up_to(client, "eom")
    assert waits.begun.wait(LIMIT)
    go(peer, client)
    assert closed.wait(LIMIT)
    assert "since the MTA has closed its connection, and did not end by that" in caplog.text
    waits.go_on.set()
    assert send_message(peer.greeted()).answer.verdict is Verdict.ACCEPT


@pytest.mark.parametrize("stage", ["helo", "rcpt", "header", "eom"])
def test_a_plain_function_can_ask(serve: Serve, stage: str) -> None:
    app = Milter("test")
    begun, answers = threading.Event(), []
    ended = threading.Event()

    def work(ctx: Context, *arguments: Any) -> Status:
        answers.append(ctx.connected)
        begun.set()
        while ctx.connected:
            pass
        answers.append(ctx.connected)
        ended.set()
        return Status.CONTINUE

    getattr(app, f"on_{stage}")(work)
    peer = serve(app)
    client = peer.client()
    send_up_to(client, stage)
    assert begun.wait(LIMIT)
    go(peer, client)
    assert ended.wait(LIMIT)
    assert answers == [True, False]


def test_a_context_that_was_kept_too_long_cannot_be_asked(serve: Serve) -> None:
    app = Milter("test")
    kept: list[Any] = []

    @app.on_eom
    def keep(ctx: EomContext) -> Status:
        kept.extend([ctx, ctx._call])
        return Status.ACCEPT

    send_message(serve(app).greeted())
    with pytest.raises(ContextError):
        print(kept[0].connected)
    with pytest.raises(ContextError, match="came too late"):
        kept[1].mta_is_gone()
