# SPDX-License-Identifier: GPL-3.0-or-later
"""An SMTP client that hides nothing: it shows each answer whole, and sends each byte as it is given.

`smtplib` refuses or repairs much of what a test wants to send (8-bit commands, odd arguments, exact line
ends), so this speaks to the socket itself.
"""

import re
import socket
import ssl
from collections.abc import Sequence
from types import TracebackType
from typing import NamedTuple, Self

PATIENCE = 30.0
"""Seconds before a wait for an answer is given up as failed; nothing that works comes near it."""


class Answer(NamedTuple):
    """A reply of the server; `lines` without code, as UTF-8 with `surrogateescape`."""

    code: int
    lines: tuple[str, ...]

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def __str__(self) -> str:
        return f"{self.code} {self.text}"


class SmtpClient:
    """One SMTP session with a server on this machine; a context manager that ends with QUIT.

    Commands are sent as they are given. A server that hangs up instead of answering is a `ConnectionError`.
    """

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), PATIENCE)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._replies = self._socket.makefile("rb")
        self.greeting = self.answer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.command("QUIT")
        except ConnectionError:
            pass  # after 421, or after drop(), nobody is there to say goodbye to
        finally:
            self.drop()

    def command(self, line: str | bytes) -> Answer:
        """Send one line, to which CRLF is added, and wait for the answer."""
        self.write(_bytes(line) + b"\r\n")
        return self.answer()

    def pipeline(self, *lines: str | bytes) -> list[Answer]:
        """Send several lines in one piece, then wait for all the answers."""
        self.write(b"".join(_bytes(line) + b"\r\n" for line in lines))
        return [self.answer() for _ in lines]

    def ehlo(self, name: str = "client.test") -> Answer:
        return self.command(f"EHLO {name}")

    def mail(self, sender: str, *params: str) -> Answer:
        return self.command(" ".join((f"MAIL FROM:<{sender}>", *params)))

    def rcpt(self, recipient: str, *params: str) -> Answer:
        return self.command(" ".join((f"RCPT TO:<{recipient}>", *params)))

    def data(self, content: str | bytes) -> Answer:
        """DATA and the content; the answer to the final dot, or that to DATA when it was refused.

        Of a `str` the line ends become CRLF; `bytes` go out as they are, with dots doubled and a final CRLF.
        """
        answer = self.command("DATA")
        if answer.code != 354:
            return answer
        self.write(_stuffed(content))
        return self.answer()

    def send(self, sender: str, recipients: str | Sequence[str], content: str | bytes, *params: str) -> Answer:
        """A whole transaction, `params` for MAIL; answers for the first refused command or the final dot."""
        answer = self.mail(sender, *params)
        for recipient in [recipients] if isinstance(recipients, str) else recipients:
            if answer.code < 300:
                answer = self.rcpt(recipient)
        return self.data(content) if answer.code < 300 else answer

    def xclient(self, **attributes: str) -> Answer:
        """Be somebody else (`NAME`, `ADDR`, `PORT`, `LOGIN` …); the session starts anew with a greeting."""
        return self.command(" ".join(("XCLIENT", *(f"{key}={value}" for key, value in attributes.items()))))

    def start_tls(self) -> None:
        """The handshake, once STARTTLS was answered. The server is not asked who it is."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        self._socket = context.wrap_socket(self._socket)
        self._replies = self._socket.makefile("rb")

    def write(self, raw: bytes) -> None:
        """Send bytes and wait for nothing."""
        self._socket.sendall(raw)

    def drop(self) -> None:
        """Hang up without a word."""
        self._replies.close()
        self._socket.close()

    def answer(self) -> Answer:
        """The next reply; waits for it."""
        lines: list[str] = []
        while match := re.fullmatch(rb"([0-9]{3})(?:([ -])(.*))?\r?\n", self._replies.readline(), re.DOTALL):
            lines.append((match[3] or b"").rstrip(b"\r").decode("utf-8", "surrogateescape"))
            if match[2] != b"-":
                return Answer(int(match[1]), tuple(lines))
        raise ConnectionError(f"the server hung up, or does not speak SMTP, after {lines!r}")


def _bytes(text: str | bytes) -> bytes:
    return text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape")


def _stuffed(content: str | bytes) -> bytes:
    """The content with dots doubled and the final dot."""
    raw = content if isinstance(content, bytes) else _bytes(re.sub(r"\r?\n", "\r\n", content))
    raw = re.sub(rb"(\A|\r\n)\.", rb"\1..", raw)
    return raw + (b".\r\n" if not raw or raw.endswith(b"\r\n") else b"\r\n.\r\n")
