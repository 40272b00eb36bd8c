# SPDX-License-Identifier: GPL-3.0-or-later
"""One worker of a supervisor: a forked child that loads the filter, serves, and listens to what it is told.

It ends when the supervisor says so, or is gone; a signal to end, sent to the worker itself, drains it as well. Only the
supervisor can end the draining: a service manager signals all processes of a service, which is no second request.
"""

import atexit
import contextlib
import logging
import socket
import sys
import threading
from collections.abc import Callable

from milter.errors import HandlerError, MilterError
from milter.server import Server
from milter.signals import Bell
from milter.supervisor import DONE, DRAIN, END, EXIT_FAILED, EXIT_NOT_STARTED, FAILED, READY, STOP

__all__ = ["work"]

log = logging.getLogger("milter")


def work(make: Callable[[Bell], Server], control: socket.socket, let_end: Callable[[], None]) -> int:
    """In the child: serve until told to end; returns the exit code. `make` loads the filter and makes its server.

    `let_end` is called when no other worker comes after this one, before it stops: the port shall be free then.
    """
    try:
        return _Worker(control, let_end).serve(make)
    finally:
        # As at the end of any process; os._exit, which follows, does nothing of it.
        atexit._run_exitfuncs()
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()


class _Worker:
    def __init__(self, control: socket.socket, let_end: Callable[[], None]) -> None:
        self._control = control
        self._let_end = let_end
        self._bell = Bell.of_a_worker()
        self._told = False

    def serve(self, make: Callable[[Bell], Server]) -> int:
        with self._bell.rung_by_signals():
            threading.Thread(target=self._listen, name="milter-control", daemon=True).start()
            try:
                server = make(self._bell)
                server.start()
            except MilterError as failure:
                log.critical("%s", failure, exc_info=failure.__cause__)
                return EXIT_NOT_STARTED
            except Exception:
                log.critical("the filter could not be started", exc_info=True)
                return EXIT_NOT_STARTED
            self._say(READY)
            return self._until_told(server)

    def _until_told(self, server: Server) -> int:
        try:
            try:
                server.wait()
            finally:
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
                self._bell.ring()
            if END in said:
                self._told = True
                self._bell.insist()
            if not said:
                return

    def _say(self, word: bytes) -> None:
        with contextlib.suppress(OSError):  # the supervisor is gone, which _listen hears, too
            self._control.send(word)
