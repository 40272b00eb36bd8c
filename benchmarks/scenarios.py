# SPDX-License-Identifier: GPL-3.0-or-later
"""The work that filters are given: a list. Scenarios of one group share their rounds, so they can be compared."""

from dataclasses import dataclass
from typing import Literal

MEGABYTE = 1_000_000


@dataclass(frozen=True)
class Scenario:
    name: str
    title: str
    what: str
    kind: Literal["rate", "delay", "patience", "idle", "soak"]
    """What is looked at; see ``measure`` for how, ``report`` for the columns."""
    connections: int
    per_connection: int = 0
    """Messages until a new connection is made; 0: the same one all the time."""
    body: int | None = None
    transport: Literal["unix", "tcp"] = "unix"
    once: bool = False
    """One round is enough, or all that makes sense."""
    charted: bool = False

    @property
    def one_message_each(self) -> bool:
        return self.per_connection == 1


GROUPS = [
    [
        Scenario(
            "each-8",
            "8 connections, a message each",
            "Eight MTA processes at a time; each connects, sends a message, and leaves.",
            "rate",
            connections=8,
            per_connection=1,
            charted=True,
        )
    ],
    [
        Scenario(
            "each-16",
            "16 connections, a message each",
            "The same with sixteen.",
            "rate",
            connections=16,
            per_connection=1,
            charted=True,
        )
    ],
    [
        Scenario(
            "long-4",
            "4 long-lived connections",
            "Four connections, each sends its messages one after the other.",
            "rate",
            connections=4,
            charted=True,
        )
    ],
    [
        Scenario(
            "large",
            "1 MB bodies",
            "Four long-lived connections, messages with a body of 1,000,000 bytes, which lie in memory.",
            "rate",
            connections=4,
            body=MEGABYTE,
            charted=True,
        )
    ],
    [
        Scenario(
            "spooled",
            "2 MB bodies",
            "The same with 2,000,000 bytes, which lie in a file: they are larger than spool_size.",
            "rate",
            connections=4,
            body=2 * MEGABYTE,
        )
    ],
    [
        Scenario(
            "unix-1",
            "Unix socket, one connection",
            "One long-lived connection: how long a message takes when nothing else happens.",
            "delay",
            connections=1,
        ),
        Scenario(
            "tcp-1",
            "TCP, one connection",
            "The same over TCP on the loopback interface.",
            "delay",
            connections=1,
            transport="tcp",
        ),
    ],
    [
        Scenario(
            "unpausing",
            "4 connections that never pause",
            "Four connections for a longer time, the next message at once: does the filter neglect one of them?",
            "patience",
            connections=4,
            once=True,
        )
    ],
    [
        Scenario(
            "idle",
            "Idle connections",
            "Many connections stay open after one message each: what memory does one take?",
            "idle",
            connections=16,
            per_connection=1,
            once=True,
        )
    ],
]

SOAK = Scenario(
    "soak",
    "Soak",
    "Many messages, ten on a connection: does the memory grow?",
    "soak",
    connections=8,
    per_connection=10,
    once=True,
)
