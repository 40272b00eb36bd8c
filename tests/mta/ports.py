# SPDX-License-Identifier: GPL-3.0-or-later
"""Loopback ports for servers of the tests' own: kept free for them, and watched without connecting.

A port is never probed by connecting: the server would take that for a client, and ask its filters.
"""

import errno
import socket
import time
from collections.abc import Callable
from pathlib import Path

PATIENCE = 30.0
"""Seconds before a wait is given up as failed; nothing that works comes near it."""

_LISTEN = "0A"


def reserve_port() -> socket.socket:
    """A bound socket that keeps its port from being given to others, yet lets a server listen there.

    Linux allows it: both set SO_REUSEADDR, and only the server listens.
    """
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind(("127.0.0.1", 0))
    return reserved


def port_of(bound: socket.socket) -> int:
    port: int = bound.getsockname()[1]
    return port


def wait_until_free(port: int) -> None:
    """Wait until nobody listens there: a server's children may outlive it by a moment, with its ports."""
    _wait(lambda: not _is_taken(port), f"somebody still listens on port {port}")


def wait_until_listening(port: int) -> None:
    """Wait until somebody listens there, without taking the place of him who is about to."""
    _wait(lambda: _has_listener(port), f"nobody listens on port {port}")


def _wait(condition: Callable[[], bool], failure: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(failure)
        time.sleep(0.002)


def _is_taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
            probe.listen()
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            return True
    return False


def _has_listener(port: int) -> bool:
    local = f":{port:04X}"
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    return any(columns[1].endswith(local) and columns[3] == _LISTEN for columns in map(str.split, lines))
