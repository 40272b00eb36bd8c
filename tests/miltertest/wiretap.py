# SPDX-License-Identifier: GPL-3.0-or-later
"""A socket between miltertest and a filter, which keeps in files what the filter writes.

miltertest can check only a part of it: the text of a reply at the end of a message only, and a
changed sender not at all. Nor does it wait until a filter has closed a connection.
"""

import contextlib
import os
import select
import socket
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

_LENGTH = 4  # bytes of the length before each packet


class Wiretap:
    """Passes on each connection to `front` to the filter at `back`.

    What comes from the filter on connection N, counted from 1, is appended to the file ``wire.N`` in
    `directory`, packet by packet, each before it is passed on. Whoever reads the named pipe
    ``wire.N.closed`` waits until the filter has closed the connection.
    """

    def __init__(self, directory: Path, front: Path, back: Path) -> None:
        self._directory = directory
        self._back = back
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(front))
        self._listener.listen()
        self._pipes: list[int] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, failure: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
        for thread in self._threads:
            thread.join()
        for pipe in self._pipes:
            os.close(pipe)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            number = len(self._threads)
            thread = threading.Thread(target=self._serve, args=(client, number, self._pipe(number)), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _pipe(self, number: int) -> int:
        """Both its ends are open until the end of all, so no reader or writer waits for the other to open it."""
        path = self._directory / f"wire.{number}.closed"
        os.mkfifo(path)
        self._pipes.append(os.open(path, os.O_RDWR))
        return self._pipes[-1]

    def _serve(self, client: socket.socket, number: int, closed: int) -> None:
        with client, socket.socket(socket.AF_UNIX) as server, contextlib.suppress(OSError):
            # An OSError: one side has gone away, so the other one goes too.
            server.connect(str(self._back))
            _relay(client, server, self._directory / f"wire.{number}")
        os.write(closed, b".")


def _relay(client: socket.socket, server: socket.socket, record: Path) -> None:
    pending = b""
    readable = [client, server]
    with record.open("wb", buffering=0) as file:
        while True:
            ready, _, _ = select.select(readable, [], [])
            if client in ready:
                commands = client.recv(65536)
                if commands:
                    server.sendall(commands)
                else:
                    server.shutdown(socket.SHUT_WR)
                    readable.remove(client)
            if server in ready:
                answers = server.recv(65536)
                if not answers:
                    return
                pending += answers
                whole = _whole_packets(pending)
                file.write(pending[:whole])
                client.sendall(pending[:whole])
                pending = pending[whole:]


def _whole_packets(data: bytes) -> int:
    """How many bytes of `data` are whole packets: miltertest reads a packet in one go."""
    position = 0
    while len(data) >= position + _LENGTH:
        end = position + _LENGTH + int.from_bytes(data[position : position + _LENGTH])
        if end > len(data):
            break
        position = end
    return position
