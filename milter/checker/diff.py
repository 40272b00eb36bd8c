# SPDX-License-Identifier: GPL-3.0-or-later
"""A unified diff of lines that may hold any bytes.

Lines are compared as bytes and shown as text without control characters, so that a change is shown even where both
lines look alike, and no message can do anything to a terminal.
"""

from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher
from typing import TypeAlias

from milter.printable import printable
from milter.testing.delivery import Message
from milter.testing.wire import decode_text, encode_text

# Beyond that, what lies between the first and the last difference is one change: a better answer costs minutes.
_MOST_COMPARISONS = 4_000_000

_CONTEXT = 3

_Block: TypeAlias = tuple[str, int, int, int, int]


def lines_of(message: Message) -> list[bytes]:
    """The lines of a message, header fields as they are folded, without line ends."""
    fields = [line for header in message.headers for line in encode_text(header.raw).split(b"\n")]
    return [*fields, b"", *message.body.split(b"\r\n")[:-1]]


def unified(before: Sequence[bytes], after: Sequence[bytes], what: str) -> Iterator[str]:
    """The diff, line by line; nothing if nothing differs. `what` names the two."""
    blocks = _blocks(before, after)
    if all(block[0] == "equal" for block in blocks):
        return
    yield f"--- {what} as sent"
    yield f"+++ {what} as delivered"
    for hunk in _hunks(blocks):
        yield f"@@ -{_range(hunk[0][1], hunk[-1][2])} +{_range(hunk[0][3], hunk[-1][4])} @@"
        for kind, first, last, new_first, new_last in hunk:
            if kind == "equal":
                yield from (f" {visible(line)}" for line in before[first:last])
            else:
                yield from (f"-{visible(line)}" for line in before[first:last])
                yield from (f"+{visible(line)}" for line in after[new_first:new_last])


def visible(line: bytes) -> str:
    """A line without anything that a terminal obeys; a tab is a tab, headers are folded with it."""
    return "\t".join(printable(part) for part in decode_text(line).split("\t"))


def _blocks(before: Sequence[bytes], after: Sequence[bytes]) -> list[_Block]:
    """What is equal and what is not, in order. The equal ends are cut off first: most of a message stays."""
    most = min(len(before), len(after))
    start = next((number for number in range(most) if before[number] != after[number]), most)
    most -= start
    tail = next((number for number in range(most) if before[-1 - number] != after[-1 - number]), most)
    end, new_end = len(before) - tail, len(after) - tail
    middle = [
        (kind, first + start, last + start, new_first + start, new_last + start)
        for kind, first, last, new_first, new_last in _middle(before[start:end], after[start:new_end])
    ]
    blocks = [("equal", 0, start, 0, start), *middle, ("equal", end, len(before), new_end, len(after))]
    return [block for block in blocks if block[1] < block[2] or block[3] < block[4]]


def _middle(before: Sequence[bytes], after: Sequence[bytes]) -> list[_Block]:
    if len(before) * len(after) > _MOST_COMPARISONS:
        return [("replace", 0, len(before), 0, len(after))]
    return list(SequenceMatcher(None, before, after, autojunk=False).get_opcodes())


def _hunks(blocks: Sequence[_Block]) -> Iterator[list[_Block]]:
    """The changes with a few lines around each; those that are near one another together."""
    hunk: list[_Block] = []
    for number, (kind, first, last, new_first, new_last) in enumerate(blocks):
        if kind != "equal":
            hunk.append((kind, first, last, new_first, new_last))
            continue
        is_last = number == len(blocks) - 1
        if hunk and (is_last or last - first > 2 * _CONTEXT):
            shown = min(_CONTEXT, last - first)
            yield [*hunk, (kind, first, first + shown, new_first, new_first + shown)]
            hunk = []
        if not is_last:
            shown = last - first if hunk else min(_CONTEXT, last - first)
            hunk.append((kind, last - shown, last, new_last - shown, new_last))
    if any(block[0] != "equal" for block in hunk):
        yield hunk


def _range(first: int, last: int) -> str:
    """A hunk's lines as diff(1) writes them: counted from 1, an empty one by the line before it."""
    count = last - first
    return f"{first + 1 if count else first},{count}"
