# SPDX-License-Identifier: GPL-3.0-or-later
"""Threads and descriptors that a start needs. Without them it fails with a sentence that says what to do."""

import contextlib
import errno
import threading
from collections.abc import Callable, Iterator
from typing import Any

from milter.errors import MilterError

__all__ = ["plain_errors", "require_threads", "start_thread"]


def start_thread(work: Callable[..., object], name: str, *arguments: Any) -> threading.Thread:
    """A thread of the library's own, which no end of a process waits for."""
    thread = threading.Thread(target=work, args=arguments, name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError:
        raise MilterError(
            f"no thread can be started ({name}): raise the limit of threads and processes (TasksMax=, ulimit -u), or "
            "of memory (ulimit -v)"
        ) from None
    return thread


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
