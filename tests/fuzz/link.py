# SPDX-License-Identifier: GPL-3.0-or-later
"""A connection that carries any bytes in any pieces, and the comparison of what comes back with the model."""

import contextlib
import selectors
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from milter.listener import connect
from milter.testing import Packet, WireError
from milter.testing.wire import Decoder
from tests.fuzz.model import Expected, Prediction

PATIENCE = 60.0
"""Seconds until a connection that says nothing, and does not close either, counts as hanging. Nobody waits so long."""

_ANSWERS = b"Oacdrsty"
_CHANGES = b"+-2behimqp"


class Surprise(AssertionError):
    """The filter answered something else than the model."""


@dataclass(frozen=True)
class Ending:
    """How a connection ends: after so many bytes (None: all), and with or without waiting for the answers."""

    at: int | None = None
    abruptly: bool = False


WHOLE = Ending()


class Line:
    """A connection to a filter, which stays open while the caller thinks."""

    def __init__(self, where: str) -> None:
        self.received = bytearray()
        self._socket = connect(where, PATIENCE)
        self._socket.setblocking(False)
        self._closed = False

    def close(self) -> None:
        self._socket.close()

    def send(self, stream: bytes, cuts: Sequence[int], due: int) -> None:
        """Send `stream` in pieces that end at `cuts`, and wait until so many answers are there, or the end."""
        pieces = _pieces(stream, cuts)
        self._pump(pieces, lambda: not pieces and (self._closed or _answers_in(self.received) >= due))

    def finish(self) -> bytes:
        """Say no more, and take in what comes until the filter closes."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)
        self._pump([], lambda: self._closed)
        return bytes(self.received)

    def drop(self, stream: bytes, cuts: Sequence[int]) -> None:
        """Send what goes without waiting, and be gone."""
        with contextlib.suppress(OSError):
            for piece in _pieces(stream, cuts):
                self._socket.send(piece)
        self.close()

    def _pump(self, pieces: list[bytes], done: Callable[[], bool]) -> None:
        """Send and receive at the same time: neither side may wait for the other to read."""
        last = time.monotonic()
        with selectors.DefaultSelector() as selector:
            selector.register(self._socket, selectors.EVENT_READ)
            while not done():
                selector.modify(self._socket, selectors.EVENT_READ | (selectors.EVENT_WRITE if pieces else 0))
                ready = selector.select(1)
                if ready:
                    last = time.monotonic()
                    self._step(ready[0][1], pieces)
                elif time.monotonic() - last > PATIENCE:
                    raise Surprise(f"the filter neither answers nor closes; it said {bytes(self.received[-200:])!r}")

    def _step(self, mask: int, pieces: list[bytes]) -> None:
        if mask & selectors.EVENT_READ:
            data = self._receive()
            self.received += data
            self._closed = not data
        if mask & selectors.EVENT_WRITE and pieces:
            pieces[0] = pieces[0][self._sent(pieces[0]) :]
            if not pieces[0]:
                del pieces[0]
        if self._closed:
            pieces.clear()  # nobody takes it

    def _receive(self) -> bytes:
        try:
            return self._socket.recv(1 << 16)
        except ConnectionError:
            return b""

    def _sent(self, piece: bytes) -> int:
        try:
            return self._socket.send(piece)
        except BlockingIOError:
            return 0
        except ConnectionError:
            return len(piece)  # what was answered before is still to be read


def exchange(where: str, stream: bytes, cuts: Sequence[int], ending: Ending = WHOLE) -> bytes | None:
    """All of a connection: what came back until the filter closed, or None if nobody waited."""
    stream = stream if ending.at is None else stream[: ending.at]
    line = Line(where)
    with contextlib.closing(line):
        if ending.abruptly:
            line.drop(stream, cuts)
            return None
        line.send(stream, cuts, 0)
        return line.finish()


def _pieces(stream: bytes, cuts: Sequence[int]) -> list[bytes]:
    places = sorted({cut for cut in cuts if 0 < cut < len(stream)})
    pieces = [stream[start:end] for start, end in zip([0, *places], [*places, len(stream)], strict=True)]
    return [piece for piece in pieces if piece]


# ---- The comparison


def compare(received: bytes, prediction: Prediction) -> None:
    """Raises `Surprise`."""
    packets = _packets(received)
    for expected in prediction.answers:
        changes: list[Packet] = []
        while packets and packets[0].letter in _CHANGES:
            changes.append(packets.pop(0))
        if not packets:
            raise Surprise(f"no answer to {expected.cause}; due was {expected.letters}")
        _compare_one(packets.pop(0), [change for change in changes if change.letter != b"p"], expected)
    if packets and not prediction.loose:
        raise Surprise(f"the filter said more than it was asked: {packets[:3]!r}")


def _answers_in(received: bytearray) -> int:
    decoder = Decoder()
    decoder.feed(bytes(received))
    count = 0
    with contextlib.suppress(WireError):  # which the comparison will tell
        while (packet := decoder.next()) is not None:
            count += packet.letter in _ANSWERS
    return count


def _packets(received: bytes) -> list[Packet]:
    decoder = Decoder()
    decoder.feed(received)
    packets = []
    try:
        while (packet := decoder.next()) is not None:
            packets.append(packet)
    except WireError as error:
        raise Surprise(f"the filter broke the protocol: {error}") from None
    strange = [packet for packet in packets if packet.letter not in _ANSWERS + _CHANGES]
    if strange or decoder.pending:
        raise Surprise(f"the filter sent {strange[:3]!r}, and {decoder.pending} bytes of an unfinished packet")
    return packets


def _compare_one(answer: Packet, changes: list[Packet], expected: Expected) -> None:
    letter = answer.letter.decode()
    if letter not in expected.letters:
        raise Surprise(f"the answer to {expected.cause} is {answer!r}; due was {expected.letters}{expected.code or ''}")
    if expected.code and not answer.data.startswith(b"%d" % expected.code):
        raise Surprise(f"the answer to {expected.cause} is {answer!r}; due was a reply of {expected.code}xx")
    if not answer.data.startswith(expected.data):
        raise Surprise(f"the answer to {expected.cause} is {answer!r}; due was {expected.data!r}")
    wrong = expected.changes(changes)
    if wrong:
        raise Surprise(f"{expected.cause}: {wrong}")
