# SPDX-License-Identifier: GPL-3.0-or-later
"""Add a footer or a disclaimer to the text of each message, in its own charset, and break nothing.

    FOOTER_FILE=footer.txt FOOTER_DOMAINS=example.org python examples/footer.py inet:3000@localhost

The settings are environment variables:

- ``FOOTER_FILE``: the text, UTF-8. ``FOOTER_HTML_FILE``: the same as HTML; by default made of the text.
- ``FOOTER_DOMAINS``: only mail from senders of these domains, separated by spaces; by default all mail.
- ``FOOTER_BREAK_DKIM=yes``: messages with a DKIM-Signature, too, although it is no longer valid then.

Only bytes of the text parts change: a text part, both texts of a ``multipart/alternative``, the first part of any
other ``multipart``. Attachments, the other parts and what stands between the parts stay as they are. What is signed or
encrypted is left alone, and so is a message that cannot be understood: a footer is not worth a broken message.
"""

import base64
import binascii
import codecs
import html
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from email import policy
from email.message import Message as Fields
from email.parser import BytesHeaderParser
from itertools import compress, islice
from pathlib import Path

from milter import EomContext, Message, Milter, Status

MARK = "X-Footer"
"""A header field that says that there is one already: a message may pass a filter twice."""

LONGEST_LINE = 998  # RFC 5322, section 2.1.1
SEALED = {
    "multipart/signed",
    "multipart/encrypted",
    "application/pkcs7-mime",
    "application/x-pkcs7-mime",
    "application/pgp-encrypted",
}
MOST_PARTS = 1000
"""Of a multipart; and DEEPEST is how many may lie one within the other. Some messages are made to keep filters busy."""
DEEPEST = 100
LONGEST_FIELD = 8192
"""Of the fields that say what is in a part: reading them takes time that grows with the square of their length."""
SLOW_CHARSETS = {"idna", "punycode"}  # as does the decoding of these
FIELD = re.compile(rb"[^\n]*\n(?:[ \t][^\n]*\n)*")
PGP = re.compile(rb"^-----BEGIN PGP (SIGNED )?MESSAGE-----", re.M)


@dataclass(frozen=True)
class Settings:
    text: str
    html: str = ""
    domains: frozenset[str] = frozenset()
    break_dkim: bool = False

    @classmethod
    def from_environment(cls) -> "Settings":
        path, html_path = os.environ.get("FOOTER_FILE"), os.environ.get("FOOTER_HTML_FILE")
        return cls(
            text=Path(path).read_text("utf-8") if path else "-- \nThis message passed a filter.\n",
            html=Path(html_path).read_text("utf-8") if html_path else "",
            domains=frozenset(os.environ.get("FOOTER_DOMAINS", "").lower().split()),
            break_dkim=os.environ.get("FOOTER_BREAK_DKIM") == "yes",
        )

    @property
    def lines(self) -> list[str]:
        return self.text.splitlines()

    @property
    def markup(self) -> str:
        """As HTML in ASCII, so that it fits into every charset."""
        markup = self.html or "<p>" + "<br>\r\n".join(map(html.escape, self.lines)) + "</p>"
        return "\r\n".join(markup.splitlines()).encode("ascii", "xmlcharrefreplace").decode()


class LeftAlone(Exception):
    """There is a reason not to touch this message."""


def filter_with(settings: Settings) -> Milter:
    app = Milter("footer")

    @app.on_message
    def add_footer(ctx: EomContext, message: Message) -> Status:
        if MARK in message.headers or not is_meant(settings, message):
            return Status.CONTINUE
        try:
            new = with_footer(Part.of(message.as_bytes()), settings)
        except LeftAlone as reason:
            message.headers[MARK] = f"none ({reason})"
            return Status.CONTINUE
        message.body = new.body
        for name in new.changed:
            message.headers[name] = str(new.fields[name])
        if new.changed:
            message.headers.setdefault("MIME-Version", "1.0")
        message.headers[MARK] = "added"
        return Status.CONTINUE

    return app


def is_meant(settings: Settings, message: Message) -> bool:
    return not settings.domains or message.sender.matches(*settings.domains)


# ---- The parts of a message, with every byte in its place


@dataclass
class Part:
    """A message or a part of one: header fields as the standard library parses them, and bytes."""

    head: bytes
    """The header as it stands, with the empty line."""
    fields: Fields
    body: bytes
    changed: list[str] = field(default_factory=list)
    """The names of header fields that were changed."""

    @classmethod
    def of(cls, data: bytes) -> "Part":
        end = (b"\r\n" + data).find(b"\r\n\r\n") + 2
        if end == 1:  # a header, and nothing below it
            end = len(data)
        return cls(data[:end], BytesHeaderParser(policy=policy.compat32).parsebytes(data[:end]), data[end:])

    @property
    def type(self) -> str:
        return self.fields.get_content_type()

    def set(self, name: str, value: str) -> None:
        del self.fields[name]
        self.fields[name] = value
        self.changed.append(name)

    def set_charset(self, charset: str) -> None:
        if "Content-Type" not in self.fields:
            self.fields["Content-Type"] = self.type
        self.fields.set_param("charset", charset, replace=True)
        self.changed.append("Content-Type")

    def as_bytes(self) -> bytes:
        if not self.changed:
            return self.head + self.body
        names = {name.lower().encode() for name in self.changed}
        kept = [field for field in FIELD.findall(self.head) if field.partition(b":")[0].strip().lower() not in names]
        new = [f"{name}: {self.fields[name]}\r\n" for name in dict.fromkeys(self.changed)]
        return b"".join([*kept[:-1], "".join(new).encode("ascii", "surrogateescape"), b"\r\n", self.body])


def subparts(part: Part) -> Iterator[tuple[int, int]]:
    """Where in the body of a multipart its parts begin and end (RFC 2046, section 5.1.1)."""
    boundary = part.fields.get_boundary()
    if not boundary:
        raise LeftAlone("a multipart without a boundary")
    delimiter = re.compile(
        rb"^--" + re.escape(boundary.encode("ascii", "surrogateescape")) + rb"(--)?[ \t]*(?:\r\n|\Z)", re.M
    )
    start = None
    for match in delimiter.finditer(part.body):
        if start is not None:
            yield start, match.start() - len(b"\r\n")
        if match[1]:
            return
        start = match.end()
    raise LeftAlone("a multipart that does not end")


# ---- Where the footer goes


def with_footer(part: Part, settings: Settings, depth: int = 0) -> Part:
    """The same part with the footer in its text; raises LeftAlone."""
    if depth > DEEPEST:
        raise LeftAlone("parts that are nested too deeply")
    about = [str(value) for name, value in part.fields.items() if name.lower().startswith("content-")]
    if any(len(value) > LONGEST_FIELD for value in about):
        raise LeftAlone("fields that are too long")
    try:
        return part_with_footer(part, settings, depth)
    except (TypeError, ValueError) as problem:  # of the standard library, for fields that nobody should write
        raise LeftAlone("fields that are no MIME") from problem


def part_with_footer(part: Part, settings: Settings, depth: int) -> Part:
    refuse_sealed(part, settings)
    if part.type.startswith("multipart/"):
        return multipart_with_footer(part, settings, depth)
    if part.fields.get_content_disposition() == "attachment":
        raise LeftAlone("no text")
    if part.type == "text/plain":
        return text_with_footer(part, lambda text: append(text, settings.lines, is_flowed(part)))
    if part.type == "text/html":
        return text_with_footer(part, lambda text: insert(text, settings.markup))
    raise LeftAlone("no text")


def refuse_sealed(part: Part, settings: Settings) -> None:
    if part.type in SEALED or PGP.search(part.body):
        raise LeftAlone("signed or encrypted")
    if "DKIM-Signature" in part.fields and not settings.break_dkim:
        raise LeftAlone("signed by DKIM")


def multipart_with_footer(part: Part, settings: Settings, depth: int) -> Part:
    spans = list(islice(subparts(part), MOST_PARTS + 1))
    if len(spans) > MOST_PARTS:
        raise LeftAlone("too many parts")
    parts = [Part.of(part.body[start:end]) for start, end in spans]
    for inner in parts:
        refuse_sealed(inner, settings)
    # The parts of an alternative say the same; elsewhere the first part is what is read, and the others belong to it.
    if part.type == "multipart/alternative":
        meant = [inner.type.startswith(("text/plain", "text/html", "multipart/")) for inner in parts]
    else:
        meant = [True]
    if not any(meant):
        raise LeftAlone("no text")
    pieces: list[bytes] = []
    position = 0
    for (start, end), inner in compress(zip(spans, parts, strict=True), meant):
        pieces += [part.body[position:start], with_footer(inner, settings, depth + 1).as_bytes()]
        position = end
    part.body = b"".join([*pieces, part.body[position:]])
    return part


# ---- Text: transfer encoding, charset, format


def text_with_footer(part: Part, add: Callable[[str], str]) -> Part:
    """Decode, add, and encode again: in the same charset if it has the characters, in UTF-8 if not."""
    if not part.head.endswith(b"\r\n\r\n") and part.head != b"\r\n":
        raise LeftAlone("a part without a body")
    encoding = str(part.fields.get("Content-Transfer-Encoding", "7bit")).strip().lower()
    charset = str(part.fields.get_content_charset("us-ascii"))
    content = decoded(part.body, encoding)
    text = understood(content, charset)
    new = add(text)
    try:
        content = new.encode(charset, "surrogateescape")
    except UnicodeEncodeError:
        if not_characters(new):
            raise LeftAlone("text that is not of its charset") from None
        content = new.encode("utf-8")
        part.set_charset("utf-8")
    part.body, needed = encoded(content, encoding)
    if needed != encoding:
        part.set("Content-Transfer-Encoding", needed)
    return part


def understood(content: bytes, charset: str) -> str:
    """The text; stray bytes come as surrogates, and go back as they came."""
    try:
        if codecs.lookup(charset).name in SLOW_CHARSETS:
            raise LookupError(charset)
        text = content.decode(charset, "surrogateescape")
        if text.encode(charset, "surrogateescape") == content:
            return text
    except (LookupError, UnicodeError):
        pass
    raise LeftAlone("text that is not of its charset")


def not_characters(text: str) -> bool:
    """Whether there are bytes in it that nobody knows the meaning of."""
    return any("\udc80" <= character <= "\udcff" for character in text)


def decoded(body: bytes, encoding: str) -> bytes:
    if encoding == "base64":
        try:
            return base64.b64decode(body.translate(None, b"\r\n \t"), validate=True)
        except binascii.Error:
            raise LeftAlone("broken base64") from None
    if encoding == "quoted-printable":
        return binascii.a2b_qp(body)
    if encoding in ("7bit", "8bit", "binary"):
        return body
    raise LeftAlone("an unknown transfer encoding")


def encoded(content: bytes, encoding: str) -> tuple[bytes, str]:
    """The body, and its transfer encoding: another one than wished for only where that one cannot hold it."""
    longest = max(map(len, content.split(b"\r\n")))
    if encoding == "7bit" and (not content.isascii() or longest > LONGEST_LINE):
        encoding = "quoted-printable"
    if encoding == "quoted-printable" and b"\0" in content:  # UTF-16: its line ends are none of the body's
        encoding = "base64"
    if encoding == "base64":
        return base64.encodebytes(content).replace(b"\n", b"\r\n"), encoding
    if encoding == "quoted-printable":
        return binascii.b2a_qp(content, istext=True), encoding
    return content, encoding


def is_flowed(part: Part) -> bool:
    return str(part.fields.get_param("format", "")).lower() == "flowed"


def append(text: str, lines: list[str], flowed: bool) -> str:
    """Below the text, after an empty line, which also ends a paragraph that flows (RFC 3676)."""
    if flowed:
        lines = [stuffed(line) for line in lines]
    if text and not text.endswith("\n"):
        text += "\r\n"
    return text + "\r\n" + "".join(f"{line}\r\n" for line in lines)


def stuffed(line: str) -> str:
    """A line that stands for itself: without spaces at its end, and none that looks like a quotation."""
    if line == "-- ":
        return line
    line = line.rstrip(" ")
    return f" {line}" if line.startswith((" ", ">", "From ")) else line


def insert(text: str, markup: str) -> str:
    """Before the end of the document's body, or at the end of the text if it has none."""
    ends = list(re.finditer(r"</body\s*>|</html\s*>", text, re.IGNORECASE))
    bodies = [end for end in ends if end[0].lower().startswith("</body")]
    place = (bodies or ends)[-1].start() if ends else len(text)
    return f"{text[:place]}\r\n{markup}\r\n{text[place:]}"


app = filter_with(Settings.from_environment())

if __name__ == "__main__":
    app.run(sys.argv[1])
