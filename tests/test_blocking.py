# SPDX-License-Identifier: GPL-3.0-or-later
"""The threads of asyncio.to_thread: one for each message that waits there, and none that outstays the filter."""

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait

import pytest

from milter import EomContext, Milter, Status, blocking
from milter.blocking import BlockingCalls
from milter.testing import Verdict
from tests.conftest import Serve, send_message

LIMIT = 30.0
"""Seconds after which something hangs."""

HUNDREDS = 200


@pytest.fixture
def calls() -> Iterator[BlockingCalls]:
    executor = BlockingCalls()
    yield executor
    executor.shutdown()


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "milter blocking call"]


def test_messages_that_block_in_threads_wait_side_by_side(serve: Serve) -> None:
    app = Milter("test")
    all_there = threading.Barrier(24)

    @app.on_eom
    async def ask(ctx: EomContext) -> Status:
        await asyncio.to_thread(all_there.wait, LIMIT)
        return Status.ACCEPT

    peer = serve(app)
    with ThreadPoolExecutor(all_there.parties) as pool:
        ends = list(pool.map(lambda _: send_message(peer.greeted()), range(all_there.parties)))
    assert {end.answer.verdict for end in ends} == {Verdict.ACCEPT}
    peer.hang_up()
    peer.server.stop()
    assert threads() == []


def test_hundreds_of_calls_block_at_once(calls: BlockingCalls) -> None:
    all_there = threading.Barrier(HUNDREDS)
    futures = [calls.submit(all_there.wait, LIMIT) for _ in range(HUNDREDS)]
    assert sorted(future.result(LIMIT) for future in futures) == list(range(HUNDREDS))


def test_calls_one_after_the_other_share_threads(calls: BlockingCalls) -> None:
    """Not always the same one: that has given its result, and may not be back yet."""
    for number in range(100):
        assert calls.submit(lambda number=number: number).result(LIMIT) == number
    assert len(threads()) < 50


def test_arguments_results_and_exceptions_pass(calls: BlockingCalls) -> None:
    assert calls.submit(divmod, 7, 2).result(LIMIT) == (3, 1)
    assert calls.submit(int, "101", base=2).result(LIMIT) == 5
    for failure in (ZeroDivisionError, SystemExit, KeyboardInterrupt):
        with pytest.raises(failure):
            calls.submit(_raise, failure).result(LIMIT)
    assert list(calls.map(abs, [-1, -2])) == [1, 2]


def _raise(kind: type[BaseException]) -> None:
    raise kind


def test_there_are_no_more_threads_than_there_may_be(calls: BlockingCalls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocking, "_MOST", 3)
    three, seen = threading.Barrier(3), set[int]()

    def work() -> None:
        three.wait(LIMIT)
        seen.add(threading.get_ident())

    futures = [calls.submit(work) for _ in range(30)]
    assert not wait(futures, LIMIT).not_done
    assert len(seen) == 3


def test_threads_without_work_end(calls: BlockingCalls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocking, "_IDLE", 0.01)
    both = threading.Barrier(2)
    wait([calls.submit(both.wait, LIMIT) for _ in range(2)], LIMIT)
    for thread in threads():
        thread.join(LIMIT)
    assert threads() == []
    assert calls.submit(int, "1").result(LIMIT) == 1


def test_without_threads_to_be_had_those_that_are_there_do_the_work(
    calls: BlockingCalls, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        go_on.wait(LIMIT)

    first = calls.submit(work)
    assert begun.wait(LIMIT)
    monkeypatch.setattr(threading.Thread, "start", _no_thread)
    others = [calls.submit(int, "1") for _ in range(3)]
    go_on.set()
    assert not wait([first], LIMIT).not_done
    assert not wait(others, LIMIT).not_done


def _no_thread(thread: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


def test_without_any_thread_the_caller_is_told(calls: BlockingCalls, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", _no_thread)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            calls.submit(int, "1")
    assert calls.submit(int, "2").result(LIMIT) == 2, "and nothing is left of the one before"


def test_at_the_end_nothing_begins_and_what_runs_is_left_behind(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(blocking, "_MOST", 1)
    monkeypatch.setattr(blocking, "_LAST_WAIT", 0.01)
    calls = BlockingCalls()
    begun, go_on = threading.Event(), threading.Event()

    def work() -> bool:
        begun.set()
        return go_on.wait(LIMIT)

    running: Future[bool] = calls.submit(work)
    assert begun.wait(LIMIT)
    waiting = calls.submit(work)
    calls.shutdown()
    assert "do not end, and are left behind: 1" in caplog.text
    with pytest.raises(CancelledError):
        waiting.result(LIMIT)
    with pytest.raises(RuntimeError, match="the filter has stopped"):
        calls.submit(work)
    go_on.set()
    assert running.result(LIMIT)


def test_a_call_that_never_ends_does_not_hold_up_the_end_of_the_process() -> None:
    program = """
import asyncio, threading
from milter import Milter, Status
from milter.testing import Client
from tests.conftest import begin_message

app = Milter("test")
here = threading.Event()

def block():
    here.set()
    threading.Event().wait()

@app.on_data
async def ask(ctx):
    await asyncio.to_thread(block)

with app.start("inet:0@127.0.0.1", grace=0) as server:
    client = Client.connect(server.socket)
    client.negotiate()
    client.connect_info()
    client.mail("<ann@client.example>")
    client.rcpt("<bob@mta.example>")
    client.send(b"T")
    here.wait()
print("stopped")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=LIMIT)
    assert (done.returncode, done.stdout) == (0, "stopped\n"), done.stderr
    assert "blocking calls of coroutines (asyncio.to_thread) do not end" in done.stderr


def test_the_filter_may_have_another_executor(serve: Serve) -> None:
    app = Milter("test")
    names: list[str] = []

    @app.on_start
    async def choose() -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(2, "own"))

    @app.on_eom
    async def ask(ctx: EomContext) -> Status:
        names.append(await asyncio.to_thread(lambda: threading.current_thread().name))
        return Status.ACCEPT

    assert send_message(serve(app).greeted()).answer.verdict is Verdict.ACCEPT
    assert names == ["own_0"]
