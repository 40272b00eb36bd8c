# SPDX-License-Identifier: GPL-3.0-or-later
"""Many messages that wait at once in one process: ``python -m benchmarks.waiting``.

Each of 500 connections sends a message, whose coroutine sleeps for a second. One after the other that would take more
than eight minutes; all must be answered within two seconds. Exit code 1: they were not, or an answer was wrong.
"""

import argparse
import resource
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.contenders import Program
from benchmarks.generator import Generator, Told
from benchmarks.process import FilterProcess
from benchmarks.workshop import HERE, Unavailable, Workshop

FILTER = HERE / "filters" / "milter_waiting.py"
SLACK = 1.0  # seconds that all together may take longer than one


def main(arguments: Sequence[str] | None = None) -> int:
    parsed = _parser().parse_args(arguments)
    _allow_many_connections()
    workshop = Workshop(parsed.cache)
    try:
        generator = Generator(workshop.load())
        library = workshop.milter(parsed.link)
    except Unavailable as reason:
        raise SystemExit(f"it cannot be built: {reason}") from None
    program = Program([sys.executable, str(FILTER), str(parsed.seconds)], {"PYTHONPATH": str(library)})
    with tempfile.TemporaryDirectory() as directory, FilterProcess(program, "unix", Path(directory), "waiting") as run:
        told = generator.run(run.socket, connections=parsed.connections, messages=parsed.connections)
        peak = run.peak_kib()
    return judge(told, parsed.connections, parsed.seconds, peak)


def judge(told: Told, connections: int, seconds: float, peak: int) -> int:
    """Say how it went; the exit code."""
    right, took = told["messages"], told["seconds"]
    limit = seconds + SLACK
    good = right == connections and told["wrong"] == 0 and took <= limit
    print(
        f"{right:,} of {connections:,} messages, each of which waited {seconds:g} s, were answered in {took:.2f} s "
        f"(required: all within {limit:g} s): {'ok' if good else 'MISSED'}. Peak memory {peak / 1024:.1f} MiB."
    )
    for complaint in told["complaints"]:
        print(f"wrong: {complaint}")
    return 0 if good else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.waiting", description="Many messages that wait at once."
    )
    parser.add_argument("--connections", type=int, default=500, metavar="N", help="[500]")
    parser.add_argument("--seconds", type=float, default=1.0, metavar="S", help="that each message waits [1]")
    parser.add_argument(
        "--link", choices=("static", "shared"), default="static", help="how libmilter is linked [static]"
    )
    parser.add_argument("--cache", type=Path, default=HERE / ".cache", metavar="DIR", help="for what is built")
    return parser


def _allow_many_connections() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


if __name__ == "__main__":
    sys.exit(main())
