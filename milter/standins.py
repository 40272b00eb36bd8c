# SPDX-License-Identifier: GPL-3.0-or-later
"""The sockets that only libmilter sees, so that the library can give it any socket it likes.

libmilter insists on opening its listening socket by itself, tells of errors in the system's log
only, and keeps the descriptor to itself. So it is let open one that nobody knows, of the right
family; its descriptor is found by its address, and from then on ``dup2`` decides what is behind it.
"""

import secrets
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from milter import children
from milter.descriptors import sockets
from milter.errors import MilterError

_ATTEMPTS = 20
_EPHEMERAL_PORTS = (49152, 65535)
_LONGEST_DIRECTORY = 100


class Placeholder:
    """A socket that libmilter opens, on an address of our choice that nobody else uses."""

    def __init__(self, *families: int, fallback: Path | None = None) -> None:
        """`families`: those that will do, the best one first: AF_UNIX alone, or others.

        `fallback`: a directory for a Unix socket, where there is none for temporary files.
        """
        self._families = families
        self.family = families[0]
        """Of the socket that libmilter has opened."""
        self._fallback = fallback
        self._directory: Path | None = None
        self._address: tuple[str, int] | str = ""

    def __enter__(self) -> "Placeholder":
        if self.family == socket.AF_UNIX:
            self._directory = _private_directory(self._fallback)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, failure: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._directory is not None:
            (self._directory / "s").unlink(missing_ok=True)
            self._directory.rmdir()

    def specifications(self) -> Iterator[str]:
        """What to tell libmilter, again and again until it succeeds: a port may be in use."""
        if self._directory is not None:
            self._address = str(self._directory / "s")
            yield f"unix:{self._address}"
            return
        lowest, highest = _EPHEMERAL_PORTS
        families = self._families * _ATTEMPTS
        for self.family in families:
            scheme, host = ("inet6", "::1") if self.family == socket.AF_INET6 else ("inet", "127.0.0.1")
            port = lowest + secrets.randbelow(highest - lowest)
            self._address = (host, port)
            yield f"{scheme}:{port}@{host}"

    def find(self) -> int:
        """The descriptor behind which libmilter's socket is."""
        for descriptor, candidate in sockets():
            if _listens(candidate, self.family, self._address):
                return descriptor
        raise MilterError("libmilter's listening socket was not found among the descriptors of this process")


class Silence:
    """A socket at which libmilter waits for nobody: one end of a pair whose other end never says anything.

    It needs neither a name nor a directory. It must be connected: libmilter takes a socket that hangs up for a broken
    listener, and ends.
    """

    def __init__(self) -> None:
        self.socket, self._other_end = socket.socketpair()
        self.socket.setblocking(False)
        self._hidden = [children.hide(end.fileno()) for end in (self.socket, self._other_end)]

    def shutdown(self, how: int) -> None:
        """With SHUT_RDWR it ends the wait of whoever waits there."""
        self.socket.shutdown(how)

    def close(self) -> None:
        for number in self._hidden:
            children.show(number)
        self.socket.close()
        self._other_end.close()


class StageDoor:
    """A listening socket by which only this process, and its user, come to libmilter while no filter listens."""

    def __init__(self, family: int) -> None:
        self._directory = _private_directory() if family == socket.AF_UNIX else None
        self.socket = socket.socket(family)
        self.socket.setblocking(False)
        if self._directory is not None:
            self.socket.bind(str(self._directory / "s"))
        else:
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.socket.bind(("::1" if family == socket.AF_INET6 else "127.0.0.1", 0))
        self.socket.listen()
        self._hidden = children.hide(self.socket.fileno())

    def remove(self) -> None:
        """Nobody finds it any more."""
        children.show(self._hidden)
        if self._directory is not None:
            (self._directory / "s").unlink(missing_ok=True)
            self._directory.rmdir()


def connect_to(listener: socket.socket) -> socket.socket:
    """A connection to a listening socket of this process."""
    address = listener.getsockname()
    if listener.family != socket.AF_UNIX and address[0] in _EVERYWHERE:
        address = (_EVERYWHERE[address[0]], *address[1:])
    caller = socket.socket(listener.family)
    try:
        caller.connect(address)
    except BaseException:
        caller.close()
        raise
    return caller


_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def _private_directory(fallback: Path | None = None) -> Path:
    """For a socket's path, which may have 107 bytes at most."""
    reasons = []
    for parent in (None, Path("/tmp"), Path("/dev/shm"), fallback):  # None: the system's choice, or TMPDIR
        try:
            directory = tempfile.mkdtemp(prefix="milter-", dir=parent)
        except OSError as failure:  # there is none, or it is full or read-only
            reasons.append(str(failure))
            continue
        if len(directory) <= _LONGEST_DIRECTORY:
            return Path(directory)
        Path(directory).rmdir()
    raise MilterError(
        "libmilter needs a directory for its socket at the start, and none can be written: let TMPDIR name one "
        f"({'; '.join(reasons)})"
    )


def _listens(candidate: socket.socket, family: int, address: tuple[str, int] | str) -> bool:
    return (
        candidate.family == family
        and candidate.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == 1
        and candidate.getsockname()[: len(address)] == address
    )
