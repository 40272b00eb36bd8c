# SPDX-License-Identifier: GPL-3.0-or-later
"""The open descriptors of this process, looked at from outside: libmilter tells nobody of its own."""

import os
import socket
from collections.abc import Iterator

__all__ = ["duplicate", "sockets"]

_MOST = 65536  # where there is no /proc


def sockets() -> Iterator[tuple[int, socket.socket]]:
    """Each descriptor that is a socket, with a duplicate of it, which is closed afterwards."""
    for descriptor in _all():
        try:
            copy = duplicate(descriptor)
        except OSError:  # closed since it was listed, or no socket
            continue
        with copy:
            yield descriptor, copy


def duplicate(descriptor: int) -> socket.socket:
    """A socket of its own for an open descriptor. Raises OSError when it is closed, or no socket."""
    copy = os.dup(descriptor)
    try:
        return socket.socket(fileno=copy)
    except OSError:
        os.close(copy)
        raise


def _all() -> list[int]:
    try:
        return [int(name) for name in os.listdir("/proc/self/fd")]
    except OSError:  # no /proc, as in a bare chroot
        return list(range(min(os.sysconf("SC_OPEN_MAX"), _MOST)))
