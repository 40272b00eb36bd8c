# SPDX-License-Identifier: GPL-3.0-or-later
"""Which thread serves which session (shim/scheduler.c): nothing that one of them waits for holds the others up.

That an event is served once, and by one thread at a time, is told by tests/stress.
"""

import asyncio
import os
import socket
import stat
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from milter import Context, EomContext, Message, Milter, Params, Status
from milter._shim import ffi, lib
from milter.testing import Client, Verdict
from milter.testing.client import PeerClosed
from milter.testing.wire import Packet, join_strings
from tests.conftest import Peer, Serve, begin_message, send_content, send_message
from tests.filter_process import RunFilter, running_filters

LIMIT = 30.0
"""Seconds after which something hangs."""

scheduled = pytest.mark.skipif(
    not lib.milter_io_wrapped(),
    reason="libmilter's own workers: several sessions are promised to one, and few looks at who is silent",
)


@pytest.fixture
def run_filter() -> Iterator[RunFilter]:
    with running_filters() as run:
        yield run


class Progress:
    """Messages that were done."""

    def __init__(self) -> None:
        self._done = 0
        self._changed = threading.Condition()

    def note(self) -> None:
        with self._changed:
            self._done += 1
            self._changed.notify_all()

    def wait_for(self, more: int) -> bool:
        with self._changed:
            wanted = self._done + more
            return self._changed.wait_for(lambda: self._done >= wanted, LIMIT)


def asks_at_the_end(peer: Peer, sender: str) -> Client:
    """A client that has sent the end of a message, and waits for its answer."""
    client = peer.greeted()
    client.mail(sender)
    client.rcpt("<bob@mta.example>")
    client.data()
    client.send(b"E")
    return client


def test_a_handler_that_waits_holds_nobody_up(serve: Serve) -> None:
    """Some wait until others have got on, again and again, and in the middle of their traffic."""
    app = Milter("test")
    progress = Progress()
    over = threading.Event()

    @app.on_rcpt
    def check(ctx: Context, recipient: str, params: Params) -> Status:
        if recipient == "slow@mta.example" and not progress.wait_for(20):
            return Status.REJECT
        return Status.CONTINUE

    @app.on_message
    def read(ctx: EomContext, message: Message) -> None:
        assert message.body == b"text\r\n"

    def wait_often(client: Client) -> list[Verdict]:
        client.mail("<ann@client.example>")
        answers = [answer.verdict for _ in range(20) if (answer := client.rcpt("<slow@mta.example>")) is not None]
        client.abort()
        return answers

    def keep_busy(client: Client) -> None:
        while not over.is_set():
            assert send_message(client).answer.verdict is Verdict.CONTINUE
            progress.note()

    peer = serve(app)
    with ThreadPoolExecutor(6) as pool:
        try:
            busy = [pool.submit(keep_busy, peer.greeted()) for _ in range(4)]
            waiting = [pool.submit(wait_often, peer.greeted()) for _ in range(2)]
            assert [answer for future in waiting for answer in future.result()] == [Verdict.CONTINUE] * 40
        finally:
            over.set()
        for future in busy:
            future.result()


@scheduled
@pytest.mark.parametrize("sessions", [2, 5])
def test_who_was_served_waits_for_nobody(serve: Serve, sessions: int) -> None:
    """Each message waits for the same one of all other sessions, so none of these may wait for it."""
    app = Milter("test")
    meeting = threading.Barrier(sessions, timeout=LIMIT)

    @app.on_message
    def meet(ctx: EomContext, message: Message) -> None:
        meeting.wait()

    def send_many(client: Client) -> list[Verdict]:
        verdicts = []
        for _ in range(100):
            begin_message(client)
            verdicts.append(send_content(client).answer.verdict)
        return verdicts

    peer = serve(app)
    with ThreadPoolExecutor(sessions) as pool:
        for verdicts in pool.map(send_many, [peer.greeted() for _ in range(sessions)]):
            assert verdicts == [Verdict.CONTINUE] * 100


# ---- Handlers that wait, or compute


def greeted_at_end(client: Client) -> Client:
    """Its message is sent; the answer to its end has not been read."""
    begin_message(client)
    client.send(b"E")
    return client


@scheduled
@pytest.mark.parametrize("kind", ["functions", "coroutines"])
def test_two_hundred_handlers_wait_at_once(serve: Serve, kind: str) -> None:
    """For one event, which is set when all of them are there."""
    sessions = 200
    app = Milter("test")
    meeting = threading.Barrier(sessions, timeout=LIMIT)
    there: list[int] = []
    all_there = asyncio.Event()

    def meet(ctx: EomContext) -> None:
        meeting.wait()

    async def wait(ctx: EomContext) -> None:
        there.append(ctx.id)
        if len(there) == sessions:
            all_there.set()
        await all_there.wait()

    app.on_eom(meet if kind == "functions" else wait)
    peer = serve(app, backlog=sessions)
    clients = [greeted_at_end(peer.greeted()) for _ in range(sessions)]
    assert {client.receive().letter for client in clients} == {b"c"}


def test_a_handler_that_computes_keeps_nobody_waiting(serve: Serve) -> None:
    """It ends only when another client has had its whole conversation."""
    app = Milter("test")
    computing, over = threading.Event(), threading.Event()

    @app.on_eom
    def compute(ctx: EomContext) -> Status:
        if ctx.sender != "busy@client.example":
            return Status.CONTINUE
        computing.set()
        end = time.monotonic() + LIMIT
        while not over.is_set():
            if time.monotonic() > end:
                return Status.REJECT
        return Status.CONTINUE

    peer = serve(app)
    busy = asks_at_the_end(peer, "<busy@client.example>")
    assert computing.wait(LIMIT)
    with peer.client() as other:
        other.negotiate()
        other.connect_info()
        other.helo()
        assert send_message(other).answer.verdict is Verdict.CONTINUE
        peer.forget(other)
    over.set()
    assert busy.receive().letter == b"c"


# ---- MTAs that stop in the middle, or do not read


def test_half_a_packet_keeps_nobody_waiting(serve: Serve) -> None:
    app = Milter("test")
    app.on_mail(lambda ctx, sender, params: Status.CONTINUE)
    peer = serve(app)
    packet = Packet(b"M", join_strings("<ann@client.example>")).encode()
    slow = [(peer.greeted(), cut) for cut in range(1, len(packet))]
    for client, cut in slow:
        client._socket.sendall(packet[:cut])
    assert send_message(peer.greeted()).answer.verdict is Verdict.CONTINUE
    for client, cut in slow:
        client._socket.sendall(packet[cut:])
        assert client.receive().letter == b"c"


def test_an_mta_that_does_not_read_keeps_nobody_waiting(serve: Serve) -> None:
    """More answers than its socket holds, which are complete when it reads them at last."""
    app = Milter("test")
    body = bytes(range(1, 128)) * 64 * 1024

    @app.on_eom
    def replace(ctx: EomContext) -> None:
        if ctx.sender == "slow@client.example":
            ctx.replace_body(body)

    peer = serve(app)
    slow = [peer.greeted() for _ in range(8)]
    for client in slow:
        client.mail("<slow@client.example>")
        client.rcpt("<bob@mta.example>")
        client.data()
        client.send(b"E")
        client._socket.recv(1, socket.MSG_PEEK)
    for _ in range(20):
        assert send_message(peer.greeted()).answer.verdict is Verdict.CONTINUE
    for client in slow:
        received = b""
        while (answer := client.receive()).letter == b"b":
            received += answer.data
        assert answer.letter == b"c"
        assert received == body


@scheduled
def test_an_action_that_waits_for_its_mta_keeps_nobody_else_waiting(serve: Serve) -> None:
    """One of another thread, which the handler leaves behind: its session waits for it, and no other one."""
    app = Milter("test")
    left = threading.Event()
    threads: list[threading.Thread] = []

    buffer = ffi.new("char[]", 256)

    @app.on_eom
    def leave_behind(ctx: EomContext) -> None:
        if ctx.sender != "slow@client.example":
            return
        session, token = ctx._call._session, ctx._call._token  # type: ignore[attr-defined]
        while lib.milter_offer_progress(session, token) == lib.MILTER_OK:
            pass  # until the MTA must read
        threads.append(threading.Thread(target=lib.milter_progress, args=(session, token)))
        threads[0].start()
        while lib.milter_try_macro(session, token, b"i", buffer, len(buffer)) != lib.MILTER_BUSY:
            pass  # until the action is under way
        left.set()

    peer = serve(app)
    slow = asks_at_the_end(peer, "<slow@client.example>")
    assert left.wait(LIMIT)
    for _ in range(20):
        assert send_message(peer.greeted()).answer.verdict is Verdict.CONTINUE
    while (answer := slow.receive()).letter == b"p":
        pass
    assert answer.letter == b"c"
    threads[0].join(LIMIT)


# ---- MTAs that fall silent


@scheduled
def test_silent_mtas_are_given_up_and_their_handlers_hear_of_it(run_filter: RunFilter) -> None:
    """After any packet, in the middle of one, and in the middle of a message."""
    process = run_filter("tests/filters/silence.py", "inet:0@127.0.0.1")
    mail = Packet(b"M", join_strings("<ann@client.example>")).encode()
    silent = {"greeted": b"", "head": mail[:3], "middle": mail[:10], "message": mail, "next": mail + b"\0"}
    clients = []
    for name, sent in silent.items():
        client = Client.connect(process.socket, LIMIT)
        client.negotiate()
        client.connect_info()
        client.helo(name)
        client._socket.sendall(sent)
        clients.append(client)
    for client in clients:
        client.wait_for_close()
        client.close()
    process.stop()
    closed = sorted(line for line in process.stdout.lines if line.startswith("close"))
    assert closed == sorted(f"close {name}" for name in silent)
    assert sorted(line for line in process.stdout.lines if line.startswith("abort")) == ["abort message", "abort next"]


# ---- Descriptors that are closed behind the library's back


def accepted(path: str) -> list[int]:
    """Descriptors of connections to this Unix socket, on its side."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            if not stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                continue
            with socket.socket(fileno=os.dup(int(name))) as copy:
                if copy.getsockname() == path and not copy.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                    found.append(int(name))
        except OSError:  # the listing's own
            continue
    return found


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="descriptors are found in /proc")
def test_a_connection_that_a_handler_closes_ends_its_session_and_no_other(serve: Serve, tmp_path: Path) -> None:
    app = Milter("test")
    ended: list[str] = []

    @app.on_mail
    def close(ctx: Context, sender: str, params: Params) -> Status:
        if sender == "closed@client.example":
            (descriptor,) = accepted(f"{tmp_path}/filter.sock")
            with open(os.devnull, "rb") as other:
                os.dup2(other.fileno(), descriptor)  # as if it were closed, and opened for something else
        return Status.CONTINUE

    @app.on_close
    def hear(ctx: Context) -> None:
        ended.append(ctx.helo or "")

    peer = serve(app)
    client = peer.greeted()
    with pytest.raises(PeerClosed):
        client.mail("<closed@client.example>")
    for _ in range(20):
        assert send_message(peer.greeted()).answer.verdict is Verdict.CONTINUE
    peer.hang_up()
    peer.server.stop()
    assert len(ended) == 21
