# SPDX-License-Identifier: GPL-3.0-or-later
"""Refuse messages with attachments that run programs: by name, by type, by content; in zip files and in messages, too.

    ATTACHMENTS_EXTENSIONS="exe js" python examples/attachments.py inet:3000@localhost

The settings are environment variables:

- ``ATTACHMENTS_EXTENSIONS``: endings of names that are refused, separated by spaces; see ``EXTENSIONS``.
- ``ATTACHMENTS_TYPES``: MIME types that are refused; see ``TYPES``.
- ``ATTACHMENTS_ON_UNREADABLE``: what becomes of an archive that cannot be looked into (broken, encrypted within
  another one, nested too deeply, too large), and of a message with too many parts or fields that are too long:
  ``reject`` (closed, the default) or ``accept`` (open).
"""

import contextlib
import io
import lzma
import os
import re
import struct
import sys
import unicodedata
import zipfile
import zlib
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from email.errors import HeaderParseError
from email.header import decode_header, make_header
from email.message import EmailMessage

from milter import EomContext, Message, Milter, Reply, Status
from milter.parsed import LONGEST_FIELD, LimitDefect, parse

EXTENSIONS = (
    "ade adp app appx bat chm cmd com cpl dll exe hta img ins iso isp jar js jse lib lnk mde msc msi msix msp mst "
    "pif ps1 reg scr sct shb sys url vb vbe vbs vhd vhdx vxd wsc wsf wsh xll"
)
TYPES = (
    "application/hta application/java-archive application/javascript application/vnd.microsoft.portable-executable "
    "application/x-dosexec application/x-ms-shortcut application/x-msdownload application/x-msdos-program "
    "application/x-msi text/javascript text/vbscript"
)
DEEPEST = 5
"""Archives in archives, and messages in messages."""
MOST_ENTRIES = 10_000
"""Files in all archives of a message."""
MOST_BYTES = 64 << 20
"""Unpacked, of all archives and messages in the archives of a message."""

# What zipfile says of an archive that is broken, encrypted, or packed in a way that it does not know.
ZIP_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    OSError,
    RuntimeError,
    ValueError,
    struct.error,
)


@dataclass(frozen=True)
class Settings:
    extensions: frozenset[str] = frozenset(EXTENSIONS.split())
    types: frozenset[str] = frozenset(TYPES.split())
    refuse_unreadable: bool = True

    @classmethod
    def from_environment(cls) -> "Settings":
        return cls(
            extensions=frozenset(os.environ.get("ATTACHMENTS_EXTENSIONS", EXTENSIONS).lower().split()),
            types=frozenset(os.environ.get("ATTACHMENTS_TYPES", TYPES).lower().split()),
            refuse_unreadable=os.environ.get("ATTACHMENTS_ON_UNREADABLE", "reject") != "accept",
        )


class Unreadable(Exception):
    """Something in which a program could hide cannot be looked into."""


class Budget:
    """What may still be unpacked of a message: a small archive can hold very much."""

    def __init__(self) -> None:
        self.entries = MOST_ENTRIES
        self.bytes = MOST_BYTES

    def take_entries(self, archive: str, count: int) -> None:
        self.entries -= count
        if self.entries < 0:
            raise Unreadable(f"{archive} has {count} files")

    def take_bytes(self, archive: str, count: int) -> None:
        self.bytes = max(self.bytes - count, -1)
        if self.bytes < 0:
            raise Unreadable(f"{archive} is too large")


@dataclass(frozen=True)
class File:
    """An attachment, or a file in an archive."""

    names: tuple[str, ...]
    """Those that one program or another may show."""
    type: str = ""
    content: bytes = b""
    obstacle: str = ""
    """Why it cannot be looked into."""

    @property
    def name(self) -> str:
        return next(filter(None, self.names), "without a name")

    def ends_with(self, *ends: str) -> bool:
        return any(visible(name).endswith(ends) for name in self.names)


def filter_with(settings: Settings) -> Milter:
    app = Milter("attachments")

    @app.on_message
    def block(ctx: EomContext, message: Message) -> Status | Reply:
        for file in files(message.email(), Budget()):
            reason = refused(file, settings)
            if reason:
                return Reply(554, "5.7.1", f"attachments {reason} are not accepted here: {printable(file.name)}")
            if file.obstacle and settings.refuse_unreadable:
                return Reply(554, "5.7.1", f"an attachment cannot be checked: {printable(file.obstacle)}")
        return Status.CONTINUE

    return app


def refused(file: File, settings: Settings) -> str:
    """Why this file is not accepted; empty if it is."""
    for name in file.names:
        extension = visible(name).rpartition(".")[2]
        if "." in name and extension in settings.extensions:
            return f"that end in .{extension}"
    if file.type in settings.types:
        return f"of type {file.type}"
    if file.content.startswith(b"MZ") and b"PE\0\0" in file.content[:4096]:
        return "that are programs"
    return ""


def visible(name: str) -> str:
    """The name as Windows will take it: no characters that cannot be seen, no dots and spaces at its end."""
    shown = "".join(character for character in name if unicodedata.category(character) not in ("Cc", "Cf", "Cs"))
    return unicodedata.normalize("NFKC", shown).rstrip(". ").lower()


def printable(text: str) -> str:
    """For an SMTP reply: ASCII, and not endless."""
    return re.sub(r"[^ -~]", "?", text)[:100]


# ---- What is in a message


def files(message: EmailMessage, budget: Budget, depth: int = 0) -> Iterator[File]:
    """All attachments, those of archives and of messages within the message as well."""
    if depth > DEEPEST:
        raise Unreadable("messages and archives are nested too deeply")
    for part in message.walk():  # into messages of type message/rfc822, too
        yield from (File((), obstacle=str(defect)) for defect in part.defects if isinstance(defect, LimitDefect))
        if part.is_multipart():
            continue
        content = part.get_payload(decode=True)
        file = File(tuple(names(part)), part.get_content_type(), content if isinstance(content, bytes) else b"")
        yield file
        if file.content.startswith(b"PK") or file.ends_with(".zip"):
            yield from or_obstacle(file, archived(file, budget, depth + 1))
        elif file.ends_with(".eml") or file.type == "message/rfc822":
            yield from or_obstacle(file, attached(file, budget, depth + 1))


def or_obstacle(file: File, within: Iterator[File]) -> Iterator[File]:
    """What is in a file, up to what cannot be read. Whoever accepts that wants to see the other files all the same."""
    try:
        yield from within
    except Unreadable as problem:
        yield File(file.names, obstacle=str(problem))


def attached(file: File, budget: Budget, depth: int) -> Iterator[File]:
    """The files of a message that is a file itself."""
    return files(parse(file.content), budget, depth)


# What programs take for the name, even where it is not written as it should be.
NAME = re.compile(r"name\s*=\s*(\"[^\"]*|[^;]*)", re.IGNORECASE)


def names(part: EmailMessage) -> Iterator[str]:
    """All names of an attachment. Two programs may read two of them, so none is believed to be the one."""
    yield part.get_filename("")  # decodes RFC 2231, with its continuations
    yield str(part.get_param("name", ""))
    for field, value in part.raw_items():
        if field.lower() in ("content-disposition", "content-type"):
            for name in NAME.findall(str(value)[:LONGEST_FIELD]):
                yield decoded(name.strip('" \t\r\n'))


def decoded(name: str) -> str:
    """RFC 2047, which does not belong there, and is there."""
    try:
        return str(make_header(decode_header(name)))
    except (HeaderParseError, LookupError, ValueError):
        return name


def archived(archive: File, budget: Budget, depth: int) -> Iterator[File]:
    """The files of a zip file, and of those within it."""
    if depth > DEEPEST:
        raise Unreadable("messages and archives are nested too deeply")
    with unpacking(archive.name), zipfile.ZipFile(io.BytesIO(archive.content)) as opened:
        budget.take_entries(archive.name, len(opened.infolist()))
        for entry in opened.infolist():
            file = File((entry.filename,))
            yield file
            if file.ends_with(".zip", ".eml"):
                yield from or_obstacle(file, inner(opened, entry, budget, depth + 1))


def inner(opened: zipfile.ZipFile, entry: zipfile.ZipInfo, budget: Budget, depth: int) -> Iterator[File]:
    with unpacking(entry.filename), opened.open(entry) as packed:
        content = packed.read(budget.bytes + 1)  # whatever the archive says about its size
    budget.take_bytes(entry.filename, len(content))
    file = File((entry.filename,), content=content)
    yield from (attached if file.ends_with(".eml") else archived)(file, budget, depth)


@contextlib.contextmanager
def unpacking(name: str) -> Generator[None, None, None]:
    try:
        yield
    except ZIP_ERRORS as problem:
        raise Unreadable(f"{name}: {problem}") from problem


app = filter_with(Settings.from_environment())

if __name__ == "__main__":
    app.run(sys.argv[1])
