# SPDX-License-Identifier: GPL-3.0-or-later
"""One mutated conversation, all of which follows from its seed."""

from random import Random

from tests.fuzz.link import Ending
from tests.fuzz.mutation import cuts_of, stream_of
from tests.fuzz.target import Target


def fire(target: Target, seed: int) -> None:
    """Raises `Surprise` for an answer that the model did not predict."""
    random = Random(seed)
    stream = stream_of(random)
    cuts = cuts_of(stream, random)
    at = random.randrange(len(stream) + 1) if random.random() < 0.15 else None
    target.send(stream, cuts, Ending(at, abruptly=random.random() < 0.1))
