# SPDX-License-Identifier: GPL-3.0-or-later
"""Signals belong to Python's main thread, not to libmilter.

What a process inherits is respected where it says what the user wants, and mended where it would do harm:

- SIGINT and SIGHUP that are ignored stay so: ``nohup`` and a shell's ``&`` ask for that.
- SIGCHLD that is ignored is not: the exit code of every process that a handler starts would be lost, and be 0.
- Signals that are blocked, and asked for here, are unblocked.
- SIGUSR1 and SIGUSR2 would end the process, and are only told of, unless the program has a handler of its own.

libmilter has a thread of its own that waits for SIGHUP, SIGINT and SIGTERM. The kernel offers a
process's signal to the main thread first, which has a handler and does not block it, so libmilter's
thread gets none of them: once it sleeps. See :func:`wait_for_signal_thread`.
"""

import contextlib
import functools
import os
import select
import signal
import threading
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from milter import children
from milter.safe_log import SafeLog
from milter.scarcity import plain_errors

log = SafeLog("milter")

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_MAY_BE_IGNORED = (signal.SIGINT, signal.SIGHUP)
MEANINGLESS = (signal.SIGUSR1, signal.SIGUSR2)
_ASKED, _INSISTED = 0, 255  # no signals
_LOOKS = 500  # one each millisecond


class Bell:
    """A pipe that is rung by whoever wants the stop: a thread, a handler that raised, a signal.

    Python writes the number of a signal into it at the moment the signal arrives, on whichever thread
    that is; a handler in Python alone would not wake the main thread from a system call when another
    thread took the signal.
    """

    @plain_errors()
    def __init__(
        self, asking: Collection[int] = (_ASKED, *_SIGNALS), insisting: Collection[int] = (_ASKED, *_SIGNALS)
    ) -> None:
        """What asks for the stop, and what, coming after that, for the end of the draining: ``_ASKED``, or signals."""
        self._asking = frozenset((_INSISTED, *asking))
        self._insisting = frozenset((_INSISTED, *insisting))
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        os.set_blocking(self._writer, False)
        self._hidden = children.hide(self._reader)
        self._in_use = 1  # by its owner, and by the signals while they ring it

    @classmethod
    def of_a_worker(cls) -> "Bell":
        """Its supervisor decides: SIGINT and SIGHUP are meant for that, and no signal ends the draining."""
        return cls(asking=(_ASKED, signal.SIGTERM), insisting=())

    def ring(self) -> None:
        """Ask for the stop."""
        self._write(_ASKED)

    def insist(self) -> None:
        """Ask for the end of the draining."""
        self._write(_INSISTED)

    def _write(self, number: int) -> None:
        if self._in_use:
            with contextlib.suppress(BlockingIOError):  # full: it rings already
                os.write(self._writer, bytes([number]))

    def wait(self, other: int) -> bool:
        """Wait until it rings (True), or the descriptor `other` can be read."""
        poll = select.poll()  # select() knows no descriptors from 1024 on
        poll.register(self._reader, select.POLLIN)
        poll.register(other, select.POLLIN)
        while True:
            ready = poll.poll()
            if self._heard(self._asking):
                return True
            if any(descriptor == other for descriptor, _ in ready):
                return False

    def silence(self) -> None:
        """Forget what rang until now: the draining begins, and what rang before was no request to end it."""
        self._heard(self._asking)

    def insists(self, within: float) -> bool:
        """Has somebody asked for the end of the draining since the last look, or does within so many seconds?"""
        poll = select.poll()
        poll.register(self._reader, select.POLLIN)
        poll.poll(within * 1000)
        return self._heard(self._insisting)

    def _heard(self, numbers: frozenset[int]) -> bool:
        with contextlib.suppress(BlockingIOError):
            rang = os.read(self._reader, 4096)
            for number in set(rang).intersection(MEANINGLESS):
                tell_meaningless(number)
            return not numbers.isdisjoint(rang)
        return False

    def close(self) -> None:
        self._in_use -= 1
        if self._in_use == 0:
            children.show(self._hidden)
            os.close(self._reader)
            os.close(self._writer)

    @contextlib.contextmanager
    def rung_by_signals(self) -> Iterator[None]:
        """Installed before libmilter's threads start, or a signal that one of them takes could end the process."""
        wanted = list(filter(_is_wanted, (*_SIGNALS, *MEANINGLESS)))
        with self.woken_by_signals(), handled(wanted), _children_waited_for():  # one that was blocked rings at once
            yield

    @contextlib.contextmanager
    def woken_by_signals(self) -> Iterator[None]:
        """Whoever waits here is woken by a signal; its handler, if there is one in Python, runs then."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._in_use += 1
        try:
            with children.undone(_wake_nobody):
                yield
        finally:
            signal.set_wakeup_fd(before)
            self.close()


@contextlib.contextmanager
def handled(numbers: Collection[signal.Signals]) -> Iterator[None]:
    """Meanwhile these signals have a handler, and are not blocked. Only in the main thread."""
    before = {number: signal.signal(number, _noted) for number in numbers}
    restore = functools.partial(_restore, before)
    mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
    try:
        with children.undone(restore):
            yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        restore()


def _restore(handlers: dict[signal.Signals, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def _wake_nobody() -> None:
    signal.set_wakeup_fd(-1)


def is_ignored(number: signal.Signals) -> bool:
    return signal.getsignal(number) is signal.SIG_IGN


def tell_meaningless(number: int) -> None:
    log.info("%s means nothing to a filter, and is ignored", signal.Signals(number).name)


def _is_wanted(number: signal.Signals) -> bool:
    if number in MEANINGLESS:
        return signal.getsignal(number) is signal.SIG_DFL
    return not (number in _MAY_BE_IGNORED and is_ignored(number))


@contextlib.contextmanager
def _children_waited_for() -> Iterator[None]:
    if not is_ignored(signal.SIGCHLD):
        yield
        return
    log.warning(
        "SIGCHLD was ignored, and is not while the filter runs: the exit codes of processes that handlers start would "
        "be lost"
    )
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)


def _noted(number: int, frame: FrameType | None) -> None:
    """The pipe has the number already; Python only wants to see a handler."""


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
        except OSError:  # pragma: no cover (a system without /proc, or a thread that ends at this moment)
            return
        time.sleep(0.001)


def _waits_for_signals(task: Path) -> bool:
    """All signals are blocked in libmilter's threads; sigwait(3) unblocks those it waits for."""
    try:
        status = (task / "status").read_bytes()
    except OSError:  # pragma: no cover (a thread that ended since it was listed)
        return False
    blocked = int(status.partition(b"SigBlk:")[2].split()[0], 16)
    return _has(blocked, signal.SIGUSR1) and not _has(blocked, signal.SIGTERM)


def _has(mask: int, number: signal.Signals) -> bool:
    return bool(mask >> (number - 1) & 1)
