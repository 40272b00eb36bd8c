# SPDX-License-Identifier: GPL-3.0-or-later
"""Progress by itself, while handlers take long at the end of a message. Handlers wait for what their MTA has seen."""

import asyncio
import math
import threading
import time
from typing import Any

import pytest

from milter import Context, EomContext, Message, Milter, Stage, Status
from milter._shim import lib
from milter.testing import Client, Verdict
from milter.watch import Watch
from tests.conftest import Serve, begin_message, send_message

LIMIT = 30.0
"""Seconds after which something hangs."""

OFTEN = 0.001
NEVER_HERE = 3600.0


def watch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "milter watch"]


def ask_at_end(client: Client, header: str = "test") -> Client:
    begin_message(client)
    client.header("Subject", header)
    client.eoh()
    client.send(b"E")
    return client


def await_progress(client: Client, packets: int) -> None:
    for _ in range(packets):
        assert client.receive().letter == b"p"


def next_change(client: Client) -> bytes:
    """The letter of the next packet that is no progress."""
    while (letter := client.receive().letter) == b"p":
        pass
    return letter


def rest(client: Client) -> list[bytes]:
    """The letters up to the verdict; more progress may have been on its way."""
    letters: list[bytes] = []
    while not letters or letters[-1] not in (b"c", b"a", b"r", b"t"):
        letters.append(next_change(client))
    return letters


class Waits:
    """Handlers that wait until somebody has seen enough, one in each style."""

    def __init__(self) -> None:
        self.seen = threading.Event()

    def plain(self, ctx: EomContext, *message: Message) -> Status:
        ctx.add_header("X-Before", "yes")
        assert self.seen.wait(LIMIT)
        ctx.add_header("X-After", "yes")
        return Status.ACCEPT

    async def coroutine(self, ctx: EomContext, *message: Message) -> Status:
        ctx.add_header("X-Before", "yes")
        assert await asyncio.to_thread(self.seen.wait, LIMIT)
        ctx.add_header("X-After", "yes")
        return Status.ACCEPT


@pytest.mark.parametrize("decorator", ["on_eom", "on_message"])
@pytest.mark.parametrize("style", ["plain", "coroutine"])
def test_progress_is_shown_again_and_again_while_handlers_work(serve: Serve, decorator: str, style: str) -> None:
    app = Milter("test", progress=OFTEN)
    waits = Waits()
    getattr(app, decorator)(getattr(waits, style))
    client = serve(app).greeted()
    for _ in range(3):
        waits.seen.clear()
        ask_at_end(client)
        assert next_change(client) == b"h"
        await_progress(client, 2)
        waits.seen.set()
        assert rest(client) == [b"h", b"a"]


def test_observers_of_earlier_stages_that_are_called_at_the_end_count_too(serve: Serve) -> None:
    app = Milter("test", progress=OFTEN)
    seen = threading.Event()

    @app.on_header
    def observe(ctx: Context, name: str, value: str) -> None:
        assert seen.wait(LIMIT)

    client = ask_at_end(serve(app).greeted())
    await_progress(client, 2)
    seen.set()
    assert rest(client) == [b"c"]


def test_no_progress_interrupts_a_new_body(serve: Serve) -> None:
    """The thread that sends progress has come by, since another message has got some."""
    app = Milter("test", progress=OFTEN)
    begun, seen = threading.Event(), threading.Event()

    @app.on_message
    def rewrite(ctx: EomContext, message: Message) -> Status:
        if message.headers["Subject"] == "other":
            assert seen.wait(LIMIT)
            return Status.CONTINUE
        ctx.append_body_chunk(b"new ")
        begun.set()
        assert seen.wait(LIMIT)
        ctx.append_body_chunk(b"body\r\n")
        return Status.CONTINUE

    peer = serve(app)
    rewriting = ask_at_end(peer.greeted())
    assert begun.wait(LIMIT)
    other = ask_at_end(peer.greeted(), "other")
    await_progress(other, 5)
    seen.set()
    letters: list[bytes] = []
    while b"c" not in letters:
        letters.append(rewriting.receive().letter)
    first = letters.index(b"b")
    assert letters[first:] == [b"b", b"b", b"c"]
    assert rest(other) == [b"c"]


def test_a_short_handler_shows_none(serve: Serve) -> None:
    app = Milter("test", progress=NEVER_HERE)
    app.on_eom(lambda ctx: Status.ACCEPT)
    peer = serve(app)
    end = send_message(peer.greeted())
    assert end.changes == ()
    assert end.events == ()
    assert end.answer.verdict is Verdict.ACCEPT
    assert peer.server.engine.watch.running == {}


@pytest.mark.parametrize("progress", [None, 0, 0.0])
def test_it_can_be_turned_off(progress: float | None) -> None:
    watch = Watch(progress, tell_nobody)
    call = Offered(watch, 10)
    watch.running.update({call: 1000.0})  # type: ignore[dict-item]
    watch._look(1000000.0)
    assert call.offers == 0


def test_the_thread_ends_with_the_server(serve: Serve) -> None:
    app = Milter("test")
    app.on_eom(lambda ctx: Status.ACCEPT)
    for _ in range(3):
        peer = serve(app)
        assert len(watch_threads()) == 1
        peer.server.stop()
        assert watch_threads() == []


@pytest.mark.parametrize("seconds", [-1, float("nan"), float("inf")])
def test_the_interval_is_a_number_of_seconds(seconds: float) -> None:
    with pytest.raises(ValueError, match="progress must be a number of seconds, or None for never"):
        Milter("test", progress=seconds)


# ---- MTAs that misbehave


def two_that_wait(app: Milter[Any, Any], seen: threading.Event) -> None:
    @app.on_message
    def wait(ctx: EomContext, message: Message) -> Status:
        if message.headers["Subject"] == "large":
            ctx.replace_body(bytes(1 << 24))
        assert seen.wait(LIMIT)
        return Status.CONTINUE


def test_an_mta_that_does_not_read_its_new_body_holds_up_nobody(serve: Serve) -> None:
    app = Milter("test", progress=OFTEN)
    seen = threading.Event()
    two_that_wait(app, seen)
    peer = serve(app)
    stuck = ask_at_end(peer.greeted(), "large")
    assert next_change(stuck) == b"b"  # and no more: its handler waits under the lock of its session
    other = ask_at_end(peer.greeted())
    await_progress(other, 20)
    seen.set()
    assert rest(other) == [b"c"]
    stuck.close()


@pytest.mark.skipif(not lib.milter_io_wrapped(), reason="libmilter waits for the peer when it writes")
def test_an_mta_that_does_not_read_its_progress_holds_up_nobody(serve: Serve) -> None:
    """A socket takes some hundred of these packets. Once they are read, it gets more."""
    app = Milter("test", progress=OFTEN / 10)
    seen = threading.Event()
    two_that_wait(app, seen)
    peer = serve(app)
    stuck = ask_at_end(peer.greeted())
    other = ask_at_end(peer.greeted())
    await_progress(other, 2000)
    await_progress(stuck, 2000)
    seen.set()
    assert rest(other) == [b"c"]
    assert rest(stuck) == [b"c"]


def test_an_mta_that_is_gone_is_not_tried_again(serve: Serve) -> None:
    app = Milter("test", progress=OFTEN)
    seen = threading.Event()
    two_that_wait(app, seen)
    peer = serve(app)
    gone = ask_at_end(peer.greeted())
    await_progress(gone, 1)
    gone.close()
    peer.forget(gone)
    other = ask_at_end(peer.greeted())
    await_progress(other, 5)
    shown = peer.server.engine.watch._shown
    assert sorted(math.isinf(since) for since in shown.values()) == [False, True]
    seen.set()
    assert rest(other) == [b"c"]


# ---- The thread's table


def test_a_call_that_has_returned_takes_no_progress(serve: Serve) -> None:
    app = Milter("test", progress=NEVER_HERE)
    calls: list[Any] = []

    @app.on_eom
    def keep(ctx: EomContext) -> Status:
        calls.append(ctx._call)
        assert ctx._call.offer_progress()
        return Status.ACCEPT

    client = serve(app).greeted()
    end = send_message(client)
    assert len(end.events) == 1
    assert not calls[0].offer_progress()
    assert send_message(client).answer.verdict is Verdict.ACCEPT


class Offered:
    """Counts what it is offered, and leaves the table after some, as a call that returns at that moment."""

    stage = Stage.EOM
    late = False

    def __init__(self, watch: Watch, most: int) -> None:
        watch.running.update({self: time.monotonic()})  # type: ignore[dict-item]
        self._watch = watch
        self._most = most
        self.offers = 0
        self.enough = threading.Event()

    def offer_progress(self) -> bool:
        self.offers += 1
        if self.offers == self._most:
            self._watch.running.pop(self)  # type: ignore[call-overload]
            self.enough.set()
        return True


def tell_nobody(call: object, began: float) -> None: ...


def test_a_call_that_ends_while_it_is_served_does_not_come_back() -> None:
    watch = Watch(OFTEN, tell_nobody)
    calls = [Offered(watch, most) for most in (1, 5, 20)]
    watch.start()
    assert all(call.enough.wait(LIMIT) for call in calls)
    watch.stop()
    assert [call.offers for call in calls] == [1, 5, 20]
    assert watch.running == {}


def test_a_look_serves_who_is_due_and_nobody_else() -> None:
    watch = Watch(100.0, tell_nobody)
    early, late = Offered(watch, 10), Offered(watch, 10)
    watch.running.update({early: 1000.0, late: 1050.0})  # type: ignore[dict-item]
    watch._look(1050.0)
    assert (early.offers, late.offers) == (0, 0)
    watch._look(1100.0)
    assert (early.offers, late.offers) == (1, 0)
    watch._look(1150.0)
    assert (early.offers, late.offers) == (1, 1)
    watch._look(1240.0)
    assert (early.offers, late.offers) == (2, 2)
