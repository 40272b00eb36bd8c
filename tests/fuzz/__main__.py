# SPDX-License-Identifier: GPL-3.0-or-later
"""Mutated conversations for a while, or those of given seeds: ``python -m tests.fuzz``."""

import argparse
import itertools
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.fuzz.fire import fire
from tests.fuzz.link import Surprise
from tests.fuzz.model import Kind
from tests.fuzz.sanitized import Sanitized, built
from tests.fuzz.target import Target


def main() -> int:
    options = arguments()
    with tempfile.TemporaryDirectory(prefix="fuzz.") as name:
        directory = Path(name)
        build = built(directory / "build") if options.sanitized else None
        kinds = list(Kind) if options.kind is None else [Kind(options.kind)]
        failed = [kind for kind in kinds if not run(directory, kind, build, options, len(kinds))]
    return 1 if failed else 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Mutated conversations against filters.")
    parser.add_argument("--seed", type=int, default=1, help="of the first conversation [1]")
    parser.add_argument("--count", type=int, help="so many conversations for each kind, instead of --seconds")
    parser.add_argument("--seconds", type=float, default=60.0, help="for all kinds together [60]")
    parser.add_argument("--kind", choices=[kind.value for kind in Kind], help="of filter [all]")
    parser.add_argument("--sanitized", action="store_true", help="with the sanitizers of the compiler")
    return parser.parse_args()


def run(directory: Path, kind: Kind, build: Sanitized | None, options: argparse.Namespace, kinds: int) -> bool:
    """False: a conversation was answered in an unexpected way."""
    target = Target(directory, kind, build)
    sent = 0
    with target.process:
        try:
            target.decline_unknown_commands()
            for sent, number in enumerate(numbers(options, kinds), start=1):
                fire(target, number)
                if sent % 50 == 0:
                    target.check()
            target.check()
        except (Surprise, OSError) as surprise:
            print(f"FAILED: seed {number} with {kind.value}: {surprise}\n{target.process}")
            return False
        print(f"{kind.value}: {sent} conversations from seed {options.seed}, {target.footprint()}", flush=True)
    return True


def numbers(options: argparse.Namespace, kinds: int) -> Iterator[int]:
    end = time.monotonic() + options.seconds / kinds
    for number in itertools.count(options.seed):
        if number - options.seed == options.count or (options.count is None and time.monotonic() > end):
            return
        yield number


if __name__ == "__main__":
    sys.exit(main())
