# SPDX-License-Identifier: GPL-3.0-or-later
"""What is sent to the MTA for the edits of a message.

A :class:`Message <milter.message.Message>` keeps what was received, and beside it what its handler wants
different. Here the two become a list of :class:`Change`: the protocol's actions, in the order in which
they are to be sent. Values in, values out; the engine sends them.

The order is

1. the envelope: sender, recipients to remove, recipients to add;
2. the header fields;
3. the body, since Postfix lets nothing stand between its pieces.

Two things make header fields hard, both observed with Postfix 3.7 and Sendmail 8.17:

- *After a deletion* Postfix renumbers the fields of that name, Sendmail does not. So the fields are gone
  through **from the bottom up**: each action then concerns a field that has nothing changed above it, and
  for both the number of a field is its number in the message as received.
- *Positions for inserting* count the MTA's own Received field as 0 in both, but Sendmail counts eight fields
  of its configuration, too, which it does not print: there the position below the first field of the message is
  9, not 2. Below its own Received, at 1, the two agree.

What a milter cannot know: whether sendmail.cf was given other such fields than the usual eight, and whether an
earlier milter deleted fields (Sendmail goes on counting them) or put some above Received. Then a field that is
inserted in the middle may be some places off; changing, deleting and adding are not affected.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from functools import lru_cache
from typing import Any, NamedTuple

from milter import checks
from milter.headers import END, Headers, NewField
from milter.message import Message
from milter.printable import printable
from milter.protocol import Actions
from milter.safe_log import SafeLog

__all__ = ["Change", "Numbering", "changes", "needed"]

log = SafeLog("milter")

_GRANTS = {
    "h": Actions.ADD_HEADER,
    "i": Actions.ADD_HEADER,
    "m": Actions.REPLACE_HEADER,
    "e": Actions.REPLACE_SENDER,
    "+": Actions.ADD_RECIPIENT,
    "2": Actions.ADD_RECIPIENT_EXT,
    "-": Actions.REMOVE_RECIPIENT,
    "b": Actions.REPLACE_BODY,
}
_BITS = {letter: int(action) for letter, action in _GRANTS.items()}


class Change(NamedTuple):
    """One action, by its letter in the protocol (``SMFIR_*`` of ``mfdef.h``).

    ====== ===================== ======================================
    letter function of libmilter arguments
    ====== ===================== ======================================
    ``h``  ``smfi_addheader``    name, value
    ``i``  ``smfi_insheader``    index (decimal), name, value
    ``m``  ``smfi_chgheader``    index (decimal), name, value; an empty value deletes
    ``e``  ``smfi_chgfrom``      address
    ``+``  ``smfi_addrcpt``      address
    ``2``  ``smfi_addrcpt_par``  address, parameters
    ``-``  ``smfi_delrcpt``      address
    ``b``  ``smfi_replacebody``  the whole body
    ====== ===================== ======================================
    """

    letter: str
    arguments: tuple[bytes, ...]

    @property
    def needs(self) -> Actions:
        """What the MTA must have granted."""
        return _GRANTS[self.letter]


def needed(changes: Iterable[Change]) -> int:
    """What the MTA must have granted for all of them, as the bits of ``Actions``.

    >>> Actions(needed([Change("h", (b"X-New", b"v")), Change("b", (b"new\\r\\n",))]))
    <Actions.ADD_HEADER|REPLACE_BODY: 3>
    """
    bits = 0
    for letter, _ in changes:
        bits |= _BITS[letter]
    return bits


class Numbering(Enum):
    """How an MTA counts header fields when one is inserted."""

    POSTFIX = "Postfix"
    SENDMAIL = "Sendmail"

    @classmethod
    def of(cls, version: str | None) -> "Numbering":
        """Of the MTA whose macro ``v`` is this. Postfix says its name in it; all others are taken for Sendmail.

        >>> Numbering.of("Postfix 3.7.11"), Numbering.of("8.17.1.9"), Numbering.of(None)
        (<Numbering.POSTFIX: 'Postfix'>, <Numbering.SENDMAIL: 'Sendmail'>, <Numbering.SENDMAIL: 'Sendmail'>)
        """
        if version is None or version[:1].isdigit():  # Sendmail's version, which it does not tell unasked
            return cls.SENDMAIL
        if version.startswith("Postfix"):
            return cls.POSTFIX
        _tell_of_stranger(version)
        return cls.SENDMAIL


@lru_cache(maxsize=16)  # once for each
def _tell_of_stranger(version: str) -> None:
    log.warning(
        "the mail server calls itself %s, not Postfix or Sendmail: header fields may be inserted some places off. "
        "If it is a Postfix with a mail_name of its own, let the name begin with Postfix",
        printable(version),
    )


def changes(message: Message, numbering: Callable[[], Numbering]) -> list[Change]:
    """The actions that make what was received into what the handler wants; none if it is that already.

    To be called before the content is gone. `numbering` is asked only if it matters.
    """
    result: list[Change] = []
    if message._new_sender is not None or message._recipients is not None:
        result += _envelope(message)
    headers = message._headers
    if headers is not None and (headers._changed or headers._new):
        result += _one_more(message, headers) or _HeaderChanges(message, headers, numbering).result()
    if message._new_body is not None:
        result.append(Change("b", (message._new_body,)))
    return result


# ---- The envelope ------------------------------------------------------------------------------


def _envelope(message: Message) -> Iterator[Change]:
    if message._new_sender is not None:
        yield Change("e", (checks.sender(message._new_sender),))
    recipients = message._recipients
    if recipients is None:
        return
    removed = [recipient for recipient in recipients._received if recipient in recipients._removed]
    for encoded in dict.fromkeys(map(checks.known_recipient, removed)):  # once, also if the client gave it twice
        yield Change("-", (encoded,))
    for recipient in recipients._added.values():
        address, parameters = checks.recipient(recipient), checks.parameters(" ".join(recipient.params.raw))
        yield Change("2", (address, parameters)) if parameters else Change("+", (address,))


# ---- The header fields -------------------------------------------------------------------------

_RECEIVED = b"received"

# Sendmail has a place for these, above the message's fields, and fills it itself in a message that has
# none (cf/m4/proto.m4). One that is inserted elsewhere would be there besides Sendmail's own.
_SENDMAILS_OWN = frozenset(
    {b"from", b"date", b"message-id", b"full-name", b"resent-from", b"resent-date", b"resent-message-id"}
)

# How many fields of Sendmail's configuration lie above the message's first field, besides Received.
_SENDMAILS_HIDDEN = 8

# Both put a field at the end when the position is beyond it. The highest number that libmilter takes.
_LAST = 0x7FFFFFFF

# Beyond this many pairs of deleted and new fields in one place it is not worth looking which belong together.
_ALIGNED_AT_MOST = 4096


def _one_more(message: Message, headers: Headers) -> list[Change]:
    """What most filters do, in short: one field more, of a name that there was none of. Else an empty list."""
    added = headers._new.get(END)
    if headers._changed or len(headers._new) > 1 or added is None or len(added) != 1:
        return []
    field = added[0]
    if field.key == _RECEIVED or headers._was_received(field.key):
        return []
    return [Change("h", (field.name, message._prefix + field.value))]


class _HeaderChanges:
    """The actions for the header fields of one message."""

    def __init__(self, message: Message, headers: Headers, numbering: Callable[[], Numbering]) -> None:
        self._prefix = message._prefix
        self._ask_numbering = numbering
        self._asked: Numbering | None = None
        self._headers = headers
        self._changed = headers._changed
        self._new: dict[int, Any] = {**headers._new}
        # The names of new fields that were added so far.
        self._added: set[bytes] = set()

    @property
    def _names(self) -> list[bytes]:
        return self._headers._received_names()

    def result(self) -> list[Change]:
        if END in self._new:
            self._new[len(self._names)] = self._new.pop(END)
        if self._changed:
            if self._new and self._headers.raw == tuple(self._headers._fields()):
                return []
            self._make_sendable()
            if self._new and None in self._changed.values():
                self._match_deleted_with_new()
        return self._from_the_bottom_up()

    def _make_sendable(self) -> None:
        """An empty value would delete: such a field is deleted, and a new one inserted in its place."""
        if self._prefix or b"" not in self._changed.values():
            return
        self._changed, self._new = dict(self._changed), {gap: list(new) for gap, new in self._new.items()}
        for position, value in self._changed.items():
            if value == b"":
                self._changed[position] = None
                name = self._names[position]
                self._new.setdefault(position, []).append(NewField(position, name.lower(), name, b""))

    def _match_deleted_with_new(self) -> None:
        """A field deleted and made again in its place was changed there, or not at all.

        Concerns each run of deleted fields with the new ones among them, from the field above the run (which
        stays) to the one below it.
        """
        changed, new = dict(self._changed), dict(self._new)
        for start, end in _runs(position for position, value in self._changed.items() if value is None):
            made = [field for gap in range(start, end + 1) for field in new.pop(gap, ())]
            gap = start
            for position, field in self._alignment(range(start, end), made):
                if position is not None and field is not None:
                    changed[position] = field.value
                    if field.value == self._headers.raw[position][1]:
                        del changed[position]
                    gap = position + 1
                elif field is not None:
                    new.setdefault(gap, []).append(field)
            if end == len(self._names) and gap in new:  # nothing is left below: this is the end
                new[end] = new.pop(gap)
        self._changed, self._new = changed, new

    def _alignment(self, deleted: range, made: list[NewField]) -> Iterator[tuple[int | None, NewField | None]]:
        """Deleted fields and new ones, paired in order so that the fewest actions are left."""
        if len(deleted) * len(made) > _ALIGNED_AT_MOST:
            yield from ((None, field) for field in made)
            return
        rows, columns = len(deleted), len(made)
        costs = [[rows - row + columns - column for column in range(columns + 1)] for row in range(rows + 1)]
        for row in range(rows - 1, -1, -1):
            for column in range(columns - 1, -1, -1):
                paired = costs[row + 1][column + 1] + self._cost(deleted[row], made[column])
                costs[row][column] = min(paired, 1 + costs[row + 1][column], 1 + costs[row][column + 1])
        row = column = 0
        while row < rows and column < columns:
            cost = self._cost(deleted[row], made[column])
            if cost < 2 and costs[row][column] == cost + costs[row + 1][column + 1]:
                yield deleted[row], made[column]
                row, column = row + 1, column + 1
            elif costs[row][column] == 1 + costs[row + 1][column]:
                row += 1
            else:
                yield None, made[column]
                column += 1
        yield from ((None, field) for field in made[column:])

    def _cost(self, position: int, field: NewField) -> int:
        """How many actions make the new field of the old one. 2 is deleting and inserting."""
        if self._names[position] != field.name:
            return 2
        if self._headers.raw[position][1] == field.value:
            return 0
        return 1 if self._prefix + field.value else 2

    def _from_the_bottom_up(self) -> list[Change]:
        end = len(self._names)
        result = [self._add(field) for field in self._new.get(end, ())]
        places = {*self._changed, *self._new}
        places.discard(end)
        for position in sorted(places, reverse=True):
            if position in self._changed:
                result.append(self._change(position, self._changed[position]))
            result += [self._insert(field, position) for field in reversed(self._new.get(position, ()))]
        return result

    def _change(self, position: int, value: bytes | None) -> Change:
        name = self._names[position]
        number = bisect_right(self._headers._positions()[name.lower()], position)
        return Change("m", (b"%d" % number, name, b"" if value is None else self._prefix + value))

    def _add(self, field: NewField) -> Change:
        """At the end. Sendmail adds a field whose name it knows above the first of that name."""
        if self._is_first(field) or self._numbering is Numbering.POSTFIX:
            return Change("h", (field.name, self._prefix + field.value))
        return Change("i", (b"%d" % _LAST, field.name, self._prefix + field.value))

    def _insert(self, field: NewField, gap: int) -> Change:
        """Below so many received fields, above what was inserted there before."""
        if field.key in _SENDMAILS_OWN and self._numbering is Numbering.SENDMAIL and self._is_first(field):
            return Change("h", (field.name, self._prefix + field.value))
        index = gap + _SENDMAILS_HIDDEN if gap and self._numbering is Numbering.SENDMAIL else gap + 1
        return Change("i", (b"%d" % index, field.name, self._prefix + field.value))

    def _is_first(self, field: NewField) -> bool:
        """Whether Sendmail has no field of this name in its list: received, deleted ones included, or new.

        Remembers that it has one now.
        """
        if field.key in self._added or field.key == _RECEIVED or self._headers._was_received(field.key):
            return False
        self._added.add(field.key)
        return True

    @property
    def _numbering(self) -> Numbering:
        if self._asked is None:
            self._asked = self._ask_numbering()
        return self._asked


def _runs(positions: Iterable[int]) -> Iterator[tuple[int, int]]:
    """The runs of consecutive numbers: the first, and the one behind the last."""
    start = end = -1
    for position in sorted(positions):
        if position != end:
            if start >= 0:
                yield start, end
            start = position
        end = position + 1
    if start >= 0:
        yield start, end
