# SPDX-License-Identifier: GPL-3.0-or-later
"""Refuse messages with attachments that run programs: by name, by type, by content; in zip files and in messages, too.

    ATTACHMENTS_EXTENSIONS="exe js" python examples/attachments.py inet:3000@localhost

The settings are environment variables:

- ``ATTACHMENTS_EXTENSIONS``: endings of names that are refused, separated by spaces; see ``EXTENSIONS``.
- ``ATTACHMENTS_TYPES``: MIME types that are refused; see ``TYPES``.
- ``ATTACHMENTS_ON_UNREADABLE``: what becomes of an archive that cannot be looked into (broken, encrypted within
  another one, nested too deeply, too large): ``reject`` (closed, the default) or ``accept`` (open).
"""

import io
import os
import re
import sys
import unicodedata
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from email import message_from_bytes, policy
from email.errors import HeaderParseError
from email.header import decode_header, make_header
from email.message import EmailMessage

from milter import EomContext, Message, Milter, Reply, Status

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
LARGEST_ENTRY = 64 << 20
"""Bytes, of an archive in an archive."""


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


@dataclass(frozen=True)
class File:
    """An attachment, or a file in an archive."""

    names: tuple[str, ...]
    """Those that one program or another may show."""
    type: str = ""
    content: bytes = b""

    @property
    def name(self) -> str:
        return next(filter(None, self.names), "without a name")

    def ends_with(self, *ends: str) -> bool:
        return any(visible(name).endswith(ends) for name in self.names)


def filter_with(settings: Settings) -> Milter:
    app = Milter("attachments")

    @app.on_message
    def block(ctx: EomContext, message: Message) -> Status | Reply:
        try:
            for file in files(message.email()):
                reason = refused(file, settings)
                if reason:
                    return Reply(554, "5.7.1", f"attachments {reason} are not accepted here: {printable(file.name)}")
        except Unreadable as obstacle:
            if settings.refuse_unreadable:
                return Reply(554, "5.7.1", f"an attachment cannot be checked: {printable(str(obstacle))}")
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


def files(message: EmailMessage, depth: int = 0) -> Iterator[File]:
    """All attachments, those of archives and of messages within the message as well."""
    if depth > DEEPEST:
        raise Unreadable("messages and archives are nested too deeply")
    for part in message.walk():  # into messages of type message/rfc822, too
        if part.is_multipart():
            continue
        content = part.get_payload(decode=True)
        file = File(tuple(names(part)), part.get_content_type(), content if isinstance(content, bytes) else b"")
        yield file
        if file.content.startswith(b"PK"):
            yield from archived(file, depth + 1)
        elif file.ends_with(".eml") or file.type == "message/rfc822":
            yield from files(message_from_bytes(file.content, policy=policy.default), depth + 1)


# What programs take for the name, even where it is not written as it should be.
NAME = re.compile(r"name\s*=\s*(\"[^\"]*|[^;]*)", re.IGNORECASE)


def names(part: EmailMessage) -> Iterator[str]:
    """All names of an attachment. Two programs may read two of them, so none is believed to be the one."""
    yield part.get_filename("")  # decodes RFC 2231, with its continuations
    yield str(part.get_param("name", ""))
    for field, value in part.raw_items():
        if field.lower() in ("content-disposition", "content-type"):
            for name in NAME.findall(str(value)):
                yield decoded(name.strip('" \t\r\n'))


def decoded(name: str) -> str:
    """RFC 2047, which does not belong there, and is there."""
    try:
        return str(make_header(decode_header(name)))
    except (HeaderParseError, LookupError, ValueError):
        return name


def archived(archive: File, depth: int) -> Iterator[File]:
    """The files of a zip file, and of those within it."""
    if depth > DEEPEST:
        raise Unreadable("messages and archives are nested too deeply")
    try:
        with zipfile.ZipFile(io.BytesIO(archive.content)) as opened:
            entries = opened.infolist()
            if len(entries) > MOST_ENTRIES:
                raise Unreadable(f"{archive.name} has {len(entries)} files")
            for entry in entries:
                file = File((entry.filename,))
                yield file
                if file.ends_with(".zip", ".eml"):
                    yield from inner(File(file.names, content=extracted(opened, entry)), depth)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, zlib.error, EOFError) as problem:
        raise Unreadable(f"{archive.name}: {problem}") from problem


def inner(file: File, depth: int) -> Iterator[File]:
    if file.ends_with(".eml"):
        yield from files(message_from_bytes(file.content, policy=policy.default), depth + 1)
    else:
        yield from archived(file, depth + 1)


def extracted(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    """The file, whatever the archive says about its size: a small archive may hold a very large one."""
    with archive.open(entry) as file:
        content = file.read(LARGEST_ENTRY + 1)
    if len(content) > LARGEST_ENTRY:
        raise Unreadable(f"{entry.filename} is too large")
    return content


app = filter_with(Settings.from_environment())

if __name__ == "__main__":
    app.run(sys.argv[1])
