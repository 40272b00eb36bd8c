# SPDX-License-Identifier: GPL-3.0-or-later
"""The unified diff of ``milter check``: patch(1) makes the one side of the other, whatever the two are."""

import re
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from milter.checker import diff
from milter.checker.diff import lines_of, unified
from milter.testing import Message

# Few different lines, so that much is equal and much is near.
LINES = st.lists(st.sampled_from([b"a", b"b", b"c"]), max_size=30)


def patched(before: Sequence[bytes], lines: Sequence[str]) -> list[bytes]:
    """What the diff makes of `before`; fails where they do not fit together."""
    after: list[bytes] = []
    position = 0
    for line in lines[2:]:
        if match := re.fullmatch(r"@@ -(\d+),(\d+) \+(\d+),(\d+) @@", line):
            start = int(match[1]) - (match[2] != "0")
            assert start >= position
            after += before[position:start]
            position = start
            assert len(after) == int(match[3]) - (match[4] != "0")
            continue
        if line[0] in " -":
            assert before[position] == line[1:].encode()
            position += 1
        if line[0] in " +":
            after.append(line[1:].encode())
    return after + list(before[position:])


@given(LINES, LINES)
def test_the_diff_makes_one_of_the_other(before: list[bytes], after: list[bytes]) -> None:
    lines = list(unified(before, after, "text"))
    assert patched(before, lines) == after
    assert bool(lines) == (before != after)


@given(LINES, LINES)
def test_the_diff_of_much_is_coarser_and_as_right(before: list[bytes], after: list[bytes]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diff, "_MOST_COMPARISONS", 10)
        assert patched(before, list(unified(before, after, "text"))) == after


@given(LINES, LINES)
def test_no_hunk_has_more_than_three_lines_around_its_changes(before: list[bytes], after: list[bytes]) -> None:
    text = "".join(line[0] for line in list(unified(before, after, "text"))[2:])
    for hunk in filter(None, text.split("@")):
        assert not re.search(r"^ {4}| {4}$| {7}", hunk)
        assert "-" in hunk or "+" in hunk


def test_lines_that_look_alike_and_are_not_the_same_differ() -> None:
    assert list(unified([b"\x07"], [b"\\x07"], "text"))[3:] == ["-\\x07", "+\\x07"]


def test_the_lines_of_a_message_are_its_fields_as_folded_and_its_body() -> None:
    message = Message.parse(b"A: 1\n\t2\nB: 3\n\none\rx\n\nlast")
    assert lines_of(message) == [b"A: 1", b"\t2", b"B: 3", b"", b"one\rx", b"", b"last"]
