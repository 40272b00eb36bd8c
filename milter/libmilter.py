# SPDX-License-Identifier: GPL-3.0-or-later
"""libmilter itself, of which a process has one: started once, it serves until the process ends.

What a server asks of it: serve a listening socket, stop serving it. The trick with the sockets is
explained in :mod:`milter.standins`. Who tests a filter in this process asks for a connection, whether or not a server
listens.

Where its calls are redirected (see shim/redirect.c), its log lines go to the logger ``milter.libmilter``;
else they go to the system's log, facility mail.
"""

import atexit
import contextlib
import os
import socket
import threading
from pathlib import Path

from milter import children
from milter._shim import ffi, lib
from milter.errors import MilterError
from milter.gil import gil_is_on
from milter.log_pipe import LogPipe
from milter.safe_log import SafeLog
from milter.scarcity import require_threads
from milter.signals import wait_for_signal_thread
from milter.standins import Placeholder, Silence, StageDoor, connect_to

# For a process that tests filters, and serves none.
_NAME = "milter"
_TIMEOUT = 7210
_PACKET = 65535
_OWN_THREADS = 5
"""It waits for signals in one, and for connections in another; its pool has one, and two that work."""
_OWN_DESCRIPTORS = 8
"""More than its pipe, and those of the first connections."""


_NO_IPV6 = (
    "this libmilter (the shared library) was built without IPv6{}. Install a libmilter that was built with it "
    "(NETINET6), or let this library be built with libmilter's static archive (MILTER_LINK=static)"
)
_NO_IPV6_LISTENER = _NO_IPV6.format(", and cannot listen on inet6:")
_NO_IPV6_CLIENTS = _NO_IPV6.format(
    ": it closes the connection of the MTA when a client comes by IPv6, and the MTA treats that mail as its setting "
    "for broken filters says"
)

log = SafeLog("milter")


def _processors() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Libmilter:
    """It listens on a descriptor of its own making, behind which this class puts other sockets: the
    listener of the filter that runs, or between two runs one that nobody can reach.

    The invariant: while a listener is behind the descriptor, what the next pause needs is there already. So a stop
    needs no descriptor and no directory, which may have run out by then.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._family: int | None = None
        self._process = 0
        self._descriptor = -1
        self._asleep_at: list[socket.socket | Silence] = []
        self._silence: Silence | None = None  # for the next pause
        self._copy: socket.socket | None = None  # of the listener that serves, by which libmilter is woken later
        self._behind: tuple[int, int] | None = None
        self._listener: socket.socket | None = None  # of the filter that runs
        self._stage_door: StageDoor | None = None
        self.ended, self._end = -1, -1
        self._log: LogPipe | None = None

    @property
    def version(self) -> tuple[int, int, int]:
        """The version of the library that runs."""
        parts = ffi.new("unsigned int[3]")
        lib.smfi_version(parts, parts + 1, parts + 2)
        return (parts[0], parts[1], parts[2])

    @property
    def compiled_version(self) -> tuple[int, int, int]:
        """The version of the header that this extension was compiled with."""
        number = lib.SMFI_VERSION
        return (number >> 24 & 0x7F, number >> 8 & 0x7FFF, number & 0x7F)

    @property
    def redirected(self) -> tuple[str, ...]:
        """The calls of libmilter that come to this library instead; none: it makes them as everywhere."""
        if not lib.milter_io_wrapped():
            return ()
        return tuple(ffi.string(lib.milter_io_symbols()).decode("ascii").split())

    @property
    def link(self) -> str:
        """How it is linked, for people."""
        if self.redirected:
            return f"{'static' if lib.MILTER_STATIC else 'shared'}, I/O wrapped: {' '.join(self.redirected)}"
        return "shared, without IPv6" if self.lacks_ipv6 else "shared"

    @property
    def lacks_ipv6(self) -> bool:
        """It was built without IPv6. Where its system calls are redirected, that makes no difference: always False."""
        return not self.redirected and bool(lib.milter_lacks_ipv6())

    @property
    def where_it_logs(self) -> str:
        return "the logger milter.libmilter" if self.redirected else "the system's log (facility mail)"

    def serve(self, listener: socket.socket, name: str, timeout: int, debug: int, max_data_size: int) -> None:
        """Accept connections from `listener`.

        `name`, `timeout` (seconds) and `debug` count the first time in a process; libmilter reads them
        when it starts.
        """
        with self._lock:
            self._require_alive()
            self._prepare_pause(listener)
            if self._family is None:
                self._start(listener, name, timeout, debug, max_data_size)
            elif self._family != listener.family and not self.redirected:
                raise MilterError(
                    f"libmilter serves one kind of socket in a process, and began with {_family(self._family)}: "
                    f"a filter on {_family(listener.family)} needs another process"
                )
            else:
                self._close_stage_door()
                self._put(listener)
                self._wake(listener)
            self._listener = listener

    def connect(self) -> socket.socket:
        """A connection to libmilter in this process: where the filter listens, or, if none runs, by the stage door."""
        with self._lock:
            self._require_alive()
            if self._listener is not None:
                return connect_to(self._listener)
            if self._stage_door is None:
                self._open_stage_door()
            assert self._stage_door is not None
            return connect_to(self._stage_door.socket)

    def _require_alive(self) -> None:
        if self._family is not None and self._process != os.getpid():
            raise MilterError("libmilter was started before this process was forked: fork first, then start")
        if self._family is not None and not self._listens():
            raise MilterError("libmilter has ended in this process, and cannot be started again")

    def _open_stage_door(self) -> None:
        door = StageDoor(socket.AF_UNIX if self._family is None or self.redirected else self._family)
        if self._family is None:
            self._start(door.socket, _NAME, _TIMEOUT, 0, _PACKET)
        else:
            self._put(door.socket)
            self._wake(door.socket)
        self._stage_door = door

    def _close_stage_door(self) -> None:
        """A filter begins to listen, and those who test others come by the same way from now on."""
        if self._stage_door is not None:
            self._stage_door.remove()
            self._asleep_at.append(self._stage_door.socket)
            self._stage_door = None

    def ended_well(self) -> bool:
        """Once `ended` can be read: did libmilter end because it took a signal? Else it gave up."""
        return os.read(self.ended, 1) == b"s"

    def pause(self, listener: socket.socket | None) -> None:
        """Accept no more connections. `listener` is the one until now, if it is this process's alone."""
        self.drain_log()
        with self._lock:
            if not self._listens():
                return
            assert self._silence is not None, "libmilter was not serving"
            assert self._copy is not None
            self._listener = None
            self._put(self._silence.socket)
            self._asleep_at = [self._silence]
            if listener is not None:
                self._asleep_at.append(self._copy)
            else:
                self._copy.close()
            self._silence = self._copy = None

    def _prepare_pause(self, listener: socket.socket) -> None:
        self._forget_preparations()
        self._silence = Silence()
        self._copy = listener.dup()

    def _forget_preparations(self) -> None:
        for prepared in (self._silence, self._copy):
            if prepared is not None:
                prepared.close()
        self._silence = self._copy = None

    def _start(self, listener: socket.socket, name: str, timeout: int, debug: int, max_data_size: int) -> None:
        if self.lacks_ipv6:
            if listener.family == socket.AF_INET6:
                raise MilterError(_NO_IPV6_LISTENER)
            log.warning(_NO_IPV6_CLIENTS)
        lib.milter_register(name.encode("utf-8", "surrogateescape"))
        lib.milter_set_timeout(timeout)
        lib.milter_lead_by(1 if gil_is_on() else _processors())
        lib.smfi_setdbg(debug)
        lib.milter_set_max_data_size(max_data_size)
        with Placeholder(*self._families(listener), fallback=_directory_of(listener)) as placeholder:
            for specification in placeholder.specifications():
                lib.smfi_setconn(specification.encode("ascii"))
                if lib.smfi_opensocket(False) == 0:
                    break
            else:  # pragma: no cover (twenty random ports are not all in use)
                raise MilterError("libmilter could not open a socket; the system's log (facility mail) tells why")
            self._descriptor = placeholder.find()
            lib.milter_io_expect(placeholder.family)
        self._take_log()  # not before: that a port was in use is nobody's concern
        self._put(listener)
        self.ended, self._end = os.pipe()
        children.hide(self.ended)
        _require_descriptors()
        require_threads(_OWN_THREADS)
        error = lib.milter_serve(self._end)
        if error != 0:  # pragma: no cover (threads do not run out in tests)
            raise MilterError(f"no thread for libmilter: {os.strerror(error)}")
        wait_for_signal_thread()
        self._family = listener.family
        self._process = os.getpid()

    def _families(self, listener: socket.socket) -> tuple[int, ...]:
        """Of the sockets that libmilter may open in the place of `listener`, the best one first.

        Redirected, it takes connections of any family for those of its own. So it needs no IPv6 for an IPv6 listener,
        which it may have been built without, or for which there may be no ::1.
        """
        if self.redirected and listener.family != socket.AF_UNIX:
            return (socket.AF_INET, socket.AF_INET6)
        return (listener.family,)

    def _take_log(self) -> None:
        if self.redirected and self._log is None:
            self._log = LogPipe()
            lib.milter_io_log_to(self._log.writer)

    def drain_log(self) -> None:
        """Wait until Python's logging has all that libmilter has said until now."""
        if self._log is not None:
            self._log.drain()

    def leave_log(self) -> None:
        """At the end of the process, or in a child of it, which has no thread to read the pipe."""
        lib.milter_io_log_to(-1)
        self._log = None

    def forget_in_child(self) -> None:
        """Another thread of the parent may have had the lock; and the pipe is the parent's."""
        self._lock = threading.Lock()
        self.leave_log()

    def _put(self, listener: socket.socket) -> None:
        os.dup2(listener.fileno(), self._descriptor, inheritable=False)
        self._behind = _identity(self._descriptor)

    def _listens(self) -> bool:
        """Is the descriptor still libmilter's?

        Its thread for signals may take one that came at the moment of the start, before Python's main
        thread could. libmilter then closes the descriptor at once, and its number may be another's.
        """
        return _identity(self._descriptor) == self._behind

    def _wake(self, listener: socket.socket) -> None:
        """libmilter may sleep in poll() for up to five seconds at a socket that was replaced.

        Its shutdown wakes poll(), which looks at the descriptor again, and goes back to sleep unless
        it finds something to do there. So a caller knocks at the new listener first, and leaves.
        """
        with socket.socket(listener.family) as caller:
            caller.setblocking(False)
            caller.connect_ex(listener.getsockname())
            for replaced in self._asleep_at:
                with contextlib.suppress(OSError):  # it was shut down before; poll() wakes all the same
                    replaced.shutdown(socket.SHUT_RDWR)
                replaced.close()
        self._asleep_at = []

    def _forget_replaced(self) -> None:
        """At the end of the process, which would complain of sockets that nobody has closed."""
        for replaced in self._asleep_at:
            replaced.close()
        self._forget_preparations()
        if self._stage_door is not None and self._process == os.getpid():
            self._stage_door.remove()
            self._stage_door.socket.close()

    def at_exit(self) -> None:
        """When no handler runs any more, and logging still works."""
        self.drain_log()
        self.leave_log()
        self._forget_replaced()


libmilter = Libmilter()
atexit.register(libmilter.at_exit)
os.register_at_fork(after_in_child=libmilter.forget_in_child)


def _require_descriptors() -> None:
    """Raises OSError without as many as libmilter opens by itself, when it has begun and can only give up."""
    with contextlib.ExitStack() as spare:
        for _ in range(_OWN_DESCRIPTORS):
            spare.callback(os.close, os.open(os.devnull, os.O_RDONLY))


def _identity(descriptor: int) -> tuple[int, int] | None:
    try:
        found = os.fstat(descriptor)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _directory_of(listener: socket.socket) -> Path | None:
    """Of a Unix socket with a path: the filter could make a socket there a moment ago."""
    address = listener.getsockname()
    return Path(address).parent if isinstance(address, str) and address else None


def _family(family: int) -> str:
    return {socket.AF_UNIX: "a Unix socket", socket.AF_INET: "IPv4", socket.AF_INET6: "IPv6"}.get(
        socket.AddressFamily(family), str(family)
    )
