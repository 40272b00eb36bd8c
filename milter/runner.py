# SPDX-License-Identifier: GPL-3.0-or-later
"""A filter as a program: ``app.run()`` and ``milter run``.

The order of a start: the pidfile; the socket is opened, by whoever may; the process, or each worker, becomes the user
that is wanted; only then is code of the filter run. The order of an end is the other way round.
"""

import contextlib
import functools
import os
import socket as sockets
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Unpack

from milter import children, logs, metrics
from milter.app import Milter
from milter.descriptors import open_standard_streams, raise_limit
from milter.ending import tell_threads
from milter.errors import MilterError
from milter.green import refuse_green_threads
from milter.listener import Listener, SharedListener, open_listener
from milter.loading import Place, load
from milter.options import RunOptions, run_options, those_of_start
from milter.outlets import tolerant_streams
from milter.pidfile import pidfile
from milter.privileges import Identity, identity
from milter.reaper import step_down
from milter.safe_log import SafeLog
from milter.server import Server
from milter.signals import Bell
from milter.supervisor import Supervisor

__all__ = ["run", "run_by_name"]

log = SafeLog("milter")


def run(app: Milter[Any, Any], socket: str | None, **given: Unpack[RunOptions]) -> None:
    """Serve until a signal or :meth:`Milter.stop <milter.Milter.stop>`; see :meth:`Milter.run <milter.Milter.run>`."""
    open_standard_streams()
    raise_limit()
    refuse_green_threads()
    options = run_options(given)
    if threading.current_thread() is not threading.main_thread():
        raise MilterError("run() belongs into the main thread, which gets the signals; use start() elsewhere")
    step_down()
    if options["workers"] > 1:
        if threading.active_count() > 1:
            raise MilterError(
                "run(workers=…) forks, and other threads do not survive that: start them in on_start, in each worker"
            )
        with tolerant_streams():
            code = _supervise(lambda: app, app.name, socket, options)
        if code:
            raise SystemExit(code)
        return
    with tolerant_streams(), _prepared(socket, options) as (listener, user):
        if user is not None:
            user.take_on()
        _serve(app, listener, options)


def run_by_name(name: str, socket: str | None, options: RunOptions) -> int:
    """Serve the filter of this name (``module:app``), with a supervisor in any case; returns the exit code."""
    open_standard_streams()
    raise_limit()
    given = run_options(options)
    step_down()
    return _supervise(functools.partial(_load, Place(), name), name, socket, given)


def _load(place: Place, name: str) -> Milter[Any, Any]:
    place.enter()
    return load(name)


def _serve(app: Milter[Any, Any], listener: Listener, options: RunOptions) -> None:
    bell = Bell()
    with contextlib.ExitStack() as at_the_end, bell.rung_by_signals():
        server = Server(app, listener, bell, **those_of_start(options)).start()
        at_the_end.callback(tell_threads)  # when another signal ends the process again, as that says
        try:
            server.wait()
        finally:
            server.stop()


@contextlib.contextmanager
def _prepared(socket: str | None, options: RunOptions) -> Any:
    """What root can do, if it is wanted: the pidfile, the socket; and who to be."""
    wanted = options["user"]
    user = identity(wanted, options["group"]) if wanted is not None else None
    _set_up_logging(options)
    with pidfile(options["pidfile"]):
        listener = open_listener(
            socket,
            backlog=options["backlog"],
            remove_socket=options["remove_socket"],
            mode=options["mode"],
            group=user.group if user is not None else options["group"],
            owner=user.user if user is not None else None,
        )
        with contextlib.closing(listener):
            yield listener, user


def _set_up_logging(options: RunOptions) -> None:
    level, form, syslog = options["log_level"], options["log_format"], options["syslog"]
    if level is not None or form is not None or syslog is not None:
        logs.configure(level or "info", form or "text", syslog)


def _supervise(get: Any, name: str, socket: str | None, options: RunOptions) -> int:
    with _prepared(socket, options) as (listener, user), _metrics(options["metrics"], listener, user) as metrics_of:
        forget, companion, useless = metrics_of
        work = functools.partial(_work, get, listener, user, options, useless)
        supervisor = Supervisor(
            listener, options["workers"], work, forget, companion=companion, grace=options["grace"], name=name
        )
        return supervisor.run()


Companion = Callable[[int], int]


@contextlib.contextmanager
def _metrics(
    address: str | None, listener: Listener, user: Identity | None
) -> Iterator[tuple[Callable[[int], None], Companion | None, list[sockets.socket]]]:
    """What is to be called when a worker has ended; what the process does that answers Prometheus; where it listens."""
    if address is None:
        yield lambda process: None, None, []
        return
    with metrics.directory() as directory, metrics.listen(address) as endpoint:
        if user is not None:
            os.chown(directory.path, user.user, user.group)
        companion = functools.partial(_answer_prometheus, directory, endpoint, listener, user)
        yield directory.forget, companion, [endpoint]


def _answer_prometheus(
    directory: metrics.Directory, endpoint: sockets.socket, listener: Listener, user: Identity | None, lifeline: int
) -> int:
    """In a process of its own, which has no use for the filter's socket."""
    os.close(listener.socket.fileno())
    if user is not None:
        user.take_on()
    directory.serve(endpoint, lifeline)
    return 0


def _work(
    get: Any,
    listener: Listener,
    user: Identity | None,
    options: RunOptions,
    useless: Iterable[sockets.socket],
    control: sockets.socket,
) -> int:
    """In a worker. `useless`: what only other processes need."""
    from milter.worker import work

    for end in useless:
        end.close()
    shared = SharedListener.of(listener)
    children.hide(shared.socket.fileno())

    def make(bell: Bell) -> Server:
        if user is not None:
            user.take_on()
        return Server(get(), shared, bell, **those_of_start(options))

    return work(make, control, options["grace"], shared.let_end)
