# SPDX-License-Identifier: GPL-3.0-or-later
"""One process: open the socket, serve, drain, stop. Signals belong to Python here, not to libmilter.

The order of a start: the socket is opened (so its errors come first), the on_start hooks run,
libmilter begins to accept. The order of a stop: no more connections; open ones may end within
`grace` seconds; the gate into Python is closed; the handlers still running are waited for; the
on_stop hooks run. Coroutines (:mod:`milter.loop`) that are not done by then are cancelled; the event loop begins before
the on_start hooks, and ends after the on_stop hooks.

The invariant at the end: the gate is closed and no handler runs, so the interpreter can be
finalized, or the process leaves without finalizing it (:func:`_leave`).
"""

import atexit
import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Unpack

from milter import children
from milter.app import Milter
from milter.binding import Run
from milter.coroutines import NoEventLoop, event_loop_for
from milter.engine import Engine
from milter.errors import HandlerError, MilterError
from milter.green import refuse_green_threads
from milter.ledger import Ledger, open_books
from milter.libmilter import libmilter
from milter.listener import Listener, open_listener
from milter.metrics import Exporter, open_exporter
from milter.options import StartOptions, start_options
from milter.safe_log import SafeLog, enable_loggers
from milter.scarcity import plain_errors
from milter.signals import Bell

__all__ = ["Server"]

log = SafeLog("milter")

_STEP = 0.02  # seconds between two looks at the connections while draining
_LOOKS = 2  # that find none
_LAST_WAIT = 2.0  # seconds that handlers get after the grace is over
_EXIT_UNFINISHED = 70  # EX_SOFTWARE of sysexits.h


class Server:
    """A filter that serves, from :meth:`start` to :meth:`stop`; a context manager that stops at its end."""

    def __init__(
        self,
        app: Milter[Any, Any],
        socket: str | Listener | None,
        bell: Bell | None = None,
        **options: Unpack[StartOptions],
    ) -> None:
        """`socket`: where to listen, or a listener that is open. `bell`: of whoever asks for the stop."""
        self._app = app
        self._socket = socket
        self._options = start_options(options)
        self._listener: Listener | None = None
        self._hidden = -1
        self._run: Run | None = None
        self._loop = NoEventLoop()
        self._exporter: Exporter | None = None
        self._failing = threading.Lock()
        self._failure: HandlerError | None = None
        self._stopped = False
        self._gave_up = False
        self.asked_to_stop = False
        """By :meth:`request_stop`, that is by the filter itself."""
        self._bell = bell if bell is not None else Bell()
        self._process = os.getpid()

    @property
    def socket(self) -> str:
        """Where the filter listens, as an MTA's configuration wants it; with the port chosen for port 0."""
        if self._listener is None:
            raise MilterError("the filter is not running")
        return str(self._listener)

    @property
    def metrics_address(self) -> str | None:
        """Where the metrics are told, with the port chosen for port 0; None: nowhere, or in another process."""
        return self._exporter.address if self._exporter is not None else None

    @property
    def engine(self) -> Engine:
        assert self._run is not None, "the filter was never started"
        return self._run.engine

    def start(self) -> "Server":
        try:
            self._start()
        except BaseException:
            self._stopped = True
            self._app.server = None
            self._bell.close()
            raise
        return self

    @plain_errors()
    def _start(self) -> None:
        refuse_green_threads()
        enable_loggers()
        options = self._options
        listener = self._socket if isinstance(self._socket, Listener) else _open(self._socket, options)
        self._hidden = children.hide(listener.socket.fileno())
        try:
            with _only_one(self):
                self._loop = event_loop_for(self._app.functions, self._app.handler_timeout)
                self._exporter = open_exporter(options["metrics"])
                for hook in self._app.start_hooks:
                    self._loop.run_hook(hook)
                self._run = Run(Engine(self._app, self._loop, self._shut_down, self._open_books()))
                self._app.server = self
                libmilter.serve(
                    listener.socket,
                    self._app.name,
                    options["timeout"],
                    options["debug"],
                    options["max_data_size"],
                )
        except BaseException:
            if self._run is not None:
                self._run.close_gate()
                self._run.forget()
            self._loop.stop()
            self._close_exporter()
            listener.close()
            children.show(self._hidden)
            raise
        self._listener = listener
        log.info("%s is listening on %s", self._app.name, listener)

    def _open_books(self) -> Ledger | None:
        collector = self._exporter.collector if self._exporter is not None else None
        return open_books(self._options["access_log"], collector)

    def _close_exporter(self) -> None:
        if self._exporter is not None:
            self._exporter.close()

    def request_stop(self) -> None:
        """Ask for the stop, from a handler or any thread; returns at once."""
        self.asked_to_stop = True
        self._bell.ring()

    def wait(self) -> None:
        """Wait until somebody asks for the stop. Raises :class:`MilterError` when libmilter gives up by itself."""
        with self._bell.woken_by_signals():
            if children.call(self._bell.wait, libmilter.ended):
                return
        if not libmilter.ended_well():
            raise MilterError("libmilter has stopped serving; the system's log (facility mail) tells why")

    def stop(self, grace: float | None = None) -> None:
        """Stop: drain for at most `grace` seconds, then end. A second request to stop ends the draining.

        Raises :class:`HandlerError` when the stop came from a handler (``on_error="shutdown"``).
        """
        if self._stopped or self._process != os.getpid():  # a child of fork() has a copy, and no libmilter
            return
        if self._run is None or self._listener is None:
            raise MilterError("the filter was never started")
        self._stopped = True
        self._app.server = None
        self._bell.silence()
        libmilter.pause(self._listener.exclusive)
        self._listener.close()
        children.call(self._drain, self._run, self._listener, self._options["grace"] if grace is None else grace)
        with contextlib.ExitStack() as stack:  # each of them, the last first, whatever the others raise
            stack.callback(children.show, self._hidden)
            stack.callback(self._bell.close)
            stack.callback(self._loop.stop)
            stack.callback(self._close_exporter)
            for hook in self._app.stop_hooks:
                stack.callback(self._loop.run_hook, hook)
        if self._failure is not None:
            raise self._failure

    def _drain(self, run: Run, listener: Listener, grace: float) -> None:
        """Let open connections end.

        A connection may have been accepted, and have said nothing yet: so the descriptors are counted, and not
        only libmilter's sessions. And twice, since libmilter may be about to accept one while it loses the listener.
        """
        end = time.monotonic() + grace
        connected = listener.connections()
        if connected:
            log.info("waiting up to %g seconds for the end of open connections: %d", grace, connected)
        looks = _LOOKS
        while looks > 0 and time.monotonic() < end and not self._bell.insists(_STEP):
            looks = _LOOKS if run.wait_sessions(0) or listener.connections() else looks - 1
        run.close_gate()
        if run.wait_handlers(int(_LAST_WAIT * 1000)) and not self._loop.end_handlers(run.wait_handlers):
            log.critical("handlers are still running: the process will end without waiting for them")
            self._gave_up = True
            return
        run.forget()
        _running.discard(self)

    def _shut_down(self, failure: HandlerError) -> None:
        """By the engine, on a thread of libmilter: on_error="shutdown"."""
        with self._failing:
            self._failure = self._failure or failure  # the first one
        self.request_stop()

    def __enter__(self) -> "Server":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, failure: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()


def _open(socket: str | None, options: StartOptions) -> Listener:
    """The listener that the options want."""
    return open_listener(
        socket,
        backlog=options["backlog"],
        remove_socket=options["remove_socket"],
        mode=options["mode"],
        group=options["group"],
    )


# ---- One filter at a time --------------------------------------------------------------------

_running: set[Server] = set()
_starting = threading.Lock()


def _begin_anew() -> None:
    """In a forked child: nothing runs there, and nothing is about to."""
    global _starting
    _running.clear()
    _starting = threading.Lock()


os.register_at_fork(after_in_child=_begin_anew)


@contextlib.contextmanager
def _only_one(server: Server) -> Iterator[None]:
    """libmilter is one for the process, so one filter runs at a time; one after the other is fine."""
    with _starting:
        if any(not other._stopped for other in _running):
            raise MilterError("another filter is running in this process, and libmilter serves one at a time")
        _running.add(server)
        try:
            yield
        except BaseException:
            _running.discard(server)
            raise


def _handlers_end(server: Server) -> bool:
    """Do they, in the time they get? Once it was in vain, they get it no second time: a supervisor is waiting."""
    run, loop = server._run, server._loop
    milliseconds = 0 if server._gave_up else int(_LAST_WAIT * 1000)
    return run is None or not run.wait_handlers(milliseconds) or loop.end_handlers(run.wait_handlers)


@atexit.register
def _leave() -> None:
    """A handler that enters a finalized interpreter would crash the process: let none, wait for the last ones."""
    for server in _running:
        if server._run is not None:
            server._run.close_gate()
    if not all(_handlers_end(server) for server in _running):
        log.critical("handlers did not end: the process ends without them")
        logging.shutdown()
        os._exit(_EXIT_UNFINISHED)
