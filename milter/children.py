# SPDX-License-Identifier: GPL-3.0-or-later
"""What a child inherits, when code of the filter forks: nothing of the filter.

``os.fork`` copies the memory and the descriptors of a process, but only the thread that called it. In a child of a
handler that thread is inside a call from libmilter: if it went back there, it would answer the MTA, as its parent does.
So do children of :mod:`multiprocessing`, while they are made, and those of :mod:`subprocess` with a `preexec_fn`.

The invariants:

1. A child ends where code of the filter (a handler, a hook, a module that is imported) would return to the library, or
   raise: :func:`call` and :func:`end`. As a program it has an exit code, and standard error tells what it raised. The
   functions of :mod:`atexit` are its parent's, and are not called.
2. A child has no descriptor of the filter: what was given to :func:`hide` is ``/dev/null`` there.
3. A child has the signal handlers that the process had before the filter, and no descriptor to be woken by: a signal
   to it does not stop its parent, and ends it. No signal is delivered before that is so: all are blocked from before
   the fork; one that comes meanwhile waits.
4. A child that was forked where libmilter runs has no way into it.
5. A child can write to standard output and standard error, whatever another thread was writing at the moment of the
   fork; and it does not write once more what its parent has not written yet.

The shim sees to 2 and 4, so that they hold for children that other C code forks, too: see shim/child.c. Those end there
as well, should they come back.
"""

import contextlib
import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import NoReturn, ParamSpec, TypeVar

from milter._shim import lib

__all__ = ["call", "end", "end_if_forked", "hide", "show", "undone"]

P = ParamSpec("P")
R = TypeVar("R")

generation = 0
"""How many forks this process is away from the one that imported this module. Whoever sees another number than before
is in a child."""

_undoings: list[Callable[[], object]] = []
_forking = threading.local()


# ---- The end of a child ----------------------------------------------------------------------


def call(function: Callable[P, R], *arguments: P.args, **options: P.kwargs) -> R:
    """Call code of the filter. A child that it forks ends when it comes back."""
    before = generation
    try:
        result = function(*arguments, **options)
    except BaseException as failure:
        end_if_forked(before, failure)
        raise
    end_if_forked(before, None)
    return result


def end_if_forked(before: int, failure: BaseException | None) -> None:
    """End this process if it is a child: if it was forked after `before` was its generation."""
    if generation != before or lib.milter_is_child():
        end(failure)


def end(failure: BaseException | None) -> NoReturn:
    """End this process, a child, as a program ends: with an exit code, and a traceback of what was raised."""
    code = 1
    try:
        code = _exit_code(failure)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(AttributeError, OSError, ValueError):  # there may be none, or a closed one
                stream.flush()
    finally:
        os._exit(code)


def _exit_code(failure: BaseException | None) -> int:
    if failure is None:
        return 0
    if not isinstance(failure, SystemExit):
        traceback.print_exception(failure)
        return 1
    if failure.code is None or isinstance(failure.code, int):
        return (failure.code or 0) & 0xFF
    print(failure.code, file=sys.stderr)
    return 1


# ---- What a child does not have --------------------------------------------------------------


def hide(descriptor: int) -> int:
    """From now on a child has ``/dev/null`` in the place of this file.

    Of a pipe either end will do. With a listening socket, all connections that came to it are hidden. Returns a number
    for :func:`show`.
    """
    number: int = lib.milter_hide(descriptor)
    return number


def show(number: int) -> None:
    """The file is closed, or no longer the filter's."""
    lib.milter_show(number)


@contextlib.contextmanager
def undone(undo: Callable[[], object]) -> Iterator[None]:
    """While this lasts, a child calls `undo` first of all; the last that began comes first."""
    _undoings.append(undo)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # in a child that leaves this way
            _undoings.remove(undo)


def _before() -> None:
    _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    lib.milter_hold_newcomers()  # or Python itself may hang in the child: see shim/child.h


def _in_parent() -> None:
    lib.milter_let_newcomers_in()
    signal.pthread_sigmask(signal.SIG_SETMASK, _forking.mask)


def _in_child() -> None:
    global generation
    generation += 1
    undoings = _undoings[::-1]
    _undoings.clear()
    for undo in undoings:
        undo()
    for stream in (sys.stdout, sys.stderr):
        _renew(stream)
    signal.pthread_sigmask(signal.SIG_SETMASK, _forking.mask)


def _renew(stream: object) -> None:
    """Give up what is buffered, and a lock that a thread of the parent may hold: here, no thread would release it."""
    if type(stream) is not io.TextIOWrapper:
        return
    if type(stream.buffer) is io.BufferedWriter:
        io.BufferedWriter.__init__(stream.buffer, stream.buffer.raw)
    elif not isinstance(stream.buffer, io.RawIOBase):
        return
    io.TextIOWrapper.__init__(
        stream,
        stream.buffer,
        stream.encoding,
        stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)
