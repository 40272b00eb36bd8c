# SPDX-License-Identifier: GPL-3.0-or-later
"""Where the coroutines of a filter run: an asyncio event loop in a thread of its own.

The way of a handler that is a coroutine:

1. A thread of libmilter calls the function, which makes a coroutine, and submits it here as a job.
2. It waits, without the GIL, for the lock that the job came with.
3. The loop makes a task of it, in the context of its message (:class:`milter.context.Scope`). When that ends, in
   whatever way, the job is settled: result or exception are noted, and the lock is released.
4. The thread of libmilter goes on with what it finds.

The invariants:

- A job is among the open ones from its submission until it is settled. Who takes it from there, under the lock
  of the loop, settles it; so each job is settled once, and whatever happens to the loop, nobody waits for ever: what
  is open when the loop ends is settled then.
- `task` and `cancelled_because` are the loop's thread's alone. It looks without the lock whether a job is still
  open: that is one operation of a set, which is atomic, and what was taken a moment later is found out by
  the one who settles.
- Time is kept by those who wait, not by the loop, which a coroutine may block.
- A job that was cancelled has failed, even if its coroutine catches that and returns something: it is never
  taken for a verdict.
- A context is the job's from its submission until its task has ended. Who waits and goes on before that, gives the
  context up: see :meth:`EventLoop.answer`.
"""

import asyncio
import contextlib
import math
import threading
import time
from collections.abc import Awaitable, Callable
from contextvars import Context
from typing import Any, TypeAlias

from milter import children
from milter.blocking import BlockingCalls
from milter.context import Scope
from milter.coroutines import MtaGone, NoEventLoop, discard, is_coroutine_function
from milter.errors import MilterError
from milter.safe_log import SafeLog
from milter.scarcity import start_thread
from milter.stalls import StallWatch

__all__ = ["EventLoop"]

log = SafeLog("milter")

_GRACE = 1.0  # seconds that a coroutine gets to end once it was cancelled
_WAY_BACK = 1.0  # seconds that the threads of libmilter get to go on, once they were answered without the coroutine
_LAST_WAIT = 5.0  # seconds that background tasks of the filter get to end
_LOOK = 1.0  # seconds between two looks whether the MTA still waits


_Outcome: TypeAlias = tuple[Any, BaseException | None]


class _Job:
    """A coroutine, and somebody who waits for it."""

    __slots__ = ("_over", "awaitable", "cancelled_because", "ended", "failure", "result", "task", "variables")

    def __init__(self, awaitable: Awaitable[Any], variables: Context) -> None:
        self.awaitable = awaitable
        self.variables = variables
        self.task: asyncio.Task[_Outcome] | None = None
        self.cancelled_because = ""
        self.ended = False
        """It runs no more, and nothing else in its context. Who was told that it is settled may look."""
        # By who settles it, before it wakes who waits:
        self.result: Any = None
        self.failure: BaseException | None = None
        self._over = threading.Lock()
        self._over.acquire()

    async def perform(self) -> "_Outcome":
        """On the loop. Raises nothing: SystemExit would end the loop instead of the handler. A child ends here."""
        generation = children.generation
        try:
            result = await self.awaitable
        except BaseException as failure:
            children.end_if_forked(generation, failure)
            return None, failure
        children.end_if_forked(generation, None)
        return result, None

    def wait(self, seconds: float) -> bool:
        """Is it settled within this time?"""
        return self._over.acquire(timeout=min(seconds, threading.TIMEOUT_MAX))

    def settle(self, outcome: "_Outcome") -> None:
        self.result, self.failure = outcome
        self._over.release()

    def outcome(self) -> Any:
        """Its result, or its exception raised; once."""
        failure, self.failure = self.failure, None
        if failure is None:
            return self.result
        try:
            raise failure
        finally:
            del failure  # or the exception and its traceback would refer to each other


class EventLoop(NoEventLoop):
    """The event loop of one server: it runs until :meth:`stop`. `timeout`: seconds that a handler may take."""

    def __init__(self, timeout: float | None) -> None:
        super().__init__()
        self._timeout = math.inf if timeout is None else timeout
        self._runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
        self._loop = self._runner.get_loop()
        self._blocking = BlockingCalls()
        self._loop.set_default_executor(self._blocking)
        self._ending = False
        # Under the lock:
        self._lock = threading.Lock()
        self._jobs: set[_Job] = set()
        self._closed = False
        self._drained = False
        try:
            self._thread = start_thread(self._serve, "milter event loop")
        except MilterError:
            self._loop.close()
            raise
        try:
            self._stalls = StallWatch(self._loop, self._thread)
        except MilterError:
            self._end_thread()
            raise

    # ---- By the thread that starts and stops the server

    def run_hook(self, hook: Callable[[], Any]) -> None:
        """Call a hook of the process, and wait until it has ended."""
        if not is_coroutine_function(hook):
            super().run_hook(hook)
            return
        job = self._submit(self.variables.run(hook), self.variables)
        try:
            job.wait(math.inf)
        except BaseException as interruption:
            self._post(self._cancel, job, f"interrupted by {interruption!r}")
            raise
        job.outcome()

    def end_handlers(self, wait: Callable[[int], int]) -> bool:
        """Cancel the coroutines of handlers that still run. False: handlers run all the same.

        `wait` waits for the end of all calls of handlers, at most so many milliseconds, and tells how many are left.
        Those of a coroutine that does not end by being cancelled are answered without it.
        """
        jobs = self._drain()
        for job in jobs:
            self._post(self._cancel, job, "the filter stops")
        if not jobs or wait(int(_GRACE * 1000)) == 0:
            return wait(0) == 0
        for job in jobs:
            self._settle(job, _cancelled("the filter stops, and the handler does not end by being cancelled"))
        return wait(int(_WAY_BACK * 1000)) == 0

    def stop(self) -> None:
        """Cancel what still runs, the filter's own background tasks, and end the loop."""
        self._stalls.stop()
        self._end_thread()

    def _end_thread(self) -> None:
        self._ending = True
        self._post(self._loop.stop)
        self._thread.join(_LAST_WAIT)
        if self._thread.is_alive():
            log.critical("coroutines were cancelled and do not end: the event loop is left behind")

    # ---- By the threads of libmilter

    def answer(self, awaitable: Awaitable[Any], name: str, scope: Scope, mta_is_gone: Callable[[], bool]) -> Any:
        """What the coroutine of the handler `name` returns, or raises. Waits for it, without the GIL."""
        before = scope.variables.copy()
        job = self._submit_if_serving(awaitable, scope.variables)
        try:
            late = self._wait(job, name, mta_is_gone)
            if late is None:
                return job.outcome()
            raise self._end_early(job, late)
        finally:
            late = None  # or the exception and its traceback would refer to each other
            if not job.ended:
                scope.variables = before

    def _wait(self, job: _Job, name: str, mta_is_gone: Callable[[], bool]) -> Exception | None:
        """Until it is settled. Else: why it is not waited for any longer."""
        end = time.monotonic() + self._timeout
        while not job.wait(min(_LOOK, max(end - time.monotonic(), 0.0))):
            if mta_is_gone():
                return MtaGone(f"{name} was cancelled, since the MTA has closed its connection")
            if time.monotonic() >= end:
                limit = f"{self._timeout:g} seconds (Milter.handler_timeout)"
                return TimeoutError(f"{name} was cancelled, since it took longer than {limit}")
        return None

    def _end_early(self, job: _Job, late: Exception) -> Exception:
        """Cancel it; what is to be raised."""
        self._post(self._cancel, job, str(late))
        if job.wait(_GRACE):
            late.__cause__, job.failure = job.failure, None
            return late
        self._take(job)
        return type(late)(
            f"{late}, and did not end by that: it catches asyncio.CancelledError, or something blocks the event loop. "
            "It is answered without it"
        )

    # ---- Jobs: any thread

    def _submit(self, awaitable: Awaitable[Any], variables: Context) -> _Job:
        with self._lock:
            return self._add(awaitable, variables)

    def _submit_if_serving(self, awaitable: Awaitable[Any], variables: Context) -> _Job:
        with self._lock:
            if self._drained:
                discard(awaitable)
                raise asyncio.CancelledError("the filter stops")
            return self._add(awaitable, variables)

    def _add(self, awaitable: Awaitable[Any], variables: Context) -> _Job:
        """Under the lock."""
        if self._closed:
            discard(awaitable)
            raise asyncio.CancelledError("the event loop has ended")
        job = _Job(awaitable, variables)
        self._jobs.add(job)
        self._loop.call_soon_threadsafe(self._begin, job)
        return job

    def _drain(self) -> list[_Job]:
        """The open jobs; no handler can submit another one."""
        with self._lock:
            self._drained = True
            return list(self._jobs)

    def _take(self, job: _Job) -> bool:
        """From the open ones. False: somebody else did."""
        with self._lock:
            found = job in self._jobs
            self._jobs.discard(job)
            return found

    def _settle(self, job: _Job, outcome: _Outcome) -> None:
        if self._take(job):
            job.settle(outcome)

    def _post(self, callback: Callable[..., object], *arguments: Any) -> None:
        with contextlib.suppress(RuntimeError):  # it is closed; whoever waited has been told
            self._loop.call_soon_threadsafe(callback, *arguments)

    # ---- On the loop

    def _begin(self, job: _Job) -> None:
        if job not in self._jobs:  # nobody waits any more
            discard(job.awaitable)
            return
        performance = job.perform()
        name = getattr(job.awaitable, "__qualname__", repr(job.awaitable))
        try:
            job.task = self._loop.create_task(performance, name=name, context=job.variables)
        except BaseException as failure:  # the filter has given the loop another factory of tasks
            performance.close()
            discard(job.awaitable)
            job.ended = True
            self._settle(job, (None, failure))
            return
        job.task.add_done_callback(lambda task: self._end(job, task))

    def _end(self, job: _Job, task: "asyncio.Task[_Outcome]") -> None:
        job.ended = True
        if task.cancelled():  # before its first step
            discard(job.awaitable)
            outcome = _cancelled(job.cancelled_because)
        else:
            outcome = task.result()
        if job.cancelled_because and outcome[1] is None:
            outcome = _cancelled(f"{job.cancelled_because}; what the coroutine returned afterwards does not count")
        job.task = None  # which keeps its outcome, an exception whose traceback may refer to the job
        self._settle(job, outcome)

    def _cancel(self, job: _Job, because: str) -> None:
        if job in self._jobs and job.task is not None and not job.task.done():
            job.cancelled_because = because
            job.task.cancel(because)

    def _serve(self) -> None:
        """The thread's life. A task of the filter that raises SystemExit, say, ends neither thread nor loop."""
        with children.undone(self._forsake):
            while not self._ending:
                try:
                    children.call(self._loop.run_forever)
                except BaseException:
                    log.critical("a background task raised; the event loop goes on", exc_info=True)
        with self._lock:
            self._closed = True
        for job in self._drain():
            self._settle(job, _cancelled("the event loop has ended"))
        self._loop.set_task_factory(None)  # the end needs tasks, too, and the filter's own factory may fail
        try:
            self._runner.close()
        except RuntimeError:  # asyncio waits for the calls in threads in one more thread: there may be none
            self._blocking.shutdown()

    # ---- In a forked child

    def _forsake(self) -> None:
        """In a child. A coroutine that has forked must not go back to the loop, where its parent's tasks wait.

        What the loop would do next is taken away; instead the child ends when the coroutine returns, raises or waits.
        """
        if threading.get_ident() == self._thread.ident:
            ready = getattr(self._loop, "_ready", None)  # asyncio's own; another loop goes through with its round
            if ready is not None:
                ready.clear()
            self._loop.call_soon(_end_child, asyncio.current_task(self._loop))


def _end_child(task: "asyncio.Task[Any] | None") -> None:
    """The task that has forked has given the loop back. One that has ended may have raised."""
    if task is not None and task.done() and not task.cancelled():
        children.end(task.exception())
    children.end(
        RuntimeError(
            "a coroutine forked, and its child awaited something: the event loop is the parent's. In a child use plain "
            "functions, asyncio.run(), or os._exit(); or start processes with asyncio.create_subprocess_exec()"
        )
    )


def _cancelled(because: str) -> _Outcome:
    return None, asyncio.CancelledError(because)
