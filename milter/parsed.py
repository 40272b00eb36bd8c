# SPDX-License-Identifier: GPL-3.0-or-later
"""A message as the standard library's :class:`email.message.EmailMessage`, whatever the message is.

The standard library's parser and its fields take quadratic time for some input, and raise for some. Strangers write
the input. So here each step has a bound:

- a field is parsed up to a length; beyond it, it is text without structure;
- parts are parsed up to a number and a depth; beyond it, they are one part without structure;
- a field that was parsed lately is not parsed again: the parser itself asks for each Content-Type several times, and
  for that of a container once for each part;
- a field is found by its name without going through all others, for the same reason;
- what was received is written as it was received: folding anew takes quadratic time, and fails for some.

Of the standard library's parser some names are used that it does not promise. The tests tell if they are gone.
"""

import codecs
import copy
import functools
import re
from collections.abc import Iterator
from contextlib import suppress
from email import policy
from email.contentmanager import raw_data_manager
from email.errors import MessageDefect
from email.feedparser import BytesFeedParser, NeedMoreData  # type: ignore[attr-defined]
from email.headerregistry import BaseHeader, HeaderRegistry, UnstructuredHeader
from email.message import EmailMessage
from email.utils import collapse_rfc2231_value
from typing import Any

__all__ = ["DEEPEST", "LONGEST_FIELD", "LONGEST_WORD", "MOST_PARTS", "LimitDefect", "parse"]

LONGEST_FIELD = 8192
"""Characters of a header field that is parsed."""
LONGEST_WORD = 1000
"""Characters without a space in a header field that is parsed, unless it is mere text, as a Subject is."""
MOST_PARTS = 1000
"""The message and its parts, also those of messages within it."""
DEEPEST = 20
"""Parts within parts, and messages within messages."""

_PIECE = 1 << 16
_LINE_END = re.compile(r"\r\n|\r|\n")
_SPACE = re.compile(r"[ \t]")
# Text encodings that take quadratic time; they are for domain names.
_SLOW_CHARSETS = frozenset({"idna", "punycode"})


class LimitDefect(MessageDefect):
    """A field is too long to be parsed, or parts are too many or too deep; among the ``defects`` of that part."""


# ---- Header fields


class _Registry(HeaderRegistry):
    """The standard library's structured header fields; where its parser fails, the text without structure."""

    def __getitem__(self, name: str) -> type[BaseHeader]:
        return _kind(self.registry.get(name.lower(), self.default_class), self.base_class)

    def __call__(self, name: str, value: str) -> BaseHeader:
        try:
            return super().__call__(name, value)
        except Exception as failure:
            return _unparsed(self[name], MessageDefect(f"the field cannot be parsed: {failure!r}"))(name, value)


@functools.cache  # a class is garbage that takes a long time to collect, and there are few kinds
def _kind(kind: type[Any], base: type[Any]) -> type[BaseHeader]:
    return type(f"_{kind.__name__}", (kind, base), {})


def _unparsed(kind: type[BaseHeader], defect: MessageDefect) -> type[BaseHeader]:
    """This kind of field, with the attributes of an empty one (no addresses, no parameters) and all of the text."""

    def keep_text(cls: type[BaseHeader], value: str, kwds: dict[str, Any]) -> None:
        kind.parse("", kwds)  # type: ignore[attr-defined]
        kwds["decoded"] = value
        kwds["defects"].append(defect)

    def fold(self: BaseHeader, *, policy: policy.Policy) -> str:
        return f"{self.name}: {self}{policy.linesep}"

    return type(kind.__name__, (kind,), {"parse": classmethod(keep_text), "fold": fold})


_REGISTRY = _Registry()


def _obstacle(name: str, value: str) -> str:
    """Why this field is not parsed; empty if it is."""
    if len(value) <= LONGEST_WORD:
        return ""
    if len(value) > LONGEST_FIELD:
        return f"{name} has {len(value)} characters: it is not parsed, it has more than {LONGEST_FIELD}"
    # The standard library looks for the next space at each character that has a meaning.
    if not issubclass(_REGISTRY[name], UnstructuredHeader) and max(map(len, _SPACE.split(value))) > LONGEST_WORD:
        return f"{name} is not parsed, it has more than {LONGEST_WORD} characters without a space"
    return ""


def _received_field(name: str, value: str) -> BaseHeader:
    text = value.replace("\r", "").replace("\n", "")
    obstacle = _obstacle(name, text)
    return _unparsed(_REGISTRY[name], LimitDefect(obstacle))(name, text) if obstacle else _REGISTRY(name, text)


class _Policy(policy.EmailPolicy):
    """The standard library's, but what was received is parsed within limits, and written as it came.

    `received_field`: makes an object of a received field, and remembers the last ones. Fields that are not received but
    made are dealt with as the standard library does it.
    """

    received_field: Any = None

    def header_fetch_parse(self, name: str, value: Any) -> Any:
        return value if hasattr(value, "name") else self.received_field(name, value)

    def fold(self, name: str, value: Any) -> str:
        if hasattr(value, "name"):
            return str(super().fold(name, value))
        return self._unchanged(name, value.encode("ascii", "surrogateescape").decode("utf-8", "replace"))

    def fold_binary(self, name: str, value: Any) -> bytes:
        if hasattr(value, "name"):
            return super().fold_binary(name, value)
        return self._unchanged(name, value).encode("ascii", "surrogateescape")

    def _unchanged(self, name: str, value: str) -> str:
        return f"{name}: {self.linesep.join(_LINE_END.split(value))}{self.linesep}"


# ---- Content


def _decoded(content: bytes, charset: str, errors: str = "replace") -> str:
    """As text of this charset; of ASCII if there is no such charset."""
    with suppress(Exception):  # codecs raise all kinds of them
        if codecs.lookup(charset).name not in _SLOW_CHARSETS:
            return content.decode(charset, errors)
    return content.decode("ascii", "replace")


def _decodable(param: Any) -> Any:
    """A parameter's value; if it has a charset (RFC 2231), one for which get_filename() does not fail."""
    try:
        collapse_rfc2231_value(param)
    except Exception:
        return (None, *param[1:])
    return param


def _text_content(part: EmailMessage, errors: str = "replace") -> str:
    content: Any = part.get_payload(decode=True)
    return _decoded(content, part.get_content_charset("ascii"), errors)


_CONTENT = copy.deepcopy(raw_data_manager)
_CONTENT.add_get_handler("text", _text_content)


# ---- The message and its parts


class _Email(EmailMessage):
    """A message or a part, as the standard library has it, whose methods take linear time."""

    def __init__(self, policy: policy.Policy | None = None) -> None:
        super().__init__(policy)
        # The first field of each name, and how many fields there were when they were looked for.
        self._first: dict[str, int] = {}
        self._looked_at: tuple[Any, int] = (None, 0)

    def set_raw(self, name: str, value: str) -> None:
        """By the parser."""
        super().set_raw(name, value)
        if obstacle := _obstacle(name, value):
            self.defects.append(LimitDefect(obstacle))

    def _position(self, name: str) -> int | None:
        fields = self._headers  # type: ignore[attr-defined]
        if self._looked_at[0] is not fields or self._looked_at[1] != len(fields):
            self._first = {}
            for position, (known, _) in enumerate(fields):
                self._first.setdefault(known.lower(), position)
            self._looked_at = (fields, len(fields))
        return self._first.get(name.lower())

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._position(name) is not None

    def get(self, name: str, failobj: Any = None) -> Any:
        position = self._position(name)
        if position is None:
            return failobj
        return self.policy.header_fetch_parse(*self._headers[position])  # type: ignore[attr-defined]

    def get_params(self, failobj: Any = None, header: str = "content-type", unquote: bool = True) -> Any:
        if self._is_too_long(header):
            return failobj
        try:
            params = super().get_params(failobj, header, unquote)
        except Exception:  # it fails for some continuations of RFC 2231, for which the field's own parser does not
            field = self.get(header)
            params = [(field.partition(";")[0].strip(), ""), *getattr(field, "params", {}).items()]
        return params if params is failobj else [(name, _decodable(value)) for name, value in params]

    def get_param(self, param: str, failobj: Any = None, header: str = "content-type", unquote: bool = True) -> Any:
        for name, value in self.get_params((), header, unquote):
            if name.lower() == param.lower():
                return value
        return failobj

    def _is_too_long(self, header: str) -> bool:
        position = self._position(header)
        return position is not None and len(self._headers[position][1]) > LONGEST_FIELD  # type: ignore[attr-defined]

    def get_payload(self, i: int | None = None, decode: bool = False) -> Any:
        payload = self._payload  # type: ignore[attr-defined]
        if i is not None or decode or not isinstance(payload, str) or payload.isascii():
            return super().get_payload(i, decode)  # type: ignore[call-overload]
        if self.get_content_maintype() == "multipart":  # without parts: as it was received, to be written again
            return payload
        try:
            return _decoded(payload.encode("ascii", "surrogateescape"), self.get_content_charset("ascii"))
        except UnicodeEncodeError:  # it was not received, but set
            return payload

    def as_string(self, unixfrom: bool = False, maxheaderlen: int | None = None, policy: Any = None) -> str:
        try:
            text = super().as_string(unixfrom, maxheaderlen, policy)
        except Exception:  # of a charset that there is not, or that does not have the characters
            return self.as_bytes(unixfrom, policy).decode("utf-8", "replace")
        return text if text.isascii() else text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


class _Parser(BytesFeedParser):
    """The standard library's, which makes parts up to a number and a depth."""

    _parts = 0

    def _parsegen(self) -> Iterator[object]:
        """Called for each part, within the part that it is in."""
        self._parts += 1
        if self._parts > MOST_PARTS:
            input: Any = self._input  # type: ignore[attr-defined]
            # No boundary ends this part.
            ends, input._eofstack = input._eofstack, []
            yield from self._opaque(f"the rest of the message is not parsed: it has more than {MOST_PARTS} parts")
            input._eofstack = ends
        elif len(self._msgstack) > DEEPEST:  # type: ignore[attr-defined]
            yield from self._opaque(f"a part is not parsed: it lies in more than {DEEPEST} others")
        else:
            yield from super()._parsegen()  # type: ignore[misc]

    def _opaque(self, why: str) -> Iterator[object]:
        """A part without fields, and with all text up to its end."""
        self._new_message()  # type: ignore[attr-defined]
        part: EmailMessage = self._cur  # type: ignore[attr-defined]
        part.set_default_type("application/octet-stream")
        part.defects.append(LimitDefect(why))
        lines = []
        for line in self._input:  # type: ignore[attr-defined]
            if line is NeedMoreData:
                yield NeedMoreData
            else:
                lines.append(line)
        part.set_payload("".join(lines))


def parse(data: bytes) -> EmailMessage:
    """A message, as :meth:`Message.email <milter.Message.email>` gives it: for one that is a file in another one.

    Never raises: what cannot be parsed is among the ``defects``.

    >>> email = parse(b"Subject: =?utf-8?q?caf=C3=A9?=\\r\\nTo: " + b"(a)" * 10000 + b"\\r\\n\\r\\nHi.\\r\\n")
    >>> email["Subject"], email.defects
    ('café', [LimitDefect('To has 30000 characters: it is not parsed, it has more than 8192')])
    """
    try:
        return _parsed(data, headers_only=False)
    except Exception as failure:
        message = _parsed(data, headers_only=True)
        message.defects.append(MessageDefect(f"the body cannot be parsed: {failure!r}"))
        return message


def _parsed(data: bytes, *, headers_only: bool) -> EmailMessage:
    # CRLF, so that bytes(email) has the line ends of the message.
    settings: dict[str, Any] = {
        "linesep": "\r\n",
        "refold_source": "none",
        "header_factory": _REGISTRY,
        "content_manager": _CONTENT,
        "received_field": functools.lru_cache(maxsize=16)(_received_field),
    }
    parser: Any = _Parser(_Email, policy=_Policy(**settings))
    if headers_only:
        parser._set_headersonly()
    for start in range(0, len(data), _PIECE):
        parser.feed(data[start : start + _PIECE])
    message: EmailMessage = parser.close()
    return message
