# SPDX-License-Identifier: GPL-3.0-or-later
"""Sockets by name: parse a specification, open a listening socket, connect to one.

A specification is

- ``inet:port@host``, ``inet6:port@host``, ``inet:port``: libmilter's and Sendmail's form;
- ``inet:host:port``, ``inet6:[address]:port``: Postfix's form;
- ``unix:path``, ``local:path``, or a bare path;
- ``fd:number``: a listening socket that the parent process left open;
- None: the socket that systemd passed (``LISTEN_FDS``).

Everything that can be wrong is a :class:`SocketError` that says what, where and what to do. The
library opens the socket itself, since libmilter would tell of errors in the system's log only.
"""

import contextlib
import errno
import grp
import os
import socket
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from milter.descriptors import duplicate, sockets
from milter.errors import SocketError
from milter.safe_log import SafeLog
from milter.scarcity import plain_errors

__all__ = ["Listener", "connect", "open_listener", "parse"]

log = SafeLog("milter")

_LONGEST_PATH = 107  # bytes of sockaddr_un.sun_path, without the final NUL
_FIRST_PASSED = 3  # sd_listen_fds(3)
_FAMILIES = {"inet": socket.AF_INET, "inet6": socket.AF_INET6}


@dataclass(frozen=True, slots=True)
class UnixEndpoint:
    path: str

    def __str__(self) -> str:
        return f"unix:{self.path}"


@dataclass(frozen=True, slots=True)
class InetEndpoint:
    scheme: str
    """``inet`` or ``inet6``."""
    port: int
    host: str | None
    """None: all addresses."""

    @property
    def family(self) -> socket.AddressFamily:
        return _FAMILIES[self.scheme]

    def __str__(self) -> str:
        return f"{self.scheme}:{self.port}" + (f"@{self.host}" if self.host is not None else "")


@dataclass(frozen=True, slots=True)
class PassedEndpoint:
    descriptor: int

    def __str__(self) -> str:
        return f"fd:{self.descriptor}"


Endpoint = UnixEndpoint | InetEndpoint | PassedEndpoint


# ---- Parsing ---------------------------------------------------------------------------------


def parse(specification: str) -> Endpoint:
    """What a specification names.

    >>> str(parse("inet:localhost:3000"))
    'inet:3000@localhost'
    >>> parse("/run/milter/filter.sock")
    UnixEndpoint(path='/run/milter/filter.sock')
    """
    scheme, colon, rest = specification.partition(":")
    if not colon or "/" in scheme:
        return _unix(specification, specification)
    match scheme.lower():
        case "unix" | "local":
            return _unix(rest, specification)
        case "inet" | "inet6":
            return _inet(scheme.lower(), rest, specification)
        case "fd":
            return _passed(rest, specification)
        case _:
            raise SocketError(
                f"{specification!r} is not a socket: {scheme!r} is unknown. "
                "Write inet:port@host, inet6:port@host, unix:path or fd:number"
            )


def _unix(path: str, specification: str) -> UnixEndpoint:
    if not path:
        raise SocketError(f"{specification!r} names no path: write unix:/path/to/the/socket")
    if "\0" in path:
        raise SocketError(f"the path of a socket cannot contain NUL: {path!r}")
    size = len(os.fsencode(path))
    if size > _LONGEST_PATH:
        raise SocketError(f"the path {path!r} has {size} bytes; a socket's path has at most {_LONGEST_PATH}")
    return UnixEndpoint(path)


def _inet(scheme: str, rest: str, specification: str) -> InetEndpoint:
    host: str | None
    if "@" in rest:
        port, _, host = rest.partition("@")
    elif ":" in rest:
        host, _, port = rest.rpartition(":")
    else:
        port, host = rest, None
    if host is not None:
        host = host.removeprefix("[").removesuffix("]")
        if not host or "\0" in host:
            raise SocketError(f"{specification!r} names no host: write {scheme}:port@host, as in inet:3000@localhost")
    return InetEndpoint(scheme, _port(port, specification), host)


def _port(text: str, specification: str) -> int:
    if text.isascii() and text.isdigit():
        if int(text) <= 65535:
            return int(text)
        raise SocketError(f"{specification!r}: the port must be 0 to 65535, not {text}")
    try:
        return socket.getservbyname(text, "tcp")
    except (OSError, ValueError):
        raise SocketError(
            f"{specification!r}: {text!r} is no port. Write inet:port@host, as in inet:3000@localhost"
        ) from None


def _passed(text: str, specification: str) -> PassedEndpoint:
    if not (text.isascii() and text.isdigit()):
        raise SocketError(f"{specification!r}: write fd:number, the descriptor of a listening socket")
    return PassedEndpoint(int(text))


def _activated() -> PassedEndpoint:
    """What systemd passed (sd_listen_fds(3))."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        raise SocketError("no socket was named, and systemd passed none: say where to listen, as inet:3000@localhost")
    count = os.environ.get("LISTEN_FDS", "")
    if count != "1":
        raise SocketError(f"systemd passed {count or 'no'} sockets (LISTEN_FDS), and a filter listens on one")
    return PassedEndpoint(_FIRST_PASSED)


# ---- Listening -------------------------------------------------------------------------------


class Listener:
    """A listening socket, and what is to be cleared away with it."""

    def __init__(self, endpoint: Endpoint, opened: socket.socket) -> None:
        self.socket = opened
        self._endpoint = endpoint
        self._family = opened.family
        self._address = opened.getsockname()
        self._file = _identity(endpoint.path) if isinstance(endpoint, UnixEndpoint) else None

    def __str__(self) -> str:
        """The specification by which an MTA reaches it, with the port that the system chose for port 0."""
        if isinstance(self._endpoint, InetEndpoint):
            return str(InetEndpoint(self._endpoint.scheme, self._address[1], self._endpoint.host))
        return str(self._endpoint)

    @property
    def exclusive(self) -> socket.socket | None:
        """The socket, unless it was passed to this process, and so may be listened at by others."""
        return None if isinstance(self._endpoint, PassedEndpoint) else self.socket

    def connections(self) -> int:
        """How many connections that came here this process has open, whether or not they were served yet."""
        return sum(self._came_here(candidate) for _, candidate in sockets())

    def _came_here(self, candidate: socket.socket) -> bool:
        if candidate.family != self._family:
            return False
        try:
            candidate.getpeername()
            address = candidate.getsockname()
        except OSError:  # a listener, or closed by libmilter at this moment, or nobody is at the other end any more
            return False
        # Whoever listens at all addresses has connections at one of them.
        return bool(address == self._address if self._family == socket.AF_UNIX else address[1] == self._address[1])

    def close(self) -> None:
        """Take no more connections. A socket that was passed to this process goes on for its other owners."""
        if self.socket.fileno() >= 0 and self.exclusive is not None:
            # libmilter may wait at it with a reference of its own, which would keep the port.
            self.socket.shutdown(socket.SHUT_RDWR)
            self._hang_up()
        self.withdraw()

    def _hang_up(self) -> None:
        """Those that wait to be accepted at a Unix socket would go on waiting; at TCP the shutdown has reset them."""
        with contextlib.suppress(OSError):  # none is left
            while self._family == socket.AF_UNIX:
                self.socket.accept()[0].close()

    def withdraw(self) -> None:
        """Nobody finds it any more; processes that have it go on."""
        if isinstance(self._endpoint, UnixEndpoint) and _identity(self._endpoint.path) == self._file:
            _remove(Path(self._endpoint.path))
        self.socket.close()


class SharedListener(Listener):
    """Of one worker among several, which leave it to those that come after them; its supervisor clears it away.

    Once :meth:`let_end` was called no other worker comes, and the worker that stops first ends it for all.
    """

    @classmethod
    def of(cls, listener: Listener) -> "SharedListener":
        """In the worker: it takes the socket over, so that no copy is left that would keep the port."""
        return cls(listener._endpoint, listener.socket)

    def __init__(self, endpoint: Endpoint, opened: socket.socket) -> None:
        super().__init__(endpoint, opened)
        self._ends = False

    def let_end(self) -> None:
        """The filter stops, or its supervisor is gone. Any thread."""
        self._ends = True

    @property
    def exclusive(self) -> socket.socket | None:
        return super().exclusive if self._ends else None

    def withdraw(self) -> None:
        self.socket.close()


@plain_errors()
def open_listener(
    specification: str | None,
    *,
    backlog: int,
    remove_socket: bool,
    mode: int | None = None,
    group: str | int | None = None,
    owner: int | None = None,
) -> Listener:
    """Open a listening socket; see :class:`milter.options.StartOptions` for the options.

    `owner`: the user id to which a Unix socket is given.
    """
    endpoint = _activated() if specification is None else parse(specification)
    match endpoint:
        case UnixEndpoint():
            opened = _listen_unix(endpoint, backlog, remove_socket, mode, group, owner)
        case InetEndpoint():
            opened = _listen_inet(endpoint, backlog)
        case PassedEndpoint():
            opened = _adopt(endpoint, backlog)
    # A process that another one was faster than would wait in accept(), and could not be stopped.
    opened.setblocking(False)
    if opened.family != socket.AF_UNIX:
        # Accepted sockets inherit it. Without it each changed message waits 40 ms (Nagle's algorithm
        # against delayed acknowledgements).
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        _warn_of_strangers(endpoint, opened)
    return Listener(endpoint, opened)


def _listen_unix(
    endpoint: UnixEndpoint,
    backlog: int,
    remove_socket: bool,
    mode: int | None,
    group: str | int | None,
    owner: int | None,
) -> socket.socket:
    path = Path(endpoint.path)
    _clear_away(path, remove_socket)
    opened = socket.socket(socket.AF_UNIX)
    try:
        opened.bind(endpoint.path)
        # Nobody can connect before listen(), so the permissions are right from the first moment.
        if group is not None or owner is not None:
            os.chown(path, -1 if owner is None else owner, -1 if group is None else group_id(group))
        if mode is not None:
            path.chmod(mode)
        opened.listen(backlog)
    except OSError as failure:
        opened.close()
        raise SocketError(_unix_reason(path, failure)) from failure
    except SocketError:
        opened.close()
        path.unlink()
        raise
    return opened


def _clear_away(path: Path, remove_socket: bool) -> None:
    """Remove a socket that a filter left behind; refuse whatever else is there."""
    try:
        kind = path.stat().st_mode
    except FileNotFoundError:
        return
    except OSError as failure:
        raise SocketError(_unix_reason(path, failure)) from failure
    if not stat.S_ISSOCK(kind):
        raise SocketError(f"{path} exists and is not a socket: choose another path, or remove it")
    if _somebody_listens(path):
        raise SocketError(f"another process is listening at {path}: stop it first, or choose another path")
    if not remove_socket:
        raise SocketError(f"a socket is left behind at {path}: remove it, or allow it with remove_socket=True")
    try:
        path.unlink(missing_ok=True)
    except OSError as failure:
        raise SocketError(f"the socket left behind at {path} cannot be removed: {failure.strerror}") from failure


def _somebody_listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as caller:
        caller.setblocking(False)
        return caller.connect_ex(str(path)) not in (errno.ECONNREFUSED, errno.ENOENT, errno.EACCES)


def _unix_reason(path: Path, failure: OSError) -> str:
    match failure.errno:
        case errno.ENOENT | errno.ENOTDIR:
            return f"cannot listen at {path}: the directory {path.parent} does not exist; create it first"
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return (
                f"cannot listen at {path}: {failure.strerror}; the user that runs the filter needs write "
                f"permission in {path.parent}"
            )
        case errno.EADDRINUSE:
            return f"cannot listen at {path}: another process was faster"
        case _:
            return f"cannot listen at {path}: {failure.strerror}"


def group_id(group: str | int) -> int:
    if isinstance(group, int):
        return group
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        raise SocketError(f"there is no group {group!r} to give the socket to") from None


def _listen_inet(endpoint: InetEndpoint, backlog: int) -> socket.socket:
    address = _resolve(endpoint)
    opened = socket.socket(endpoint.family)
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(address)
        opened.listen(backlog)
    except OSError as failure:
        opened.close()
        raise SocketError(_inet_reason(endpoint, failure)) from failure
    return opened


def _resolve(endpoint: InetEndpoint) -> Any:
    try:
        found = socket.getaddrinfo(
            endpoint.host, endpoint.port, endpoint.family, socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (OSError, UnicodeError) as failure:
        kind = "IPv6" if endpoint.scheme == "inet6" else "IPv4"
        raise SocketError(f"{endpoint}: {endpoint.host!r} has no {kind} address ({failure})") from failure
    return found[0][4]


def _inet_reason(endpoint: InetEndpoint, failure: OSError) -> str:
    match failure.errno:
        case errno.EADDRINUSE:
            return f"cannot listen on {endpoint}: the port is in use; stop the other program, or choose another port"
        case errno.EACCES | errno.EPERM:
            return f"cannot listen on {endpoint}: {failure.strerror}; ports below 1024 need privileges"
        case errno.EADDRNOTAVAIL:
            return f"cannot listen on {endpoint}: this machine has no such address"
        case _:
            return f"cannot listen on {endpoint}: {failure.strerror}"


def _adopt(endpoint: PassedEndpoint, backlog: int) -> socket.socket:
    try:
        opened = duplicate(endpoint.descriptor)
    except OSError as failure:
        raise SocketError(f"{endpoint} is not an open socket: {failure.strerror}") from failure
    opened.set_inheritable(False)
    try:
        if opened.family not in (socket.AF_UNIX, *_FAMILIES.values()) or opened.type != socket.SOCK_STREAM:
            raise SocketError(f"{endpoint} is not a stream socket of the families inet, inet6 or unix")
        if opened.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == 0:
            opened.listen(backlog)
    except OSError as failure:
        opened.close()
        raise SocketError(f"cannot listen on {endpoint}: {failure.strerror}") from failure
    except SocketError:
        opened.close()
        raise
    return opened


def _warn_of_strangers(endpoint: Endpoint, opened: socket.socket) -> None:
    host = opened.getsockname()[0]
    if not (host.startswith("127.") or host == "::1"):
        log.warning(
            "%s listens on %s: the protocol has no authentication, so whoever can connect can talk to the "
            "filter; use localhost, a Unix socket or a firewall",
            endpoint,
            host,
        )


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as failure:  # the filter has given up the privileges with which it made it
        log.info("the socket %s stays behind (%s); the next start removes it", path, failure.strerror)


def _identity(path: str) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


# ---- Connecting ------------------------------------------------------------------------------


def connect(specification: str, timeout: float) -> socket.socket:
    """Connect to a filter, as an MTA does. `timeout`, in seconds, holds for all that follows.

    Raises :class:`SocketError`.
    """
    endpoint = parse(specification)
    if isinstance(endpoint, PassedEndpoint):
        raise SocketError(f"{endpoint} can be listened on, not connected to")
    try:
        if isinstance(endpoint, UnixEndpoint):
            return _connect_unix(endpoint, timeout)
        return _connect_inet(endpoint, timeout)
    except TimeoutError as failure:
        raise SocketError(f"nobody answers at {endpoint} within {timeout:g} seconds") from failure
    except OSError as failure:
        raise SocketError(
            f"cannot connect to {endpoint}: {failure.strerror or failure}; is the filter running?"
        ) from failure


def _connect_unix(endpoint: UnixEndpoint, timeout: float) -> socket.socket:
    caller = socket.socket(socket.AF_UNIX)
    caller.settimeout(timeout)
    try:
        caller.connect(endpoint.path)
    except BaseException:
        caller.close()
        raise
    return caller


def _connect_inet(endpoint: InetEndpoint, timeout: float) -> socket.socket:
    caller = socket.socket(endpoint.family)
    caller.settimeout(timeout)
    try:
        caller.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        caller.connect(_resolve(InetEndpoint(endpoint.scheme, endpoint.port, endpoint.host or "localhost")))
    except BaseException:
        caller.close()
        raise
    return caller
