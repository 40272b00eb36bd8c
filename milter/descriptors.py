# SPDX-License-Identifier: GPL-3.0-or-later
"""The descriptors of this process: those that are open, looked at from outside, since libmilter tells nobody of its
own; and those that must be.
"""

import contextlib
import os
import resource
import socket
import sys
from collections.abc import Iterator

__all__ = ["duplicate", "open_standard_streams", "raise_limit", "sockets"]

_MOST = 65536  # where there is no /proc, and of the limit: old programs close all that there may be, one by one


def sockets() -> Iterator[tuple[int, socket.socket]]:
    """Each descriptor that is a socket, to be looked at and not to be kept.

    This needs no descriptor of its own: a filter that stops asks here when there may be none left.
    """
    for descriptor in _all():
        try:
            borrowed = socket.socket(fileno=descriptor)
        except OSError:  # closed since it was listed, or no socket
            continue
        try:
            yield descriptor, borrowed
        finally:
            borrowed.detach()


def duplicate(descriptor: int) -> socket.socket:
    """A socket of its own for an open descriptor. Raises OSError when it is closed, or no socket."""
    copy = os.dup(descriptor)
    try:
        return socket.socket(fileno=copy)
    except OSError:
        os.close(copy)
        raise


def open_standard_streams() -> None:
    """What was closed of standard input, output and error leads to /dev/null from now on.

    Otherwise the next sockets and files get the numbers 0 to 2, and what children print goes there.
    """
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            os.dup2(opened, descriptor)  # for children, too
            if opened != descriptor:
                os.close(opened)
            if getattr(sys, name) is None:
                setattr(sys, name, open(descriptor, "r" if descriptor == 0 else "w", closefd=False))  # noqa: SIM115


def raise_limit() -> None:
    """Let this process and its children open as many files as the hard limit allows, up to `_MOST`.

    The soft limit is 1024 on most systems, for the sake of programs with select(), which knows no more. Nothing here
    uses select(), and each connection of an MTA takes a descriptor.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST if hard == resource.RLIM_INFINITY else min(hard, _MOST)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):  # macOS says that there is no limit, and has one
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _all() -> list[int]:
    try:
        return [int(name) for name in os.listdir("/proc/self/fd")]
    except OSError:  # no /proc, as in a bare chroot
        return list(range(min(os.sysconf("SC_OPEN_MAX"), _MOST)))
