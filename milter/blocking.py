# SPDX-License-Identifier: GPL-3.0-or-later
"""The threads of ``asyncio.to_thread``: one for each call that blocks, and none that holds up the end of the process.

asyncio's own pool has four threads more than there are processors. Of a hundred messages that ask a database in
``asyncio.to_thread``, all but a few would stand in a queue; and a process ends only after the last call of that pool.
The DNS look-ups of asyncio go through these threads, too.

The invariant, under the lock: each call in the queue has a thread that waits for one, or was started for one; unless
there are as many threads as there may be, or as the system allows. So a thread that has waited in vain may end when the
queue is empty.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from milter.safe_log import SafeLog

__all__ = ["BlockingCalls"]

log = SafeLog("milter")

_MOST = 512  # threads
_IDLE = 30.0  # seconds that a thread waits for another call
_LAST_WAIT = 1.0  # seconds that calls get to end when the filter has stopped

R = TypeVar("R")


class BlockingCalls(ThreadPoolExecutor):
    """An event loop takes nothing but a ThreadPoolExecutor; of that class this has the methods, and no more."""

    def __init__(self) -> None:
        super().__init__(max_workers=1)  # which starts none
        # Under the lock that belongs to it:
        self._changed = threading.Condition()
        self._calls: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._serving: set[threading.Thread] = set()
        self._waiting = 0
        self._over = False

    def submit(self, fn: Callable[..., R], /, *args: Any, **kwargs: Any) -> "Future[R]":
        future: Future[R] = Future()
        with self._changed:
            if self._over:
                raise RuntimeError("the filter has stopped: nothing more can be called in a thread")
            if self._waiting <= len(self._calls) and len(self._serving) < _MOST:
                self._add_thread()
            self._calls.append((future, partial(fn, *args, **kwargs)))
            self._changed.notify()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Calls that have not begun are cancelled, and those that do not end soon are left behind."""
        with self._changed:
            self._over = True
            given_up = list(self._calls)
            self._calls.clear()
            self._changed.notify_all()
            threads = list(self._serving)
        for future, _ in given_up:
            future.cancel()
        if wait:
            _join(threads)

    def _add_thread(self) -> None:
        """Under the lock. When the system has no thread to give, those that are there must do."""
        thread = threading.Thread(target=self._serve, name="milter blocking call", daemon=True)
        try:
            thread.start()
        except RuntimeError:
            if not self._serving:
                raise
        else:
            self._serving.add(thread)

    def _serve(self) -> None:
        """The life of a thread."""
        while call := self._next():
            _perform(*call)
            del call  # or all that it refers to would live until the next one

    def _next(self) -> tuple[Future[Any], Callable[[], Any]] | None:
        """None: the thread ends."""
        with self._changed:
            self._waiting += 1
            while not self._calls and not self._over and self._changed.wait(_IDLE):
                pass
            self._waiting -= 1
            if self._calls:
                return self._calls.popleft()
            self._serving.discard(threading.current_thread())
            return None


def _perform(future: Future[Any], call: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = call()
    except BaseException as failure:
        future.set_exception(failure)
        del future  # or the exception and its traceback would refer to each other
    else:
        future.set_result(result)


def _join(threads: list[threading.Thread]) -> None:
    end = time.monotonic() + _LAST_WAIT
    for thread in threads:
        thread.join(max(end - time.monotonic(), 0.0))
    left = sum(thread.is_alive() for thread in threads)
    if left:
        log.critical("blocking calls of coroutines (asyncio.to_thread) do not end, and are left behind: %d", left)
