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
from typing import Any, TypedDict, Unpack

from milter.app import Milter
from milter.binding import Run
from milter.coroutines import NoEventLoop, event_loop_for
from milter.engine import Engine
from milter.errors import HandlerError, MilterError
from milter.libmilter import libmilter
from milter.listener import Listener, open_listener
from milter.signals import Bell

__all__ = ["RunOptions", "Server", "run"]

log = logging.getLogger("milter")

_STEP = 50  # milliseconds between two looks at a signal while draining
_LAST_WAIT = 2.0  # seconds that handlers get after the grace is over
_EXIT_UNFINISHED = 70  # EX_SOFTWARE of sysexits.h
_PACKET = 65535


class RunOptions(TypedDict, total=False):
    """The options of :meth:`Milter.run <milter.Milter.run>` and :meth:`Milter.start <milter.Milter.start>`."""

    timeout: int
    """Seconds that libmilter waits for the MTA's next command, or for it to read; 7210 (``smfi_settimeout``)."""
    backlog: int
    """How many connections may wait to be accepted; 128 (``listen(2)``)."""
    remove_socket: bool
    """Remove a Unix socket that a filter left behind, once nobody listens there; True."""
    mode: int | None
    """The permissions of a Unix socket, such as ``0o660``; None: as the umask has it."""
    group: str | int | None
    """The group of a Unix socket, by name or number."""
    grace: float
    """Seconds that open connections get to end, when the filter is told to stop; 30."""
    debug: int
    """libmilter's debug level, 0 to 6: what it does, on standard output (``smfi_setdbg``)."""
    max_data_size: int
    """Bytes of one packet of the protocol, for an MTA built for larger ones; 65535 (``smfi_setmaxdatasize``)."""


_DEFAULTS: RunOptions = {
    "timeout": 7210,
    "backlog": 128,
    "remove_socket": True,
    "mode": None,
    "group": None,
    "grace": 30.0,
    "debug": 0,
    "max_data_size": _PACKET,
}


class Server:
    """A filter that serves, from :meth:`start` to :meth:`stop`; a context manager that stops at its end."""

    def __init__(self, app: Milter[Any, Any], socket: str | None, **options: Unpack[RunOptions]) -> None:
        self._app = app
        self._specification = socket
        self._options = _checked(options)
        self._listener: Listener | None = None
        self._run: Run | None = None
        self._loop = NoEventLoop()
        self._failure: HandlerError | None = None
        self._stopped = False
        self._bell = Bell()
        self._process = os.getpid()

    @property
    def socket(self) -> str:
        """Where the filter listens, as an MTA's configuration wants it; with the port chosen for port 0."""
        if self._listener is None:
            raise MilterError("the filter is not running")
        return str(self._listener)

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

    def _start(self) -> None:
        options = self._options
        listener = open_listener(
            self._specification,
            backlog=options["backlog"],
            remove_socket=options["remove_socket"],
            mode=options["mode"],
            group=options["group"],
        )
        try:
            with _only_one(self):
                self._loop = event_loop_for(self._app.functions, self._app.handler_timeout)
                for hook in self._app.start_hooks:
                    self._loop.run_hook(hook)
                self._run = Run(Engine(self._app, self._loop, self._shut_down))
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
            listener.close()
            raise
        self._listener = listener
        log.info("%s is listening on %s", self._app.name, listener)

    def request_stop(self) -> None:
        """Ask for the stop, from a handler or any thread; returns at once."""
        self._bell.ring()

    def wait(self) -> None:
        """Wait until somebody asks for the stop. Raises :class:`MilterError` when libmilter gives up by itself."""
        with self._bell.woken_by_signals():
            if self._bell.wait(libmilter.ended):
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
        libmilter.pause(self._listener.exclusive)
        self._listener.close()
        self._drain(self._run, self._options["grace"] if grace is None else grace)
        with contextlib.ExitStack() as stack:  # each of them, the last first, whatever the others raise
            stack.callback(self._bell.close)
            stack.callback(self._loop.stop)
            for hook in self._app.stop_hooks:
                stack.callback(self._loop.run_hook, hook)
        if self._failure is not None:
            raise self._failure

    def _drain(self, run: Run, grace: float) -> None:
        end = time.monotonic() + grace
        open_sessions = run.wait_sessions(0)
        if open_sessions:
            log.info("waiting up to %g seconds for the end of open connections: %d", grace, open_sessions)
        while time.monotonic() < end and not self._bell.rings() and run.wait_sessions(_STEP):
            pass
        run.close_gate()
        if run.wait_handlers(int(_LAST_WAIT * 1000)) and not self._loop.end_handlers(run.wait_handlers):
            log.critical("handlers are still running: the process will end without waiting for them")
            return
        run.forget()
        _running.discard(self)

    def _shut_down(self, failure: HandlerError) -> None:
        """By the engine, on a thread of libmilter: on_error="shutdown"."""
        if self._failure is None:
            self._failure = failure
        self.request_stop()

    def __enter__(self) -> "Server":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, failure: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()


def run(app: Milter[Any, Any], socket: str | None, **options: Unpack[RunOptions]) -> None:
    """Serve until a signal or :meth:`Milter.stop <milter.Milter.stop>`; see :meth:`Milter.run <milter.Milter.run>`."""
    if threading.current_thread() is not threading.main_thread():
        raise MilterError("run() belongs into the main thread, which gets the signals; use start() elsewhere")
    server = Server(app, socket, **options)
    with server._bell.rung_by_signals():
        server.start()
        try:
            server.wait()
        finally:
            server.stop()


# ---- One filter at a time --------------------------------------------------------------------

_running: set[Server] = set()
_starting = threading.Lock()


@contextlib.contextmanager
def _only_one(server: Server) -> Iterator[None]:
    """libmilter is one for the process, so one filter runs at a time; one after the other is fine."""
    with _starting:
        if any(not other._stopped and other._process == os.getpid() for other in _running):
            raise MilterError("another filter is running in this process, and libmilter serves one at a time")
        _running.add(server)
        try:
            yield
        except BaseException:
            _running.discard(server)
            raise


@atexit.register
def _leave() -> None:
    """A handler that enters a finalized interpreter would crash the process: let none, wait for the last ones."""
    here = [server for server in _running if server._process == os.getpid()]
    started = [(server._run, server._loop) for server in here if server._run is not None]
    for run, _ in started:
        run.close_gate()
    if any(
        run.wait_handlers(int(_LAST_WAIT * 1000)) and not loop.end_handlers(run.wait_handlers) for run, loop in started
    ):
        log.critical("handlers did not end: the process ends without them")
        logging.shutdown()
        os._exit(_EXIT_UNFINISHED)


def _checked(options: RunOptions) -> RunOptions:
    unknown = options.keys() - _DEFAULTS.keys()
    if unknown:
        raise TypeError(f"unknown options: {', '.join(sorted(unknown))}; there are {', '.join(sorted(_DEFAULTS))}")
    merged: RunOptions = {**_DEFAULTS, **options}
    for name, lowest in (
        ("timeout", 1),
        ("backlog", 1),
        ("grace", 0),
        ("debug", 0),
        ("max_data_size", _PACKET),
    ):
        if merged[name] < lowest:  # type: ignore[literal-required]
            raise ValueError(f"{name} must be {lowest} or more, not {merged[name]}")  # type: ignore[literal-required]
    return merged
