# SPDX-License-Identifier: GPL-3.0-or-later
"""Where a server's lines go: writing never raises, and nobody's mail waits for a reader that does not read.

A pipe to a log collector that hangs, a terminal stopped by Ctrl-S or a full system's log would block whatever prints or
logs, and with it all messages. So what is written here waits for room a little while, and is lost then. What is lost is
counted, and told in the log when there is room again. The same goes for a reader that is gone and a disk that is full.

There is no queue and no thread: the kernel's buffer is the queue, nothing has to be flushed at the end, and a child of
fork() can write, too. The descriptor's own flags stay as they are, since other processes share them: a pipe and a
terminal are opened once more, without blocking; a socket is asked for each packet.

`milter run` puts such streams in the place of ``sys.stdout`` and ``sys.stderr`` (:func:`patient_streams`);
:mod:`milter.logs` has one for its lines, and sends to syslog through an :class:`Outlet`.
"""

import contextlib
import errno
import io
import os
import select
import signal
import socket
import stat
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TextIO, cast

from milter.safe_log import SafeLog

__all__ = [
    "Outlet",
    "end_without_reader",
    "patient_stream",
    "patient_streams",
    "reader_is_gone",
    "tolerant_streams",
]

log = SafeLog("milter")

_PATIENCE = 1.0
"""Seconds that writers wait for room, all together,"""
_SHARE = 0.1
"""and the part of all time by which these grow again: a reader that is too slow slows the server by no more."""
_ATOMIC = select.PIPE_BUF


class Outlet:
    """One way out of the process.

    Arguments:
        name: for the log.
        send: sends all bytes, or raises `OSError`; waits for room no longer than so many seconds.
        lose: is told what was raised when bytes are lost for the first time, and after they came through again.
    """

    def __init__(
        self, name: str, send: Callable[[bytes, float], None], lose: Callable[[OSError], None] | None = None
    ) -> None:
        self._name = name
        self._send = send
        self._lose = lose if lose is not None else self._say_lost
        self._seconds = _PATIENCE
        self._looked = time.monotonic()
        self._losing = False
        self._lost = 0
        self._told = 0

    def write(self, data: bytes) -> None:
        try:
            self._send(data, self._left())
        except OSError as failure:
            self._lost += max(1, data.count(b"\n"))
            if not self._losing:
                self._losing = True
                self._lose(failure)
        else:
            self._losing = False
            if self._lost != self._told:
                self._told = self._lost
                log.warning("%s has room again; lines lost until now: %d", self._name, self._lost)
        finally:
            self._spend()

    def _say_lost(self, failure: OSError) -> None:
        log.warning(
            "%s cannot be written (%s): lines are lost until that is mended. Mail is served as before",
            self._name,
            failure.strerror or failure,
        )

    def _left(self) -> float:
        now = time.monotonic()
        self._seconds = min(_PATIENCE, self._seconds + (now - self._looked) * _SHARE)
        self._looked = now
        return max(self._seconds, 0.0)

    def _spend(self) -> None:
        now = time.monotonic()
        self._seconds -= now - self._looked
        self._looked = now


# ---- Streams ---------------------------------------------------------------------------------


class _Raw(io.RawIOBase):
    """A descriptor behind an outlet, as the lowest part of a stream."""

    def __init__(self, descriptor: int, name: str, lose: Callable[[OSError], None] | None) -> None:
        self._descriptor = descriptor
        self._own, self._write = _unblocked(descriptor)
        self._outlet = Outlet(name, self._send, lose)
        self._cut = False

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, data: Any) -> int:
        self._outlet.write(bytes(data))
        return len(data)

    def close(self) -> None:
        if not self.closed and self._own is not None:
            self._own.close()
        super().close()

    def _send(self, data: bytes, seconds: float) -> None:
        rest = memoryview(b"\n" + data if self._cut else data)  # what could not be finished ends here
        end = time.monotonic() + seconds
        self._cut = False
        begun = False
        while rest:
            try:
                rest = rest[self._write(rest) :]
                begun = True
            except BlockingIOError:
                if not _has_room(self._descriptor, end - time.monotonic()):
                    self._cut = begun
                    raise BlockingIOError(errno.EAGAIN, "nothing reads it, or too slowly") from None


def _has_room(descriptor: int, seconds: float) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    return bool(poll.poll(max(0.0, seconds) * 1000))


class _Opened:
    """A descriptor of our own."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def write(self, data: memoryview) -> int:
        return os.write(self._descriptor, data)

    def close(self) -> None:
        os.close(self._descriptor)


def _unblocked(descriptor: int) -> tuple[Any, Callable[[memoryview], int]]:
    """What is to be closed, and how to write so that a lack of room raises `BlockingIOError`."""
    try:
        mode = os.fstat(descriptor).st_mode
    except OSError:  # it is closed
        mode = 0
    if stat.S_ISSOCK(mode):
        connection = socket.socket(fileno=os.dup(descriptor))
        return connection, lambda data: connection.send(data, socket.MSG_DONTWAIT)
    if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode):
        with contextlib.suppress(OSError):  # no /proc, another user's, a pipe without a reader
            flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
            opened = _Opened(os.open(f"/proc/self/fd/{descriptor}", flags))
            return opened, opened.write
        return None, lambda data: _write_where_is_room(descriptor, data)
    return None, lambda data: os.write(descriptor, data)


def _write_where_is_room(descriptor: int, data: memoryview) -> int:
    """A pipe that is ready has room for so much. Another process may be faster: then this one waits for the reader."""
    if not _has_room(descriptor, 0):
        raise BlockingIOError
    return os.write(descriptor, data[:_ATOMIC])


def patient_stream(stream: TextIO, name: str, lose: Callable[[OSError], None] | None = None) -> TextIO:
    """A stream to the same descriptor, which escapes what cannot be encoded; `stream` itself if that has none.

    It has no `io.BufferedWriter`, whose lock would be held while a loss is logged: another thread that logs to the same
    stream may hold logging's own lock, and wait for that one.
    """
    if isinstance(getattr(stream, "buffer", None), _Raw):
        return stream
    try:
        descriptor = stream.fileno()
    except (AttributeError, OSError, ValueError):  # none at all, a test's own stream, a closed one
        return stream
    return io.TextIOWrapper(
        cast(Any, _Raw(descriptor, name, lose)),
        encoding=stream.encoding or "utf-8",
        errors="backslashreplace",
        line_buffering=getattr(stream, "line_buffering", False),
    )


@contextlib.contextmanager
def patient_streams() -> Iterator[None]:
    """Meanwhile ``sys.stdout`` and ``sys.stderr`` are patient. For a process that is all the library's."""
    before = sys.stdout, sys.stderr
    _flush(*before)
    sys.stdout = patient_stream(sys.stdout, "standard output")
    sys.stderr = patient_stream(sys.stderr, "standard error")
    try:
        yield
    finally:
        _flush(sys.stdout, sys.stderr)
        sys.stdout, sys.stderr = before


def _flush(*streams: TextIO) -> None:
    for stream in streams:
        with contextlib.suppress(AttributeError, OSError, ValueError):
            stream.flush()


@contextlib.contextmanager
def tolerant_streams() -> Iterator[None]:
    """Meanwhile ``print`` escapes what cannot be encoded, such as the stray bytes of a message, and does not raise."""
    changed = []
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")
            changed.append(stream)
    try:
        yield
    finally:
        for stream in changed:
            with contextlib.suppress(OSError, ValueError):  # what it has still to write cannot be written
                stream.reconfigure(errors="strict")


# ---- Commands whose reader has gone, as in "milter check … | head" --------------------------

_EXIT_SIGPIPE = 128 + signal.SIGPIPE
"""What a shell says of other tools, which end by the signal."""


def reader_is_gone(stream: TextIO) -> bool:
    """Does this stream write into a pipe that nothing reads any more?"""
    try:
        descriptor = stream.fileno()
    except (AttributeError, OSError, ValueError):
        return False
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    return any(events & select.POLLERR for _, events in poll.poll(0))


def end_without_reader() -> int:
    """The exit code. What is left to be written goes nowhere, or Python would complain at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
    return _EXIT_SIGPIPE
