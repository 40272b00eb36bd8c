# SPDX-License-Identifier: GPL-3.0-or-later
"""The end of the line: an SMTP server that takes everything and remembers it byte for byte.

It accepts any ESMTP argument, any line length and any byte, so that whatever a filter or the MTA did to a
message can be seen. It listens on the loopback interface only.
"""

import contextlib
import queue
import re
import socketserver
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedIOBase
from types import TracebackType
from typing import Self

PATIENCE = 30.0
"""Seconds before a wait is given up as failed; nothing that works comes near it."""

EXTENSIONS = ("sink.test", "PIPELINING", "8BITMIME", "SMTPUTF8", "DSN", "ENHANCEDSTATUSCODES")

_PATH = re.compile(r'\s*<((?:"(?:\\.|[^"\\])*"|[^">])*)>')
_FIELD = re.compile(rb"([^\x00-\x20:\x7f]+)[ \t]*:((?:[^\r]|\r(?!\n)|\r\n[ \t])*)\r\n")


@dataclass(frozen=True)
class Delivery:
    """One message as it was delivered. Text is UTF-8 with `surrogateescape`, so no byte is lost."""

    mail: str
    """What followed `MAIL FROM:`, with its arguments."""
    rcpts: tuple[str, ...]
    """What followed each `RCPT TO:`, with its arguments."""
    content: bytes
    """Header and body, lines ending as they came, dots undoubled."""

    @property
    def sender(self) -> str:
        """The reverse path without its brackets; empty for the null sender."""
        return _address(self.mail)

    @property
    def recipients(self) -> tuple[str, ...]:
        """The recipients without brackets, in the order in which the MTA gave them, which is its own."""
        return tuple(_address(rcpt) for rcpt in self.rcpts)

    @property
    def mail_params(self) -> frozenset[str]:
        """The arguments of MAIL; an MTA passes them on in an order of its own."""
        return _params(self.mail)

    @property
    def rcpt_params(self) -> tuple[frozenset[str], ...]:
        """The arguments of each RCPT, in the order of `recipients`."""
        return tuple(_params(rcpt) for rcpt in self.rcpts)

    @property
    def fields(self) -> tuple[tuple[str, str], ...]:
        """The header fields in order; a value is all that lies between the colon and the last line end."""
        return tuple((_text(name), _text(value)) for name, value in _split(self.content)[0])

    @property
    def body(self) -> bytes:
        return _split(self.content)[1]

    def values(self, name: str) -> list[str]:
        """The values of the fields of that name, without the white space around them."""
        return [value.strip() for field, value in self.fields if field.lower() == name.lower()]


class Sink:
    """The server; a context manager. Messages wait in the order of their arrival until they are asked for."""

    def __init__(self) -> None:
        self._arrived: queue.SimpleQueue[Delivery] = queue.SimpleQueue()
        self._server = _Server(self._arrived)
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def next(self, patience: float = PATIENCE) -> Delivery:
        """The next message; waits for it."""
        try:
            return self._arrived.get(timeout=patience)
        except queue.Empty:
            raise AssertionError(f"no message was delivered within {patience:g} seconds") from None

    def drain(self) -> list[Delivery]:
        """What has arrived and was not asked for yet; does not wait."""
        arrived: list[Delivery] = []
        with contextlib.suppress(queue.Empty):
            while True:
                arrived.append(self._arrived.get_nowait())
        return arrived


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, arrived: queue.SimpleQueue[Delivery]) -> None:
        super().__init__(("127.0.0.1", 0), _Session)
        self.arrived = arrived


class _Session(socketserver.StreamRequestHandler):
    """One SMTP session."""

    server: _Server
    disable_nagle_algorithm = True

    def handle(self) -> None:
        # The peer may go at any time; what it had not finished was not delivered.
        with contextlib.suppress(ConnectionError, EOFError):
            self._converse()

    def _converse(self) -> None:
        self._say("220 sink.test ESMTP")
        mail, rcpts = "", list[str]()
        while (line := self.rfile.readline()).endswith(b"\n"):
            verb, argument = line[:4].upper(), _text(line.rstrip(b"\r\n")).partition(":")[2]
            if verb in (b"EHLO", b"HELO", b"MAIL", b"RSET"):
                mail, rcpts = argument, []
            match verb:
                case b"EHLO":
                    self._say(*(f"250-{word}" for word in EXTENSIONS[:-1]), f"250 {EXTENSIONS[-1]}")
                case b"RCPT":
                    rcpts.append(argument)
                    self._say("250 2.1.5 Ok")
                case b"DATA":
                    self._say("354 Go on")
                    self.server.arrived.put(Delivery(mail, tuple(rcpts), b"".join(_content(self.rfile))))
                    self._say("250 2.0.0 Delivered")
                case b"QUIT":
                    self._say("221 2.0.0 Bye")
                    return
                case _:
                    self._say("250 2.0.0 Ok")

    def _say(self, *lines: str) -> None:
        self.wfile.write("".join(f"{line}\r\n" for line in lines).encode())


def _content(stream: BufferedIOBase) -> Iterator[bytes]:
    """The lines up to the final dot. Only CRLF ends one: a dot after a bare LF is text (RFC 5321, 2.3.8)."""
    begins_line = True
    while line := stream.readline():
        if begins_line and line == b".\r\n":
            return
        yield line[1:] if begins_line and line.startswith(b".") else line
        begins_line = line.endswith(b"\r\n")
    raise EOFError("the session ended within the content")


def _split(content: bytes) -> tuple[list[tuple[bytes, bytes]], bytes]:
    fields, position = [], 0
    while match := _FIELD.match(content, position):
        fields.append((match[1], match[2]))
        position = match.end()
    return fields, content[position:].removeprefix(b"\r\n")


def _address(argument: str) -> str:
    match = _PATH.match(argument)
    return match[1] if match else argument


def _params(argument: str) -> frozenset[str]:
    return frozenset(_PATH.sub("", argument, count=1).split())


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")
