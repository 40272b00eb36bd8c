# SPDX-License-Identifier: GPL-3.0-or-later
"""Mutated conversations against filters in processes of their own, compared with the model.

A failure tells the seed of the conversation; the same seed gives the same bytes::

    python -m tests.fuzz --seed 4711 --count 1 --kind replying
"""

import itertools
import os
from pathlib import Path

import pytest

from tests.fuzz.fire import fire
from tests.fuzz.link import Surprise
from tests.fuzz.target import Footprint, Target

COUNT = int(os.environ.get("MILTER_FUZZ_PACKETS", "400"))
"""Conversations for each kind of filter; a run with the next seed shares none of them."""
ROUND = max(COUNT // 3, 100)
ROUNDS = 4
FIRST = int(os.environ.get("MILTER_FUZZ_SEED", "1")) * 1_000_000


def test_mutated_conversations_are_answered_as_predicted(target: Target) -> None:
    target.decline_unknown_commands()
    for number in range(FIRST, FIRST + COUNT):
        try:
            fire(target, number)
            if number % 50 == 0:
                target.check()
        except (Surprise, OSError) as surprise:
            pytest.fail(f"seed {number} ({target.kind.value}): {surprise}")
    target.check()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the size of a process is told in /proc")
@pytest.mark.parametrize("build", [None], ids=["plain"])
def test_mutated_conversations_leave_nothing_behind(target: Target) -> None:
    sizes: list[Footprint] = []
    for _ in range(ROUNDS):
        for number in range(FIRST, FIRST + ROUND):
            fire(target, number)
        target.check()
        sizes.append(target.footprint())
    # A leak makes each round need more; what malloc keeps grows now and then, up to some size.
    assert min(late.kibibytes - early.kibibytes for early, late in itertools.pairwise(sizes)) < 512
    assert sizes[-1].descriptors <= sizes[0].descriptors + 2
