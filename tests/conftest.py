# SPDX-License-Identifier: GPL-3.0-or-later
"""Fixtures for tests that run a filter on the real libmilter, in this process."""

import contextlib
import gc
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from hypothesis import HealthCheck, settings

from milter import Milter, Server
from milter.gil import gil_is_on
from milter.testing import Client, EndOfMessage

# By its entry point, where the package is installed.
pytest_plugins = ["pytest_milter"]

# What a test finds says nothing of how busy the machine is.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

Serve: TypeAlias = Callable[..., "Peer"]


class Peer:
    """A filter that runs, as its MTA sees it."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self._clients: list[Client] = []

    def client(self) -> Client:
        """A connection on which nothing was said yet."""
        client = Client.connect(self.server.socket)
        self._clients.append(client)
        return client

    def greeted(self, **offer: int) -> Client:
        """A connection after negotiation, connect and HELO."""
        client = self.client()
        client.negotiate(**offer)
        client.connect_info()
        client.helo()
        return client

    def forget(self, client: Client) -> None:
        """Nobody needs to close it at the end."""
        self._clients.remove(client)

    def hang_up(self) -> None:
        for client in self._clients:
            client.close()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Start a filter in this process; it is stopped after the test, and must have forgotten everyone."""
    peers: list[Peer] = []

    def start(app: Milter[Any, Any], **options: Any) -> Peer:
        peer = Peer(app.start(f"unix:{tmp_path}/filter.sock", **options))
        peers.append(peer)
        return peer

    yield start
    for peer in peers:
        peer.hang_up()
        peer.server.stop()
        assert peer.server.engine.connections == 0


def collect() -> None:
    """Without the GIL, what one thread has made and another gives up is freed by the first, when it runs Python again.

    Or by the collector, which comes by sooner or later: now.
    """
    if not gil_is_on():
        gc.collect()


def begin_message(client: Client, recipient: str = "<bob@mta.example>") -> None:
    """Sender, recipient, DATA."""
    client.mail("<ann@client.example>")
    client.rcpt(recipient)
    client.data()


def send_content(client: Client, body: bytes = b"text\r\n") -> EndOfMessage:
    """Header, body and the end of a message."""
    client.header("Subject", "test")
    client.eoh()
    if body:
        client.body(body)
    return client.end_of_message()


def send_message(client: Client) -> EndOfMessage:
    begin_message(client)
    return send_content(client)


def has_ipv6() -> bool:
    with socket.socket(socket.AF_INET6) as probe, contextlib.suppress(OSError):
        probe.bind(("::1", 0))
        return True
    return False
