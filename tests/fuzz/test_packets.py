# SPDX-License-Identifier: GPL-3.0-or-later
"""Mutated conversations against filters in processes of their own, compared with the model.

A failure prints the seed of the conversation; the same seed gives the same bytes::

    python -m tests.fuzz.test_packets --seed 4711 --count 1 --kind replying
"""

import argparse
import itertools
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest

from tests.filter_process import FilterProcess
from tests.fuzz.link import WHOLE, Ending, Surprise, compare, exchange
from tests.fuzz.model import Kind, Model, Process
from tests.fuzz.mutation import cuts_of, encoded, stream_of

COUNT = int(os.environ.get("MILTER_FUZZ_PACKETS", "600"))
"""Conversations for each kind of filter."""
SEED = int(os.environ.get("MILTER_FUZZ_SEED", "1"))

FILTER = Path(__file__).parent / "filters" / "ordered.py"

# A conversation without faults, after which the filter is known to be well.
WELL = [
    (b"O", b"\0\0\0\6" + b"\0\0\1\xff" + b"\0\x1f\xff\xff"),
    (b"C", b"well.example\x004\x00\x19192.0.2.7\0"),
    (b"H", b"well.example\0"),
    (b"M", b"<well@client.example>\0"),
    (b"R", b"<bob@mta.example>\0"),
    (b"T", b""),
    (b"L", b"Subject\0 well\0"),
    (b"N", b""),
    (b"B", b"all is well\r\n" * 300),
    (b"E", b""),
    (b"Q", b""),
]


# With this offer the library declines unknown commands, which libmilter then takes for declined on all connections.
DECLINING = [(b"O", b"\0\0\0\6" + b"\0\0\1\xff" + b"\0\0\1\0"), (b"Q", b"")]


class Target:
    """A filter under fire."""

    def __init__(self, directory: Path, kind: Kind) -> None:
        self.kind = kind
        self.model = Process()
        self.process = FilterProcess(
            FILTER,
            f"unix:{directory}/{kind.value}.sock",
            kind.value,
            environment={"MALLOC_ARENA_MAX": "1"},  # or each new thread takes memory that it may never need
        )

    @property
    def where(self) -> str:
        return self.process.socket

    def send(self, stream: bytes, cuts: list[int], ending: Ending = WHOLE) -> None:
        """Raises `Surprise` for an answer that is wrong."""
        received = exchange(self.where, stream, cuts, ending)
        prediction = Model(self.model, self.kind).stream(stream if ending.at is None else stream[: ending.at])
        if received is not None:
            compare(received, prediction)

    def check(self) -> None:
        """It lives, it serves the next client well, and has logged nothing unexpected."""
        self.send(encoded(WELL), [])
        said = [line for line in self.process.stdout.lines if line.startswith("UNEXPECTED")]
        if said:
            raise Surprise("the filter logged:\n" + "\n".join(said))

    def footprint(self) -> "Footprint":
        pid = self.process.pid
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return Footprint(pages * os.sysconf("SC_PAGE_SIZE") >> 10, len(os.listdir(f"/proc/{pid}/fd")))


@dataclass(frozen=True)
class Footprint:
    kibibytes: int
    descriptors: int


def fire(target: Target, seed: int) -> None:
    """The conversation of this seed."""
    random = Random(seed)
    stream = stream_of(random)
    cuts = cuts_of(stream, random)
    at = random.randrange(len(stream) + 1) if random.random() < 0.15 else None
    target.send(stream, cuts, Ending(at, abruptly=random.random() < 0.1))


def seeds(first: int) -> Iterator[int]:
    """Those of a run: a run with the next number shares none of them."""
    return itertools.count(first * 1_000_000)


@pytest.fixture(params=Kind, ids=lambda kind: kind.value)
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Target]:
    target = Target(tmp_path, request.param)
    with target.process:
        target.send(encoded(DECLINING), [])
        yield target


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the size of a process is told in /proc")
def test_mutated_conversations_are_answered_as_predicted_and_leave_nothing(target: Target) -> None:
    early: Footprint | None = None
    for number, seed in enumerate(itertools.islice(seeds(SEED), COUNT)):
        try:
            fire(target, seed)
            if number % 50 == 0:
                target.check()
        except (Surprise, OSError) as surprise:
            pytest.fail(f"seed {seed} ({target.kind.value}): {surprise}")
        if number == COUNT // 3:
            early = target.footprint()
    target.check()
    late = target.footprint()
    assert early is not None
    assert late.kibibytes - early.kibibytes < 16384 + COUNT // 2
    assert late.descriptors <= early.descriptors + 2


# ---- As a program


def main() -> int:
    parser = argparse.ArgumentParser(description="Mutated conversations against a filter.")
    parser.add_argument("--seed", type=int, default=SEED, help="of the first conversation")
    parser.add_argument("--count", type=int, help="so many conversations; by default until --seconds are over")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--kind", choices=[kind.value for kind in Kind], default="replying")
    parser.add_argument("--socket", help="of a filter that runs already, a path")
    options = parser.parse_args()
    return run(options)


def run(options: argparse.Namespace) -> int:
    import tempfile

    with tempfile.TemporaryDirectory(prefix="fuzz.") as directory:
        target = Target(Path(directory), Kind(options.kind))
        with target.process:
            target.send(encoded(DECLINING), [])
            end = time.monotonic() + options.seconds
            for number in itertools.count():
                if number == options.count or (options.count is None and time.monotonic() > end):
                    break
                fire(target, options.seed + number)
                if number % 50 == 0:
                    target.check()
            target.check()
            print(f"{number} conversations with {options.kind}, from seed {options.seed}; {target.footprint()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
