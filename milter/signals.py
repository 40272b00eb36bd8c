# SPDX-License-Identifier: GPL-3.0-or-later
"""Signals belong to Python's main thread, not to libmilter.

libmilter has a thread of its own that waits for SIGHUP, SIGINT and SIGTERM. The kernel offers a
process's signal to the main thread first, which has a handler and does not block it, so libmilter's
thread gets none of them: once it sleeps. See :func:`wait_for_signal_thread`.
"""

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_LOOKS = 500  # one each millisecond


class Bell:
    """A pipe that is rung by whoever wants the stop: a thread, a handler that raised, a signal.

    Python writes the number of a signal into it at the moment the signal arrives, on whichever thread
    that is; a handler in Python alone would not wake the main thread from a system call when another
    thread took the signal.
    """

    _ASKED = 0

    def __init__(self) -> None:
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        os.set_blocking(self._writer, False)
        self._in_use = 1  # by its owner, and by the signals while they ring it

    def ring(self) -> None:
        if self._in_use:
            with contextlib.suppress(BlockingIOError):  # full: it rings already
                os.write(self._writer, bytes([self._ASKED]))

    def wait(self, other: int) -> bool:
        """Wait until it rings (True), or the descriptor `other` can be read."""
        poll = select.poll()  # select() knows no descriptors from 1024 on
        poll.register(self._reader, select.POLLIN)
        poll.register(other, select.POLLIN)
        while True:
            ready = poll.poll()
            if self.rings():
                return True
            if any(descriptor == other for descriptor, _ in ready):
                return False

    def rings(self) -> bool:
        """Has it rung since the last look?"""
        with contextlib.suppress(BlockingIOError):
            return any(number in (self._ASKED, *_SIGNALS) for number in os.read(self._reader, 4096))
        return False

    def close(self) -> None:
        self._in_use -= 1
        if self._in_use == 0:
            os.close(self._reader)
            os.close(self._writer)

    @contextlib.contextmanager
    def rung_by_signals(self) -> Iterator[None]:
        """Installed before libmilter's threads start, or a signal that one of them takes could end the process."""
        handlers = {number: signal.signal(number, _noted) for number in _SIGNALS}
        try:
            with self.woken_by_signals():
                yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    @contextlib.contextmanager
    def woken_by_signals(self) -> Iterator[None]:
        """Whoever waits here is woken by a signal; its handler, if there is one in Python, runs then."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._in_use += 1
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            self.close()


def _noted(number: int, frame: FrameType | None) -> None:
    """The bell has rung already; Python only wants to see a handler."""


def wait_for_signal_thread() -> None:
    """Wait until libmilter's thread for signals sleeps, so that it is no faster than the main thread.

    Beginning to wait, it takes a signal that is pending at that moment; libmilter would end instead of
    draining. A thread that waits for signals shows by its mask, in Linux's /proc. Elsewhere, and after
    half a second, the start goes on: libmilter's end is noticed, only later.
    """
    for _ in range(_LOOKS):
        try:
            if any(_waits_for_signals(task) for task in Path("/proc/self/task").iterdir()):
                return
        except OSError:
            return
        time.sleep(0.001)


def _waits_for_signals(task: Path) -> bool:
    """All signals are blocked in libmilter's threads; sigwait(3) unblocks those it waits for."""
    try:
        status = (task / "status").read_text("ascii", "replace")
    except OSError:  # a thread that has ended
        return False
    blocked = int(status.partition("SigBlk:")[2].split()[0], 16)
    return _has(blocked, signal.SIGUSR1) and not _has(blocked, signal.SIGTERM)


def _has(mask: int, number: signal.Signals) -> bool:
    return bool(mask >> (number - 1) & 1)
