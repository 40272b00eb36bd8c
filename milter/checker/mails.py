# SPDX-License-Identifier: GPL-3.0-or-later
"""The messages that ``milter check`` sends: found, read, and made what an MTA would have received.

A file may have LF or CRLF line ends, and any bytes. What an MTA does to a message before a filter sees it
is done here, too: Postfix makes a space of a bare CR; Sendmail refuses the message, and takes a NUL out of a header.
"""

import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from milter.testing.delivery import HEADER_START, Header, Message, Postfix

_SAMPLE = b"""\
From: Ann <ann@client.example>
To: Bob <bob@mta.example>
Date: Thu, 01 Jan 2026 12:00:00 +0000
Message-ID: <sample@client.example>
Subject: A sample message
MIME-Version: 1.0
Content-Type: text/plain; charset=utf-8

Hello Bob,

this message was sent by "milter check".

Ann
"""

_BARE_CR = re.compile(rb"\r(?!\n)")


class MailError(Exception):
    """There is no message to send; says where, and why."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where a message comes from, and what it is called; ``path`` is None for the sample."""

    name: str
    path: str | None

    def read(self) -> Message:
        """Raises `MailError` for what is no message."""
        return _parse(self.name, self._data())

    def _data(self) -> bytes:
        if self.path is None:
            return _SAMPLE
        try:
            return sys.stdin.buffer.read() if self.path == "-" else Path(self.path).read_bytes()
        except OSError as error:
            raise MailError(f"{self.name} cannot be read: {error.strerror}") from None


def sources(paths: Sequence[str]) -> list[Source]:
    """The messages that are meant: files, ``-`` for standard input, all ``.eml`` below a directory; else a sample.

    Raises `MailError` for a directory without any.
    """
    if not paths:
        return [Source("the sample", None)]
    return [source for path in paths for source in _sources_of(path)]


def _sources_of(path: str) -> list[Source]:
    if path == "-":
        return [Source("standard input", path)]
    if not os.path.isdir(path):
        return [Source(path, path)]
    found = [Source(name, name) for name in sorted(_eml_files(path))]
    if not found:
        raise MailError(f"{path} is a directory without a file named *.eml in it, or below it")
    return found


def _eml_files(directory: str) -> Iterator[str]:
    for parent, _, names in os.walk(directory, onerror=_refuse):
        yield from (os.path.join(parent, name) for name in names if name.lower().endswith(".eml"))


def _refuse(error: OSError) -> None:
    # What is not looked at is not checked, and a person who reads "accepted" must be able to rely on it.
    raise MailError(f"{error.filename} cannot be read: {error.strerror}")


def _parse(name: str, data: bytes) -> Message:
    if not data:
        raise MailError(f"{name} is empty")
    first_line = data.partition(b"\n")[0]
    if first_line.strip() and not first_line.startswith(b"From ") and not HEADER_START.match(data):
        raise MailError(f"{name} is not a message: its first line is no header field, which is a name and a colon")
    return Message.parse(data)


def as_postfix_receives(message: Message) -> Message:
    """Bare CRs as Postfix reads them: spaces."""
    headers = tuple(Header(header.raw.replace("\r", " ")) for header in message.headers)
    return Message(headers, _BARE_CR.sub(b" ", message.body))


def as_sendmail_receives(message: Message) -> Message:
    """Without NULs in the headers. Raises `MailError` for a bare CR, which Sendmail refuses."""
    if _BARE_CR.search(message.body) or any("\r" in header.raw for header in message.headers):
        raise MailError("Sendmail itself refuses this message with 421: there is a CR without LF in it")
    return replace(message, headers=tuple(Header(header.raw.replace("\0", "")) for header in message.headers))


def as_received(message: Message, rules: type) -> Message:
    """The message as the filter of this MTA sees it."""
    return as_postfix_receives(message) if issubclass(rules, Postfix) else as_sendmail_receives(message)
