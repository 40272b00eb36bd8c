# SPDX-License-Identifier: GPL-3.0-or-later
"""Very many MTA sessions of mixed kinds, played by a process of its own: ``python -m tests.horde SOCKET FIRST COUNT``.

Each is said in one piece, without a look at the answers, so that it costs next to nothing here; whoever says QUIT reads
until the filter has closed the connection, the others hang up. Which kind a session is of follows from its number.
"""

import sys
from collections.abc import Iterable

from milter.listener import connect
from milter.testing.wire import ALL_ACTIONS, ALL_STEPS, Command, Packet, join_strings, pack_offer

PATIENCE = 60.0


def packet(command: Command, *strings: str) -> bytes:
    return Packet(command, join_strings(*strings)).encode()


NEGOTIATE = Packet(Command.NEGOTIATE, pack_offer(6, ALL_ACTIONS, ALL_STEPS)).encode()
GREETING = b"".join(
    (
        Packet(Command.MACRO, b"Cj\0mta.example\0").encode(),
        Packet(Command.CONNECT, b"client.example\x004\xc0\x00192.0.2.1\0").encode(),
        packet(Command.HELO, "client.example"),
    )
)
OPENING = NEGOTIATE + GREETING
QUIT, QUIT_NC, ABORT = (Packet(command).encode() for command in (Command.QUIT, Command.QUIT_NC, Command.ABORT))
END = Packet(Command.END_OF_MESSAGE).encode()


def envelope(*recipients: str) -> bytes:
    return b"".join(
        (
            Packet(Command.MACRO, b"Mi\0QID\0").encode(),
            packet(Command.MAIL, "<ann@client.example>", "SIZE=1000"),
            *(packet(Command.RCPT, recipient) for recipient in recipients),
            Packet(Command.DATA).encode(),
        )
    )


def content(*fields: str, body: bytes = b"text\r\n" * 100) -> bytes:
    chunks = [body[start : start + 65535] for start in range(0, len(body), 65535)]
    return b"".join(
        (
            *(packet(Command.HEADER, *field.split(": ", 1)) for field in fields),
            Packet(Command.EOH).encode(),
            *(Packet(Command.BODY, chunk).encode() for chunk in chunks),
        )
    )


MESSAGE = envelope("<bob@mta.example>", "<eve@mta.example>") + content("Subject: test", "X-A: 1", "x-a: 2")

KINDS = (
    OPENING + MESSAGE + END + QUIT,
    OPENING + (MESSAGE + END) * 3 + QUIT,
    OPENING + MESSAGE + ABORT + MESSAGE + END + ABORT + QUIT,
    OPENING + MESSAGE + END + QUIT_NC + GREETING + MESSAGE + END + QUIT,
    OPENING + envelope("<nobody@mta.example>") + ABORT + QUIT,
    OPENING + envelope("<bob@mta.example>") + content("X-Raise: yes") + END + QUIT,
    OPENING + envelope("<bob@mta.example>") + content("X-Refuse: yes") + END + QUIT,
    OPENING + envelope("<bob@mta.example>") + content("X-Large: yes", body=b"0123456789abcd\r\n" * 1000) + END + QUIT,
    OPENING + packet(Command.UNKNOWN, "FOO") + QUIT,
    NEGOTIATE + QUIT,
    OPENING + MESSAGE,  # from here on: hung up
    OPENING + MESSAGE + END,
    OPENING + MESSAGE[:-3],
    NEGOTIATE[:7],
    OPENING + envelope("<bob@mta.example>"),
    OPENING + Packet(b"Z").encode(),
)


def play(socket: str, numbers: Iterable[int]) -> None:
    for number in numbers:
        said = KINDS[number % len(KINDS)]
        with connect(socket, PATIENCE) as caller:
            caller.sendall(said)
            if said.endswith(QUIT):
                while caller.recv(65536):
                    pass


if __name__ == "__main__":
    play(sys.argv[1], range(int(sys.argv[2]), int(sys.argv[2]) + int(sys.argv[3])))
