# SPDX-License-Identifier: GPL-3.0-or-later
"""The header fields of a message, to read and to edit.

What was received is never changed; the edits are kept beside it, by place: new values of received fields, and new
fields in the gaps between them. So a message that nobody edits costs nothing, one more field costs one object, and
``milter.edits`` finds what is to be sent without comparing anything.
"""

import sys
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, TypeVar, overload

from milter import checks
from milter.content import Content, Editable
from milter.errors import ContextError

__all__ = ["END", "Headers", "NewField"]

END = sys.maxsize
"""The gap below the last received field, whatever their number."""

D = TypeVar("D")


class NewField:
    """A header field that the handler made. `gap`: the number of received fields above it, or ``END``."""

    __slots__ = ("gap", "key", "name", "value")

    def __init__(self, gap: int, key: bytes, name: bytes, value: bytes) -> None:
        self.gap = gap
        self.key = key  # the name in lower case
        self.name = name
        self.value = value


Place = int | NewField


class Headers(Editable):
    """The header fields of a message, in order: a mapping in which a name may come several times.

    Names are matched without regard to case. ``headers[name]`` is the first of that name,
    :meth:`get_all` are all; ``len``, iteration, :meth:`keys`, :meth:`values` and :meth:`items` go through
    the fields in order, so that a name comes as often as there are fields of it. (Therefore it is no
    ``Mapping`` of the standard library; ``dict(headers.items())`` would keep the last of each name.)
    The lists they return are copies: a loop over them may edit.

    Values are shown without the space after the colon, folded lines with LF and the white space that
    followed; with ``Milter(leading_space=True)``, and an MTA that can do it, they come and go with whatever
    follows the colon. The MTA's own Received field is not among them.

    >>> from milter.addresses import Address
    >>> from milter.message import MemoryContent, Message
    >>> fields = [(b"From", b" ann"), (b"X-Dup", b" 1"), (b"Subject", b" hello"), (b"x-dup", b" 2")]
    >>> message = Message(MemoryContent(fields), Address("ann@client.example"), [])
    >>> headers = message.headers
    >>> headers["SUBJECT"], headers.get_all("X-Dup"), "Date" in headers
    ('hello', ['1', '2'], False)
    >>> headers["Subject"] = "hello, edited"
    >>> headers.replace("X-Dup", "two", index=2)
    >>> headers.insert(0, "X-First", "above all")
    >>> headers.add("X-Last", "a value\\n that is folded")
    >>> del headers["From"]
    >>> headers.keys()
    ['X-First', 'X-Dup', 'Subject', 'x-dup', 'X-Last']

    What the MTA delivers is what ``items()`` shows, with these exceptions of Sendmail's, which come of its
    configuration, and which no milter can avoid:

    - a new field From, Date or Message-Id (or Resent-From, …) in a message that has none of that name is put
      above the message's first field, wherever it was inserted;
    - Return-Path, Bcc, Resent-Bcc, Full-Name, Content-Length are never delivered, and fields
      of the Resent- family are not delivered unless the message came with one.
    """

    __slots__ = (
        "_area",
        "_changed",
        "_content",
        "_found",
        "_grown",
        "_lowered",
        "_names",
        "_new",
        "_places",
        "_prefix",
        "_raw",
        "_texts",
    )

    def __init__(self, content: Content, prefix: bytes, frozen: bool) -> None:
        """By a Message. `prefix`: what is taken off each value."""
        self._frozen = frozen
        self._content = content
        self._prefix = prefix
        # The fields as received; never changed. Each is made of the one above it when it is first needed:
        # all as it was gathered; the same in lower case, behind a NUL; names and values, one after the other;
        # the names; their positions by name in lower case; names and values in pairs.
        self._area: bytes | None = None
        self._lowered: bytes | None = None
        self._texts: list[bytes] | None = None
        self._names: list[bytes] | None = None
        self._places: dict[bytes, list[int]] | None = None
        self._raw: tuple[tuple[bytes, bytes], ...] | None = None
        # The edits: new values by position (None: deleted), and new fields by gap, each in order.
        self._changed: dict[int, bytes | None] = {}
        self._new: dict[int, deque[NewField]] = {}
        # What comes of them: the fields that are there now, of each name of which fields were added or deleted, and
        # how many more there are than were received. So a loop of edits does not go through all earlier ones each time.
        # Deques, for a list moves all it has when one is inserted at the top.
        self._found: dict[bytes, deque[Place]] = {}
        self._grown = 0

    # ---- reading

    @property
    def raw(self) -> tuple[tuple[bytes, bytes], ...]:
        """The fields as received, edits or not: names and values in bytes, in order.

        >>> from milter.addresses import Address
        >>> from milter.message import MemoryContent, Message
        >>> Message(MemoryContent([(b"Subject", b" caf\\xc3\\xa9")]), Address(""), []).headers.raw
        ((b'Subject', b'caf\\xc3\\xa9'),)
        """
        if self._raw is None:
            prefix, texts = self._prefix, iter(self._received_texts())
            # (Each name takes the value behind it; what is behind the last NUL has none.)
            self._raw = tuple([(name, value.removeprefix(prefix)) for name, value in zip(texts, texts, strict=False)])
        return self._raw

    def __getitem__(self, name: str) -> str:
        """The first value of this name; ``KeyError`` if there is none."""
        for place in self._find(_key(name)):
            return _text(self._value(place))
        raise KeyError(name)

    @overload
    def get(self, name: str) -> str | None: ...
    @overload
    def get(self, name: str, default: D) -> str | D: ...
    def get(self, name: str, default: Any = None) -> Any:
        """The first value of this name, or `default`."""
        for place in self._find(_key(name)):
            return _text(self._value(place))
        return default

    def get_all(self, name: str) -> list[str]:
        """All values of this name, in order; an empty list if there is none."""
        return [_text(self._value(place)) for place in self._find(_key(name))]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and bool(self._find(_key(name)))

    def __len__(self) -> int:
        """The number of fields."""
        return len(self._received_names()) + self._grown

    def __iter__(self) -> Iterator[str]:
        """The names, in order, each as often as there are fields of it."""
        return iter(self.keys())

    def keys(self) -> list[str]:
        """The names of the fields, in order, as they are spelled."""
        return [_text(name) for name, _ in self._fields()]

    def values(self) -> list[str]:
        """The values of the fields, in order."""
        return [_text(value) for _, value in self._fields()]

    def items(self) -> list[tuple[str, str]]:
        """The fields, in order."""
        return [(_text(name), _text(value)) for name, value in self._fields()]

    def __repr__(self) -> str:
        try:
            return f"Headers({self.items()!r})"
        except ContextError:
            return "<Headers that were not read before the handler returned>"

    # ---- editing

    def __setitem__(self, name: str, value: str) -> None:
        """Make this the one field of its name.

        The first field of that name keeps its place and its spelling, and the others are deleted. If there
        is none, the field is added at the end.
        """
        self._require_open()
        key = _key(name)
        places = self._find(key)
        if not places:
            self._append(key, checks.header_name(name), checks.header_value(value))
            return
        self._assign(places[0], value)
        if len(places) > 1:
            self._delete(key, 1, len(places) - 1)

    def __delitem__(self, name: str) -> None:
        """Delete all fields of this name; ``KeyError`` if there is none."""
        self._require_open()
        key = _key(name)
        places = self._find(key)
        if not places:
            raise KeyError(name)
        self._delete(key, 0, len(places))

    def add(self, name: str, value: str) -> None:
        """Add a field at the end, whether or not there are others of that name.

        Arguments:
            name: printable ASCII without space and colon (RFC 5322, section 3.6.8).
            value: its text. Long ones are folded with LF (or CRLF) and white space; a line end without white
                space after it, a bare CR and NUL are refused.
        """
        self._require_open()
        self._append(_key(name), checks.header_name(name), checks.header_value(value))

    def insert(self, index: int, name: str, value: str) -> None:
        """Insert a field above the one at `index`, counted from 0 in the fields as they are now.

        0 is the top, below the MTA's own Received; ``len(headers)`` or more is the end. (To put a field above
        the MTA's own Received use ``EomContext.insert_header(0, …)``.)
        """
        self._require_open()
        checks.index(index, lowest=0)
        encoded_name, encoded_value = checks.header_name(name), checks.header_value(value)
        gap, offset = self._gap_above(index)
        field = NewField(gap, _key(name), encoded_name, encoded_value)
        self._found_to_edit(field.key).insert(self._rank(field.key, gap, offset), field)
        self._new.setdefault(gap, deque()).insert(offset, field)
        self._grown += 1

    def replace(self, name: str, value: str | None, index: int = 1) -> None:
        """Give one field another value, in its place; None deletes it.

        Arguments:
            index: which one of that name, from 1, in the fields as they are now (as in
                ``EomContext.replace_header``).

        ``KeyError`` if there are not so many: no field is added by mistake. The spelling of the name stays.
        """
        self._require_open()
        checks.index(index, lowest=1)
        places = self._find(_key(name))
        if index > len(places):
            raise KeyError(f"{name} (number {index} of {len(places)})" if places else name)
        if value is None:
            self._delete(_key(name), index - 1, 1)
        else:
            self._assign(places[index - 1], value)

    def setdefault(self, name: str, value: str) -> str:
        """The first value of this name; if there is none, a field with this `value` is added at the end."""
        if name not in self:
            self.add(name, value)
        return self[name]

    # ---- places: a received field is known by its position, a new one by itself

    def _received_area(self) -> bytes:
        if self._area is None:
            self._area = self._content.read(0, self._content.header_size)
        return self._area

    def _received_texts(self) -> list[bytes]:
        if self._texts is None:
            self._texts = self._received_area().split(b"\0")
        return self._texts

    def _received_names(self) -> list[bytes]:
        if self._names is None:
            self._names = self._received_texts()[0:-1:2]
        return self._names

    def _received_value(self, position: int) -> bytes:
        return self._received_texts()[2 * position + 1].removeprefix(self._prefix)

    def _positions(self) -> dict[bytes, list[int]]:
        """Where the received fields of each name are, in one pass for all look-ups."""
        if self._places is None:
            self._places = {}
            for position, name in enumerate(self._received_names()):
                self._places.setdefault(name.lower(), []).append(position)
        return self._places

    def _was_received(self, key: bytes) -> bool:
        """Whether there was a field of this name. That there was none is known without a table."""
        if self._places is None:
            if self._lowered is None:
                self._lowered = b"\0" + self._received_area().lower()
            if b"\0%b\0" % key not in self._lowered:  # neither a name nor a value
                return False
        return key in self._positions()

    def _find(self, key: bytes) -> Sequence[Place]:
        """The fields of this name that are there now, in order; not to be changed."""
        found: Sequence[Place] | None = self._found.get(key)
        if found is None:
            found = self._positions()[key] if self._was_received(key) else ()
        return found

    def _found_to_edit(self, key: bytes) -> deque[Place]:
        """The same, to be changed with the fields."""
        found = self._found.get(key)
        if found is None:
            found = self._found[key] = deque(self._find(key))
        return found

    def _value(self, place: Place) -> bytes:
        if isinstance(place, NewField):
            return place.value
        value = self._changed.get(place)
        return self._received_value(place) if value is None else value

    def _fields(self) -> Sequence[tuple[bytes, bytes]]:
        """The fields that are there now, in order."""
        return self.raw if not self._changed and not self._new else list(self._edited_fields())

    def _edited_fields(self) -> Iterator[tuple[bytes, bytes]]:
        for position, (name, value) in enumerate(self.raw):
            for field in self._new.get(position, ()):
                yield field.name, field.value
            now = self._changed.get(position, value)
            if now is not None:
                yield name, now
        for field in self._new.get(END, ()):
            yield field.name, field.value

    def _gap_above(self, index: int) -> tuple[int, int]:
        """The gap, and the offset among its new fields, above the field that is at `index` now."""
        if index >= len(self):
            return END, len(self._new.get(END, ()))
        above = position = 0  # so many fields now, and so many received ones, are above what was looked at
        for edited in sorted({*self._changed, *self._new}):
            untouched = min(edited, len(self._received_names())) - position
            if index < above + untouched:
                break
            above += untouched
            fields = len(self._new.get(edited, ()))
            if index <= above + fields:
                return edited, index - above
            above += fields + (self._changed.get(edited, b"") is not None)
            position = edited + 1
        return position + index - above, 0

    def _rank(self, key: bytes, gap: int, offset: int) -> int:
        """Where a new field of this name will be among those of its name."""
        found, new, order = self._found_to_edit(key), self._new.get(gap, ()), float(gap)
        if offset == len(new):
            return bisect_right(found, order, key=_order)
        return bisect_left(found, order, key=_order) + sum(field.key == key for field in islice(new, offset))

    def _append(self, key: bytes, name: bytes, value: bytes) -> None:
        field = NewField(END, key, name, value)
        self._found_to_edit(key).append(field)
        self._new.setdefault(END, deque()).append(field)
        self._grown += 1

    def _assign(self, place: Place, value: str) -> None:
        if isinstance(place, NewField):
            place.value = checks.header_value(value)
            return
        received = self._received_value(place)
        if isinstance(value, str) and value.encode("utf-8", "surrogateescape") == received:
            encoded = received  # no check: it came from the MTA
        else:
            encoded = checks.header_value(value)
        if encoded == received.replace(b"\r\n", b"\n") or encoded == received:
            self._changed.pop(place, None)
        else:
            self._changed[place] = encoded

    def _delete(self, key: bytes, first: int, count: int) -> None:
        """So many fields of this name, from the one that has `first` of them above it."""
        found = self._found_to_edit(key)
        found.rotate(-first)
        deleted = [found.popleft() for _ in range(count)]
        found.rotate(first)
        self._grown -= len(deleted)
        self._changed.update(dict.fromkeys(place for place in deleted if isinstance(place, int)))
        gone = set(deleted)
        for gap in {place.gap for place in deleted if isinstance(place, NewField)}:
            self._new[gap] = deque(field for field in self._new[gap] if field not in gone)


def _key(name: str) -> bytes:
    """What is compared of a name. Only ASCII letters have a case, as in both MTAs."""
    if not isinstance(name, str):
        raise TypeError(f"the name of a header field must be a str, not {type(name).__name__}")
    return name.encode("utf-8", "surrogateescape").lower()


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def _order(place: Place) -> float:
    return float(place.gap) if isinstance(place, NewField) else place + 0.5
