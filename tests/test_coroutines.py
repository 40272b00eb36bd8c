# SPDX-License-Identifier: GPL-3.0-or-later
"""Handlers and hooks that are ``async def``: on one event loop, many at once, and never answered by accident."""

import asyncio
import contextlib
import gc
import inspect
import logging
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from milter import (
    Address,
    Context,
    ContextError,
    EomContext,
    HandlerError,
    Message,
    Milter,
    Params,
    Status,
    loop,
    server,
    stalls,
)
from milter._shim import lib
from milter.context import Conversation
from milter.coroutines import MtaGone
from milter.loop import EventLoop
from milter.testing import AddHeader, Client, Verdict
from tests.conftest import Serve, begin_message, collect, send_content, send_message
from tests.filter_process import RunFilter, running_filters
from tests.test_errors import REPLYING_STAGES, answered_at, drive, last

LIMIT = 30.0
"""Seconds after which something hangs."""

ENDS = [SystemExit, KeyboardInterrupt, GeneratorExit, asyncio.CancelledError, RuntimeError]


def loop_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "milter event loop"]


def ask_loop(
    running: EventLoop, coroutine: Coroutine[Any, Any, Any], mta_is_gone: Callable[[], bool] = lambda: False
) -> Any:
    """As a handler of some message."""
    return running.answer(coroutine, "the coroutine", Conversation(1, None, None), mta_is_gone)


@pytest.fixture
def run_filter() -> Iterator[RunFilter]:
    with running_filters() as run:
        yield run


@pytest.fixture
def cancelled_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stop does not wait for handlers that only end by being cancelled. Those that then end have time for it."""
    monkeypatch.setattr(server, "_LAST_WAIT", 0.01)
    monkeypatch.setattr(loop, "_GRACE", LIMIT)
    monkeypatch.setattr(loop, "_WAY_BACK", LIMIT)


@pytest.fixture
def left_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A coroutine that does not end by being cancelled is not waited for."""
    monkeypatch.setattr(loop, "_GRACE", 0.01)


def greeted_at_end(client: Client) -> Client:
    """Up to the end of a message, whose answer is to come."""
    begin_message(client)
    client.header("Subject", "test")
    client.eoh()
    client.send(b"E")
    return client


# ---- Handlers


@pytest.mark.parametrize("stage", REPLYING_STAGES)
def test_a_coroutine_decides_at_each_stage(serve: Serve, stage: str) -> None:
    app = Milter("test")
    arguments: list[tuple[Any, ...]] = []

    async def refuse(*given: Any) -> Status:
        await asyncio.sleep(0)
        arguments.append(given[1:])
        return Status.REJECT

    getattr(app, f"on_{stage}")(refuse)
    client = serve(app).client()
    client.negotiate()
    assert last(drive(client)) == (answered_at(stage), Verdict.REJECT)
    expected: dict[str, tuple[Any, ...]] = {
        "helo": ("client.example",),
        "mail": ("ann", {}),
        "rcpt": ("bob", {}),
        "header": ("Subject", "test"),
        "body": (b"text\r\n",),
        "unknown": ("FOO",),
    }
    assert stage == "connect" or arguments == [expected.get(stage, ())]


def test_coroutines_observe_in_their_order(serve: Serve) -> None:
    app = Milter("test")
    seen: list[str] = []

    def observer(stage: str) -> Callable[..., Awaitable[None]]:
        async def observe(*arguments: Any) -> None:
            await asyncio.sleep(0)
            seen.append(stage)

        return observe

    stages = ["connect", "helo", "mail", "rcpt", "data", "header", "eoh", "body", "eom", "abort", "close"]
    for stage in stages:
        getattr(app, f"on_{stage}")(observer(stage))
    client = serve(app).greeted()
    assert send_message(client).answer.verdict is Verdict.CONTINUE
    client.mail("<ann@client.example>")
    client.abort()
    client.quit()
    client.wait_for_close()
    assert seen == [*stages[:9], "mail", "abort", "close"]


class Filter:
    async def method(self, ctx: Context, name: str) -> Status:
        return await self(ctx, name)

    async def __call__(self, ctx: Context, name: str) -> Status:
        await asyncio.sleep(0)
        return Status.REJECT if name == "bad.example" else Status.CONTINUE


@pytest.mark.parametrize("as_handler", [lambda it: it, lambda it: it.method], ids=["object", "method"])
def test_what_is_called_may_be_an_object_or_its_method(serve: Serve, as_handler: Callable[[Filter], Any]) -> None:
    app = Milter("test")
    app.on_helo(as_handler(Filter()))
    client = serve(app).client()
    client.negotiate()
    client.connect_info()
    answers = [client.helo(name) for name in ("good.example", "bad.example")]
    assert [answer.verdict for answer in answers if answer is not None] == [Verdict.CONTINUE, Verdict.REJECT]


def test_coroutines_share_a_thread_and_plain_functions_stay_on_their_own(serve: Serve) -> None:
    app = Milter("test")
    threads: list[threading.Thread] = []

    @app.on_mail
    async def first(ctx: Context, sender: Address, params: Params) -> Status:
        threads.append(threading.current_thread())
        return Status.CONTINUE

    @app.on_mail
    def between(ctx: Context, sender: Address, params: Params) -> Status:
        threads.append(threading.current_thread())
        return Status.CONTINUE

    @app.on_mail
    async def decides(ctx: Context, sender: Address, params: Params) -> Status:
        threads.append(threading.current_thread())
        return Status.REJECT

    @app.on_mail
    def never(ctx: Context, sender: Address, params: Params) -> Status:
        raise AssertionError("the message is decided")

    client = serve(app).greeted()
    answer = client.mail("<ann@client.example>")
    assert answer is not None
    assert answer.verdict is Verdict.REJECT
    assert threads[0] is threads[2] is loop_threads()[0]
    assert threads[1] is not threads[0]


def test_a_coroutine_reads_and_changes_the_message(serve: Serve) -> None:
    app = Milter("test")

    @app.on_message
    async def edit(ctx: EomContext, message: Message) -> Status:
        await asyncio.sleep(0)
        assert message.body == b"text\r\n"
        ctx.add_header("X-Context", "yes")
        message.headers["X-Message"] = "yes"
        await asyncio.to_thread(ctx.replace_body, b"new\r\n")
        return Status.CONTINUE

    end = send_message(serve(app).greeted())
    assert [change.name for change in end.changes if isinstance(change, AddHeader)] == ["X-Context", "X-Message"]
    assert len(end.changes) == 3
    assert end.answer.verdict is Verdict.CONTINUE


def test_a_context_expires_with_its_coroutine(serve: Serve) -> None:
    app = Milter("test")
    later: list[asyncio.Task[str | None]] = []
    over = asyncio.Event()

    async def look(ctx: Context) -> str | None:
        await over.wait()
        return ctx.hostname

    @app.on_helo
    async def helo(ctx: Context, name: str) -> Status:
        later.append(asyncio.create_task(look(ctx)))
        return Status.CONTINUE

    @app.on_mail
    async def mail(ctx: Context, sender: Address, params: Params) -> Status:
        over.set()
        with pytest.raises(ContextError):
            await later[0]
        return Status.ACCEPT

    answer = serve(app).greeted().mail("<ann@client.example>")
    assert answer is not None
    assert answer.verdict is Verdict.ACCEPT


def test_nothing_is_left_of_a_call_for_the_garbage_collector(serve: Serve) -> None:
    app = Milter("test", handler_timeout=LIMIT)
    states: list[weakref.ref[Any]] = []

    class State:
        pass

    app.new_transaction = State

    @app.on_message
    async def read(ctx: EomContext, message: Message) -> Status:
        states.append(weakref.ref(ctx.transaction))
        await asyncio.sleep(0)
        return Status.CONTINUE

    client = serve(app).greeted()
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            assert send_message(client).answer.verdict is Verdict.CONTINUE
        # The last one's may still be on its way out.
        assert [state() for state in states[:2]] == [None, None]
    finally:
        gc.enable()


@pytest.mark.parametrize("why", ["it fails", "it takes too long", "the MTA is gone"])
def test_nothing_is_left_of_a_failure_for_the_garbage_collector(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Witness:
        pass

    monkeypatch.setattr(loop, "_LOOK", 0.01)
    witnesses: list[weakref.ref[Witness]] = []
    begun = threading.Event()

    async def fail() -> None:
        witness = Witness()
        witnesses.append(weakref.ref(witness))
        begun.set()
        if why != "it fails":
            await asyncio.Event().wait()
        raise RuntimeError

    running = EventLoop(0.01 if why == "it takes too long" else None)
    gc.collect()
    gc.disable()
    try:
        with contextlib.suppress(RuntimeError, TimeoutError, MtaGone):
            ask_loop(running, fail(), lambda: begun.wait(LIMIT) and why == "the MTA is gone")
        running.stop()
        assert witnesses[0]() is None
    finally:
        gc.enable()


# ---- Failures


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("waits_first", [False, True])
def test_whatever_a_coroutine_raises_fails_its_message_and_no_other(
    serve: Serve, end: type[BaseException], waits_first: bool, caplog: pytest.LogCaptureFixture
) -> None:
    app = Milter("test")
    ends = [end]

    @app.on_eom
    async def fails_once(ctx: EomContext) -> Status:
        if waits_first:
            await asyncio.sleep(0)
        if ends:
            raise ends.pop()
        return Status.CONTINUE

    client = serve(app).greeted()
    assert send_message(client).answer.verdict is Verdict.TEMPFAIL
    assert "fails_once failed in on_eom" in caplog.text
    assert end.__name__ in caplog.text
    assert send_message(client).answer.verdict is Verdict.CONTINUE


def test_a_coroutine_that_cancels_itself_is_no_verdict(serve: Serve) -> None:
    app = Milter("test")

    @app.on_eom
    async def cancels_itself(ctx: EomContext) -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await asyncio.sleep(0)

    assert send_message(serve(app).greeted()).answer.verdict is Verdict.TEMPFAIL


def test_a_plain_function_that_returns_an_awaitable_is_told_what_it_is(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    app = Milter("test")

    async def later() -> Status:
        return Status.CONTINUE

    returned = later()
    app.on_mail(lambda ctx, sender, params: returned)
    answer = serve(app).greeted().mail("<ann@client.example>")
    assert answer is not None
    assert answer.verdict is Verdict.TEMPFAIL
    assert "is a plain function and returned <coroutine object" in caplog.text
    assert inspect.getcoroutinestate(returned) == inspect.CORO_CLOSED, "or Python complains that nobody awaited it"


def test_a_background_task_that_wants_to_end_the_program_ends_itself(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    app = Milter("test")
    background: list[asyncio.Task[None]] = []

    async def leave() -> None:
        raise SystemExit

    @app.on_helo
    async def helo(ctx: Context, name: str) -> Status:
        background.append(asyncio.create_task(leave()))
        return Status.CONTINUE

    @app.on_eom
    async def eom(ctx: EomContext) -> Status:
        await asyncio.wait(background)
        return Status.CONTINUE

    assert send_message(serve(app).greeted()).answer.verdict is Verdict.CONTINUE
    assert "a background task raised; the event loop goes on" in caplog.text


def test_shutdown_may_be_the_answer_to_a_coroutine(serve: Serve) -> None:
    app = Milter("test", on_error="shutdown")

    @app.on_eom
    async def fails(ctx: EomContext) -> Status:
        raise RuntimeError("the database is gone")

    peer = serve(app)
    assert send_message(peer.greeted()).answer.verdict is Verdict.TEMPFAIL
    peer.hang_up()
    with pytest.raises(HandlerError, match="the database is gone"):
        peer.server.stop()


# ---- The limit of time


def fail_until(begun: threading.Event, client: Client) -> None:
    """Send messages, which must fail, until a handler had the time to begin: on a busy machine not the first."""
    while not begun.is_set():
        assert send_message(client).answer.verdict is Verdict.TEMPFAIL


def test_a_coroutine_that_takes_too_long_is_cancelled_and_told_of(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    app = Milter("test", handler_timeout=0.01)
    begun = threading.Event()
    ends: list[str] = []

    @app.on_eom
    async def waits_for_ever(ctx: EomContext) -> Status:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ends.append("cancelled")
        return Status.CONTINUE

    fail_until(begun, serve(app).greeted())
    assert ends == ["cancelled"]
    assert (
        "waits_for_ever was cancelled, since it took longer than 0.01 seconds (Milter.handler_timeout)" in caplog.text
    )
    assert "await asyncio.Event().wait()" in caplog.text, "the traceback shows where it waited"


def test_a_verdict_after_the_cancellation_comes_too_late(serve: Serve) -> None:
    app = Milter("test", handler_timeout=0.01)

    begun = threading.Event()

    @app.on_eom
    async def goes_on(ctx: EomContext) -> Status:
        begun.set()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        return Status.ACCEPT

    fail_until(begun, serve(app).greeted())


@pytest.mark.usefixtures("left_soon")
def test_a_coroutine_that_does_not_end_is_left_to_itself(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    app = Milter("test", handler_timeout=0.01)
    begun, release = threading.Event(), asyncio.Event()

    @app.on_eom
    async def stubborn(ctx: EomContext) -> Status:
        begun.set()
        while not release.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await release.wait()
        return Status.CONTINUE

    @app.on_stop
    async def stop() -> None:
        release.set()

    fail_until(begun, serve(app).greeted())
    assert "stubborn was cancelled" in caplog.text
    assert "and did not end by that" in caplog.text


@pytest.mark.usefixtures("left_soon")
def test_a_coroutine_that_blocks_the_loop_does_not_keep_its_message(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    app = Milter("test", handler_timeout=0.01)
    begun, release = threading.Event(), threading.Event()

    @app.on_eom
    async def blocks(ctx: EomContext) -> Status:
        begun.set()
        release.wait(LIMIT)
        return Status.CONTINUE

    first, second = (peer := serve(app)).greeted(), peer.greeted()
    try:
        fail_until(begun, first)
        assert send_message(second).answer.verdict is Verdict.TEMPFAIL
        assert "something blocks the event loop" in caplog.text
    finally:
        release.set()


def test_a_plain_function_may_take_its_time(serve: Serve) -> None:
    app = Milter("test", handler_timeout=1e-9)
    app.on_eom(lambda ctx: Status.ACCEPT)
    assert send_message(serve(app).greeted()).answer.verdict is Verdict.ACCEPT


# ---- Many at once


@pytest.mark.skipif(not lib.milter_io_wrapped(), reason="libmilter promises several sessions to one worker here")
def test_hundreds_wait_at_once_and_hold_nobody_up(serve: Serve) -> None:
    sessions = 200
    app = Milter("test")
    there: list[int] = []
    all_there = asyncio.Event()

    @app.on_message
    async def meet(ctx: EomContext, message: Message) -> Status:
        if ctx.sender == "other@client.example":
            return Status.ACCEPT
        there.append(ctx.id)
        if len(there) == sessions:
            all_there.set()
        await all_there.wait()
        return Status.CONTINUE

    peer = serve(app, backlog=sessions)
    waiting = [greeted_at_end(peer.greeted()) for _ in range(sessions - 1)]
    other = peer.greeted()
    other.mail("<other@client.example>")
    other.rcpt("<bob@mta.example>")
    other.data()
    assert send_content(other).answer.verdict is Verdict.ACCEPT
    assert not all_there.is_set()
    waiting.append(greeted_at_end(peer.greeted()))
    assert {client.receive().letter for client in waiting} == {b"c"}
    assert len(set(there)) == sessions


# ---- Hooks


def test_hooks_may_be_coroutines_and_share_the_loop_with_handlers(serve: Serve) -> None:
    app = Milter("test")
    calls: list[str] = []
    questions: asyncio.Queue[asyncio.Future[Status]] = asyncio.Queue()
    background: list[asyncio.Task[None]] = []

    async def answer() -> None:
        try:
            while True:
                (await questions.get()).set_result(Status.ACCEPT)
        finally:
            calls.append("background task ended")

    @app.on_start
    async def start() -> None:
        background.append(asyncio.create_task(answer()))
        await asyncio.sleep(0)
        calls.append("start")

    @app.on_start
    def plain() -> None:
        calls.append("plain start")

    @app.on_eom
    async def ask(ctx: EomContext) -> Status:
        question = asyncio.get_running_loop().create_future()
        await questions.put(question)
        verdict: Status = await question
        return verdict

    @app.on_stop
    async def stop() -> None:
        await asyncio.sleep(0)
        assert not background[0].done()
        calls.append("stop")

    peer = serve(app)
    assert calls == ["start", "plain start"]
    assert send_message(peer.greeted()).answer.verdict is Verdict.ACCEPT
    peer.hang_up()
    peer.server.stop()
    assert calls == ["start", "plain start", "stop", "background task ended"]
    assert loop_threads() == []


def test_a_hook_that_raises_ends_the_start_and_the_loop(tmp_path: Path) -> None:
    app = Milter("test")

    @app.on_start
    async def start() -> None:
        raise RuntimeError("the database is gone")

    with pytest.raises(RuntimeError, match="the database is gone"):
        app.start(f"unix:{tmp_path}/filter.sock")
    assert loop_threads() == []


def test_a_plain_hook_that_returns_an_awaitable_is_refused(tmp_path: Path) -> None:
    app = Milter("test")

    async def later() -> None: ...

    app.on_start(lambda: later())
    with pytest.raises(TypeError, match="is a plain function and returned <coroutine object"):
        app.start(f"unix:{tmp_path}/filter.sock")


# ---- The end


def test_a_coroutine_under_way_is_finished_before_the_stop(run_filter: RunFilter, tmp_path: Path) -> None:
    process = run_filter("tests/filters/waiting.py", f"unix:{tmp_path}/filter.sock", "run")
    client = Client.connect(process.socket)
    client.negotiate()
    client.connect_info()
    client.helo()
    greeted_at_end(client)
    process.stdout.wait_for("at the end of a message")
    process.signal(signal.SIGTERM)
    process.log.wait_for("waiting up to")
    process.say("go on")
    assert client.receive().letter == b"a"
    client.quit()
    assert process.wait() == 0
    assert process.stdout.lines == ["started", "at the end of a message", "stopped", "run() returned"]


@pytest.mark.usefixtures("cancelled_soon")
def test_what_still_waits_at_the_stop_is_cancelled_and_answered(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    app = Milter("test")
    calls: list[str] = []
    here = threading.Event()

    @app.on_eom
    async def waits(ctx: EomContext) -> Status:
        here.set()
        try:
            await asyncio.Event().wait()
        finally:
            calls.append("cancelled")
        return Status.CONTINUE

    @app.on_eom
    async def never(ctx: EomContext) -> Status:
        raise AssertionError("the filter has stopped")

    @app.on_stop
    async def stop() -> None:
        calls.append("stop")

    peer = serve(app)
    client = greeted_at_end(peer.greeted())
    assert here.wait(LIMIT)
    peer.server.stop(grace=0)
    assert client.receive().letter == b"t"
    assert calls == ["cancelled", "stop"]
    assert "waits failed in on_eom" in caplog.text
    assert "CancelledError: the filter stops" in caplog.text
    assert "never failed" not in caplog.text
    assert loop_threads() == []
    peer.server.engine._connections.clear()


@pytest.mark.usefixtures("cancelled_soon")
def test_what_swallows_the_cancellation_at_the_stop_is_no_verdict(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    app = Milter("test")
    here = threading.Event()

    @app.on_eom
    async def goes_on(ctx: EomContext) -> Status:
        here.set()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        return Status.ACCEPT

    peer = serve(app)
    client = greeted_at_end(peer.greeted())
    assert here.wait(LIMIT)
    peer.server.stop(grace=0)
    assert client.receive().letter == b"t"
    assert "the filter stops; what the coroutine returned afterwards does not count" in caplog.text
    peer.server.engine._connections.clear()


@pytest.mark.usefixtures("cancelled_soon", "left_soon")
def test_what_does_not_end_at_the_stop_is_answered_without_it(
    serve: Serve, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "_LAST_WAIT", 0.01)
    app = Milter("test")
    here, release = threading.Event(), asyncio.Event()
    loops: list[asyncio.AbstractEventLoop] = []

    @app.on_eom
    async def stubborn(ctx: EomContext) -> Status:
        loops.append(asyncio.get_running_loop())
        here.set()
        while not release.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await release.wait()
        return Status.ACCEPT

    peer = serve(app)
    client = greeted_at_end(peer.greeted())
    assert here.wait(LIMIT)
    peer.server.stop(grace=0)
    assert client.receive().letter == b"t"
    assert "the handler does not end by being cancelled" in caplog.text
    assert "the event loop is left behind" in caplog.text
    assert "handlers are still running" not in caplog.text
    (thread,) = loop_threads()
    loops[0].call_soon_threadsafe(release.set)
    thread.join(LIMIT)
    assert not thread.is_alive()
    peer.server.engine._connections.clear()


def test_a_process_that_just_ends_answers_who_waits(run_filter: RunFilter, tmp_path: Path) -> None:
    process = run_filter("tests/filters/waiting.py", f"unix:{tmp_path}/filter.sock", "start")
    client = Client.connect(process.socket)
    client.negotiate()
    client.connect_info()
    client.helo()
    greeted_at_end(client)
    process.stdout.wait_for("at the end of a message")
    process.say("end")
    assert process.wait() == 0
    assert client.receive().letter == b"t"
    assert "CancelledError: the filter stops" in process.stderr.text


def test_a_filter_may_be_started_and_stopped_again_and_again(tmp_path: Path) -> None:
    app = Milter("test")

    @app.on_eom
    async def accept(ctx: EomContext) -> Status:
        await asyncio.sleep(0)
        return Status.ACCEPT

    descriptors = []
    for _ in range(5):
        with app.start(f"unix:{tmp_path}/filter.sock") as running:
            assert len(loop_threads()) == 1
            client = Client.connect(running.socket)
            client.negotiate()
            client.connect_info()
            assert send_message(client).answer.verdict is Verdict.ACCEPT
            client.quit()
            client.wait_for_close()
            client.close()
        assert loop_threads() == []
        descriptors.append(len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0)
    assert len(set(descriptors[1:])) == 1, "no descriptor is left behind"


def test_a_forked_child_makes_a_loop_of_its_own() -> None:
    program = """
import asyncio, os
from milter.loop import EventLoop

async def pid():
    await asyncio.sleep(0)
    os.write(1, b"%r\\n" % (os.getpid() == here))  # at once, whoever else writes

here = os.getpid()
parent = EventLoop(None)
parent.run_hook(pid)
child = os.fork()
here = os.getpid()
own = parent if child else EventLoop(None)
own.run_hook(pid)
own.stop()
if child:
    os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
os._exit(0)
"""
    # Python 3.12 and newer warn of each fork of a process with threads.
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LIMIT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n" * 3, "")


def test_a_filter_without_coroutines_has_no_loop_and_never_imports_asyncio(serve: Serve) -> None:
    app = Milter("test")
    app.on_eom(lambda ctx: Status.ACCEPT)
    assert send_message(serve(app).greeted()).answer.verdict is Verdict.ACCEPT
    assert loop_threads() == []
    program = "import sys, milter; sys.exit('asyncio' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_whoever_comes_after_the_end_of_the_loop_is_told_so() -> None:
    ended = EventLoop(None)
    ended.stop()

    async def later() -> None: ...

    with pytest.raises(asyncio.CancelledError, match="the event loop has ended"):
        ended.run_hook(later)
    with pytest.raises(asyncio.CancelledError, match="the filter stops"):
        ask_loop(ended, later())


def test_whoever_waits_at_the_end_of_the_loop_is_told_so() -> None:
    running = EventLoop(None)
    here = threading.Event()
    failures: list[BaseException] = []

    async def wait_for_ever() -> None:
        here.set()
        await asyncio.Event().wait()

    def ask() -> None:
        with pytest.raises(asyncio.CancelledError) as caught:
            ask_loop(running, wait_for_ever())
        failures.append(caught.value)

    asking = threading.Thread(target=ask)
    asking.start()
    assert here.wait(LIMIT)
    running.stop()
    asking.join(LIMIT)
    assert [str(failure) for failure in failures] == ["the event loop has ended"]


def test_a_coroutine_function_that_a_hook_registers_comes_too_late(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    app = Milter("test")

    async def too_late(ctx: EomContext) -> Status:
        return Status.ACCEPT

    @app.on_start
    def register() -> None:
        app.on_eom(too_late)

    assert send_message(serve(app).greeted()).answer.verdict is Verdict.TEMPFAIL
    assert "is a coroutine function, and was registered when the filter ran already" in caplog.text


# ---- What else belongs to asyncio


def test_a_coroutine_may_have_children_of_its_own(serve: Serve) -> None:
    """The loop is not in the main thread, which asyncio needs for signals alone."""
    app = Milter("test")
    seen: list[Any] = []

    @app.on_eom
    async def ask(ctx: EomContext) -> Status:
        child = await asyncio.create_subprocess_exec("cat", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        said, _ = await child.communicate(b"hello")
        others = [await asyncio.create_subprocess_exec("false") for _ in range(10)]
        seen.extend([said, child.returncode, *[await other.wait() for other in others]])
        return Status.ACCEPT

    assert send_message(serve(app).greeted()).answer.verdict is Verdict.ACCEPT
    assert seen == [b"hello", 0, *[1] * 10]


def test_a_background_task_that_fails_is_told_in_the_log(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    app = Milter("test")

    async def fail() -> None:
        raise ZeroDivisionError("in the background")

    @app.on_eom
    async def begin(ctx: EomContext) -> Status:
        await asyncio.wait([asyncio.create_task(fail())])
        gc.collect()
        return Status.ACCEPT

    assert send_message(serve(app).greeted()).answer.verdict is Verdict.ACCEPT
    collect()
    assert "Task exception was never retrieved" in caplog.text
    assert "in the background" in caplog.text


def test_a_factory_of_tasks_that_fails_fails_the_handler(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    app = Milter("test")

    def fail(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> Any:
        raise ZeroDivisionError("no task")

    @app.on_start
    async def choose() -> None:
        asyncio.get_running_loop().set_task_factory(fail)

    @app.on_eom
    async def answer(ctx: EomContext) -> Status:
        return Status.ACCEPT

    assert send_message(serve(app).greeted()).answer.verdict is Verdict.TEMPFAIL
    assert "answer failed in on_eom" in caplog.text
    assert "ZeroDivisionError: no task" in caplog.text


@pytest.mark.skipif(sys.version_info < (3, 12), reason="Python has them since 3.12")
def test_tasks_may_begin_at_once(serve: Serve) -> None:
    app = Milter("test")
    steps: list[str] = []

    @app.on_start
    async def choose() -> None:
        asyncio.get_running_loop().set_task_factory(getattr(asyncio, "eager_task_factory"))  # noqa: B009

    @app.on_mail
    async def at_once(ctx: Context, sender: Address, params: Params) -> Status:
        steps.append("at once")
        return Status.CONTINUE

    @app.on_eom
    async def later(ctx: EomContext) -> Status:
        await asyncio.sleep(0)
        steps.append("later")
        return Status.ACCEPT

    assert send_message(serve(app).greeted()).answer.verdict is Verdict.ACCEPT
    assert steps == ["at once", "later"]


# ---- The loop is watched


class Heard(logging.Handler):
    """Warnings, and an event for the first."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.first = threading.Event()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())
        self.first.set()


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> Iterator[Heard]:
    monkeypatch.setattr(stalls, "LONGEST", 0.005)
    handler = Heard()
    logging.getLogger("milter").addHandler(handler)
    yield handler
    logging.getLogger("milter").removeHandler(handler)


def test_a_coroutine_that_holds_the_loop_is_told_of_once_with_its_name_and_place(serve: Serve, heard: Heard) -> None:
    app = Milter("test")

    @app.on_message
    async def compute(ctx: EomContext, message: Message) -> Status:
        await asyncio.sleep(0)
        assert heard.first.wait(LIMIT)
        for _ in range(10):  # as long as ten looks of the watch, and told once all the same
            threading.Event().wait(stalls.LONGEST)
        return Status.REJECT

    client = serve(app).client()
    client.negotiate()
    assert send_message(client).answer.verdict is Verdict.REJECT
    assert len(heard.messages) == 1
    assert "coroutine test_a_coroutine_that_holds" in heard.messages[0]
    assert "<locals>.compute has held the event loop" in heard.messages[0]
    assert "assert heard.first.wait(LIMIT)" in heard.messages[0]


def test_a_coroutine_that_waits_is_not_told_of(serve: Serve, heard: Heard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stalls, "LONGEST", 0.05)  # a busy machine may itself let the loop stand still for a moment
    app = Milter("test")

    @app.on_message
    async def wait(ctx: EomContext, message: Message) -> Status:
        for _ in range(10):
            await asyncio.sleep(stalls.LONGEST)
        return Status.REJECT

    client = serve(app).client()
    client.negotiate()
    assert send_message(client).answer.verdict is Verdict.REJECT
    assert heard.messages == []


def test_the_watch_ends_with_the_loop() -> None:
    ended = EventLoop(None)
    ended.stop()
    assert not any(thread.name == "milter stalls" for thread in threading.enumerate())
