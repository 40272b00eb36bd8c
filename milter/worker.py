# SPDX-License-Identifier: GPL-3.0-or-later
"""One worker of a supervisor: a forked child that loads the filter, serves, and listens to what it is told.

It ends when the supervisor says so, or is gone; a signal to end, sent to the worker itself, drains it as well. Only the
supervisor can end the draining: a service manager signals all processes of a service, which is no second request.
"""

import contextlib
import socket
import threading
import time
from collections.abc import Callable

from milter.ending import end_process
from milter.errors import HandlerError, MilterError
from milter.safe_log import SafeLog
from milter.scarcity import start_thread
from milter.server import Server
from milter.signals import Bell
from milter.supervisor import DONE, DRAIN, END, EXIT_FAILED, EXIT_NOT_STARTED, FAILED, READY, STOP

__all__ = ["work"]

log = SafeLog("milter")

_LAST_WAIT = 2.0  # seconds that threads get when the grace is over


def work(make: Callable[[Bell], Server], control: socket.socket, grace: float, let_end: Callable[[], None]) -> int:
    """In the child: serve until told to end; returns the exit code. `make` loads the filter and makes its server.

    `let_end` is called when no other worker comes after this one, before it stops: the port is to be free then.
    """
    try:
        worker = _Worker(control, grace, let_end)
    except MilterError as failure:
        log.critical("%s", failure)
        return EXIT_NOT_STARTED
    with worker.bell.rung_by_signals():
        try:
            return worker.serve(make)
        finally:
            worker.end()


class _Worker:
    def __init__(self, control: socket.socket, grace: float, let_end: Callable[[], None]) -> None:
        self._control = control
        self._grace = grace
        self._let_end = let_end
        self.bell = Bell.of_a_worker()
        self._told = False
        self._insisted = threading.Event()
        self._ends_at = time.monotonic()
        """When the grace is over; a filter that did not start has none."""

    def serve(self, make: Callable[[Bell], Server]) -> int:
        try:
            start_thread(self._listen, "milter: control")
            server = make(self.bell)
            server.start()
        except MilterError as failure:
            log.critical("%s", failure, exc_info=failure.__cause__)
            return EXIT_NOT_STARTED
        except Exception:
            log.critical("the filter could not be started", exc_info=True)
            return EXIT_NOT_STARTED
        self._say(READY)
        return self._until_told(server)

    def end(self) -> None:
        """Threads and executors of the filter may go on for the rest of the grace."""
        end_process(max(self._ends_at - time.monotonic(), _LAST_WAIT), self._insisted)

    def _until_told(self, server: Server) -> int:
        try:
            try:
                server.wait()
            finally:
                self._ends_at = time.monotonic() + self._grace
                if server.asked_to_stop and not self._told:
                    self._say(DONE)
                server.stop()
        except HandlerError as failure:
            log.critical("%s", failure)
            self._say(FAILED)
            return EXIT_FAILED
        except Exception:
            log.critical("the filter failed", exc_info=True)
            return EXIT_FAILED
        return 0

    def _listen(self) -> None:
        """A thread of its own, until the supervisor's end is closed."""
        while True:
            try:
                said = self._control.recv(16)
            except OSError:  # pragma: no cover (the supervisor died before it read what was said)
                said = b""
            if STOP in said or not said:
                self._let_end()
            if (DRAIN in said or STOP in said or not said) and not self._told:
                self._told = True
                self.bell.ring()
            if END in said:
                self._told = True
                self._insisted.set()
                self.bell.insist()
            if not said:
                return

    def _say(self, word: bytes) -> None:
        with contextlib.suppress(OSError):  # the supervisor is gone, which _listen hears, too
            self._control.send(word)
