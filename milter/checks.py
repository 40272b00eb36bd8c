# SPDX-License-Identifier: GPL-3.0-or-later
"""Checks of what handlers send to the MTA, before anything is sent.

libmilter takes C strings: a NUL cuts them short without a word, and a line end in a header's
value would begin another header. Each function returns the bytes to send, or raises
``ValueError`` (``TypeError`` for another type) with what is wrong.
"""

import re
from collections.abc import Iterable
from functools import lru_cache

from milter.addresses import Address
from milter.protocol import MACRO_LISTS, MacroList, Stage

# RFC 5322, section 3.6.8: printable ASCII without the colon.
_HEADER_NAME = re.compile(r"[!-9;-~]+", re.ASCII)
_LINE_END_WITHOUT_FOLD = re.compile(r"\n(?![ \t])")
_MAX_INDEX = 0x7FFFFFFF


def header_name(name: str) -> bytes:
    _require_text(name, "the name of a header field")
    return _header_name(name)


@lru_cache(maxsize=256)  # a filter uses the same few for all messages
def _header_name(name: str) -> bytes:
    if not _HEADER_NAME.fullmatch(name):
        raise ValueError(
            f"{name!r} cannot be the name of a header field: it takes printable ASCII characters "
            "without space and colon (RFC 5322)"
        )
    return name.encode("ascii")


def header_value(value: str) -> bytes:
    _require_text(value, "the value of a header field")
    if value.isprintable():  # as most are: no control character, no line end
        return value.encode("utf-8")
    _refuse_nul(value, "the value of a header field")
    # The MTAs end lines themselves; a CR of ours would come out beside theirs.
    unified = value.replace("\r\n", "\n")
    if "\r" in unified:
        raise ValueError(f"the value of a header field contains a CR without LF: {value!r}")
    if _LINE_END_WITHOUT_FOLD.search(unified):
        raise ValueError(
            f"a line end in the value of a header field must be followed by a space or tab, or it would "
            f"begin another field: {value!r}"
        )
    return _encode(unified)


def index(number: int, *, lowest: int) -> None:
    if isinstance(number, bool) or not isinstance(number, int):
        raise TypeError(f"the index of a header field must be an int, not {number!r}")
    if not lowest <= number <= _MAX_INDEX:
        raise ValueError(f"the index of a header field must be {lowest} or more, and fit in 31 bits: {number}")


def sender(address: str) -> bytes:
    """In angle brackets, the form that both MTAs take; ``<>`` for the null sender."""
    _require_text(address, "an address")
    return b"<>" if address in ("", "<>") else recipient(address)


def recipient(address: str) -> bytes:
    """In angle brackets, the form that both MTAs take. What came from the MTA can be given back in any case."""
    _require_text(address, "an address")
    _refuse_line_ends(address, "an address")
    bare = address.removeprefix("<").removesuffix(">") if address.startswith("<") and address.endswith(">") else address
    reading = Address(bare)
    fault = _fault(bare, reading)
    if not fault:
        in_dns = bare.rpartition("@")[2].isascii()
        return _encode(f"<{bare if in_dns else reading}>")  # the name in DNS needs no SMTPUTF8
    if isinstance(address, Address) and address.from_server:
        return known_recipient(address)
    raise ValueError(f"the address {address!r} {fault}")


def known_recipient(address: Address) -> bytes:
    """As the client wrote it, which is what Sendmail compares."""
    return _encode(address.raw)


def _fault(bare: str, reading: Address) -> str:
    """Why the servers do not read one mailbox in this, both the same one (RFC 5321, section 4.1.2); "": they do."""
    if not bare:
        return "is empty"
    if _CONTROL.search(bare):
        return "contains a control character"
    if _MAILBOX.fullmatch(bare):
        if len(_encode(bare)) > _LONGEST_ADDRESS:
            return f"is longer than {_LONGEST_ADDRESS} bytes (RFC 5321, section 4.5.3.1.3)"
        if not reading.complete:
            return "has %, ! or @ within its local part: a server may take that for a route to another domain"
        return ""
    if _POSTMASTER.fullmatch(bare):
        return ""
    unquoted = _QUOTED_STRING.sub("", bare)
    if "<" in unquoted or ">" in unquoted:
        return "is not a bare address: give it without a display name"
    if "," in unquoted or ";" in unquoted or unquoted.count("@") > 1:
        return "is more than one mailbox: give one at a time"
    if "@" not in unquoted:
        return "has no domain: each server would add one of its own"
    return "is no mailbox as both servers read it (RFC 5321, section 4.1.2), such as ann@example.org"


_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_ATOM = r"[^\s\"(),:;<>@\[\\\].\x00-\x1f\x7f]+"
_QUOTED = r'"(?:\\.|[^"\\])*"'
_MAILBOX = re.compile(
    rf"(?:{_ATOM}(?:\.{_ATOM})*|{_QUOTED})@"
    r"(?:[\w-]+(?:\.[\w-]+)*|\[(?:[0-9.]+|IPv6:[0-9a-f:.]+)\])",
    re.IGNORECASE,
)
_QUOTED_STRING = re.compile(_QUOTED)
_POSTMASTER = re.compile("postmaster", re.IGNORECASE)  # the one mailbox without a domain (RFC 5321, section 4.5.1)
_LONGEST_ADDRESS = 254


def parameters(text: str | None) -> bytes | None:
    if text is None:
        return None
    _require_text(text, "the text of the ESMTP parameters")
    _refuse_line_ends(text, "the text of the ESMTP parameters")
    return _encode(text)


def reason(text: str) -> bytes:
    _require_text(text, "the reason of a quarantine")
    _refuse_line_ends(text, "the reason of a quarantine")
    if not text:
        raise ValueError("the reason of a quarantine is empty")
    return _encode(text)


def body_parts(body: bytes | Iterable[bytes]) -> Iterable[bytes]:
    """The parts of a new body, at least one (an empty part makes an empty body)."""
    if isinstance(body, str):
        raise TypeError("the body must be bytes, not str: encode it first")
    if isinstance(body, bytes | bytearray | memoryview):
        yield bytes(body)
        return
    empty = True
    for part in body:
        if not isinstance(part, bytes | bytearray | memoryview):
            raise TypeError(f"each part of the body must be bytes, not {type(part).__name__}")
        if part or empty:
            yield bytes(part)
        empty = False
    if empty:
        yield b""


def macro_list(stage: Stage) -> MacroList:
    try:
        return MACRO_LISTS[stage]
    except KeyError:
        raise ValueError(f"no macros can be asked for at {stage.decorator}: the MTAs have no list for it") from None


def _require_text(text: object, what: str) -> None:
    if not isinstance(text, str):
        raise TypeError(f"{what} must be a str, not {type(text).__name__}")


def _refuse_nul(text: str, what: str) -> None:
    if "\0" in text:
        raise ValueError(f"{what} contains NUL, where it would be cut: {text!r}")


def _refuse_line_ends(text: str, what: str) -> None:
    _refuse_nul(text, what)
    if "\r" in text or "\n" in text:
        raise ValueError(f"{what} contains a line end: {text!r}")


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")
