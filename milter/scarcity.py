# SPDX-License-Identifier: GPL-3.0-or-later
"""Threads, descriptors and memory that run out.

Without the threads and descriptors that it needs, a start fails with a sentence that says what to do. While it runs, a
filter without memory defers mail, says so, and goes on when there is some again: the library's own threads, too.
"""

import contextlib
import errno
import math
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from milter.errors import MilterError
from milter.safe_log import SafeLog

__all__ = ["MemoryOutage", "plain_errors", "require_threads", "start_thread"]

log = SafeLog("milter")

_PAUSE = 1.0  # seconds until a thread tries again
_QUIET = 60.0  # seconds in which the log is told once that there is no memory


def start_thread(work: Callable[..., object], name: str, *arguments: Any) -> threading.Thread:
    """A thread of the library's own, which no end of a process waits for.

    It begins anew when its work fails for want of memory.
    """
    thread = threading.Thread(target=_persist, args=(work, *arguments), name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError:
        raise MilterError(
            f"no thread can be started ({name}): raise the limit of threads and processes (TasksMax=, ulimit -u), or "
            "of memory (ulimit -v)"
        ) from None
    return thread


def _persist(work: Callable[..., object], *arguments: Any) -> None:
    while True:
        try:
            work(*arguments)
        except MemoryError:
            time.sleep(_PAUSE)
        else:
            return


def require_threads(count: int) -> None:
    """Raises :class:`MilterError` when the system does not have so many more."""
    enough = threading.Event()
    spare: list[threading.Thread] = []
    try:
        for _ in range(count):
            spare.append(start_thread(enough.wait, "libmilter"))
    finally:
        enough.set()
        for thread in spare:
            thread.join()


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Raises :class:`MilterError` when descriptors run out."""
    try:
        yield
    except OSError as failure:
        if failure.errno not in (errno.EMFILE, errno.ENFILE):
            raise
        raise MilterError(
            f"the filter cannot be started: {failure.strerror}. Raise the limit of open files (LimitNOFILE=, ulimit -n)"
        ) from None


class MemoryOutage:
    """Tells the log that memory has run out, and not with each event that fails. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._quiet_until = -math.inf

    def tell(self) -> None:
        with self._lock:
            now = time.monotonic()
            if now < self._quiet_until:
                return
            self._quiet_until = now + _QUIET
        log.critical(
            "the memory has run out: messages are answered by a temporary failure until there is some again. Raise the "
            "limit (MemoryMax=, ulimit -v), let the MTA open fewer connections, or lower Milter(spool_size=…)"
        )
