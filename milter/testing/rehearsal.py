# SPDX-License-Identifier: GPL-3.0-or-later
"""A filter that runs in this process, on the real libmilter, for nobody but the test that holds it.

libmilter is one for the process, and so is its listening socket. So a connection of a test says whom it wants, in its
negotiation, and the shim gives it to that run (``run_of`` in shim/milter_shim.c). Any number of filters can be
rehearsed at once, one after the other, and beside one that was started with ``app.start()``.

Each connection is a run of its own. What its handlers raise, and the state they keep, is thereby known to be of this
connection; and its end can be waited for, with all that handlers do at it.

No time is measured while a handler runs: it may stop at a breakpoint for as long as somebody looks at it.
"""

import atexit
import copy
import logging
import math
import os
import socket
from collections.abc import Callable
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

from milter.app import Handler, Milter
from milter.binding import MARKS, Run, WantedRun
from milter.coroutines import NoEventLoop, event_loop_for
from milter.engine import Engine
from milter.errors import HandlerError
from milter.libmilter import libmilter
from milter.safe_log import SafeLog
from milter.testing.client import Client
from milter.testing.wire import Command

__all__ = ["Rehearsal"]

log = SafeLog("milter")

_LOOK = 1000  # milliseconds between two chances for Ctrl-C
_LAST_WAIT = 2000  # milliseconds that handlers get when the test was interrupted, or the process ends
_EXIT_UNFINISHED = 70  # EX_SOFTWARE of sysexits.h


class Rehearsal:
    """One filter under test, from its on_start hooks to its on_stop hooks."""

    def __init__(self, app: Milter[Any, Any]) -> None:
        self._app = app
        self._loop = NoEventLoop()

    def __str__(self) -> str:
        return f"the filter {self._app.name!r} in this process"

    def start(self) -> None:
        self._loop = event_loop_for(self._app.functions, self._app.handler_timeout)
        try:
            for hook in self._app.start_hooks:
                self._loop.run_hook(hook)
        except BaseException:
            self._loop.stop()
            raise

    def stop(self) -> None:
        """After the end of all connections."""
        with ExitStack() as stack:  # each hook, the last first, whatever the others raise
            stack.callback(self._loop.stop)
            for hook in self._app.stop_hooks:
                stack.callback(self._loop.run_hook, hook)

    def connect(self, timeout: float | None) -> "RehearsedConnection":
        """`timeout`: seconds for an answer, those not counted in which handlers run."""
        return RehearsedConnection(self._app, self._loop, timeout)


class _WantingClient(Client):
    """A client that says whom it wants, and waits for handlers as long as they run."""

    def __init__(self, sock: socket.socket, run: WantedRun, timeout: float | None) -> None:
        super().__init__(sock, timeout)
        self._run = run

    def send(self, command: bytes, data: bytes = b"") -> None:
        """The mark goes on the negotiation, whatever else is offered there."""
        if command == Command.NEGOTIATE and len(data) >= _ACTIONS.stop:
            actions = int.from_bytes(data[_ACTIONS], "big") & ~MARKS | self._run.mark
            data = data[: _ACTIONS.start] + actions.to_bytes(4, "big") + data[_ACTIONS.stop :]
        super().send(command, data)

    def _recv_within(self, seconds: float) -> bytes:
        """Two looks in vain are the time; of one alone, a handler may have returned just before."""
        looks = 0
        while True:
            try:
                return super()._recv_within(math.inf if self.timeout is None else self.timeout / 2)
            except TimeoutError:
                looks = 0 if self._run.wait_handlers(0) else looks + 1
                if looks == 2:
                    raise


_ACTIONS = slice(4, 8)  # behind the version


class RehearsedConnection:
    """A connection to a filter under test, and what can be seen of it from inside.

    ``failures``: the exceptions that handlers raised, in order. ``session_state`` and ``transaction_state``: what
    ``ctx.session`` and ``ctx.transaction`` are, or were last; None until a handler looked.
    """

    def __init__(self, app: Milter[Any, Any], loop: NoEventLoop, timeout: float | None) -> None:
        self.failures: list[BaseException] = []
        self.session_state: Any = None
        self.transaction_state: Any = None
        self._loop = loop
        watched = copy.copy(app)
        watched.new_session = self._noting("session_state", app.new_session or SimpleNamespace)
        watched.new_transaction = self._noting("transaction_state", app.new_transaction or SimpleNamespace)
        self._run = WantedRun(Engine(watched, loop, self._shut_down, on_failure=self._failed))
        _open.add(self._run)
        try:
            self.client: Client = _WantingClient(libmilter.connect(), self._run, timeout)
        except BaseException:
            self._close()
            raise

    def end(self) -> None:
        """End the connection, and wait for what the filter does at it."""
        self.client.finish()
        while self._run.wait_sessions(_LOOK):
            pass
        self._close()

    def abandon(self) -> None:
        """The test was interrupted, so its handlers may be at something that never ends."""
        self.client.close()
        self._run.wait_sessions(_LAST_WAIT)
        self._close()

    def _close(self) -> None:
        self._run.close_gate()
        if self._run.wait_handlers(_LAST_WAIT) and not self._loop.end_handlers(self._run.wait_handlers):
            log.critical("handlers of a filter under test are still running")
            return
        self._run.forget()
        _open.discard(self._run)

    def _noting(self, name: str, factory: Callable[[], Any]) -> Callable[[], Any]:
        def make() -> Any:
            state = factory()
            setattr(self, name, state)
            return state

        return make

    def _failed(self, handler: Handler, failure: BaseException) -> None:
        failure.add_note(f"raised by {handler.name}, the handler of {handler.form.decorator}")
        self.failures.append(failure)

    def _shut_down(self, failure: HandlerError) -> None:
        """on_error="shutdown": the test sees the exception itself."""


_open: set[Run] = set()


@atexit.register
def _leave() -> None:
    """A handler that enters a finalized interpreter would crash the process."""
    for run in _open:
        run.close_gate()
    if any(run.wait_handlers(_LAST_WAIT) for run in _open):
        log.critical("handlers of a filter under test did not end: the process ends without them")
        logging.shutdown()
        os._exit(_EXIT_UNFINISHED)


os.register_at_fork(after_in_child=_open.clear)
