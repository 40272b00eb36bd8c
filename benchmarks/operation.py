# SPDX-License-Identifier: GPL-3.0-or-later
"""``python -m benchmarks.operation``: what the operation of a filter costs its mail, in counts and ratios.

- *reloads*: two workers under steady load of eight connections are reloaded again and again. Messages that fail: none.
- *kills*: workers are killed with SIGKILL under the same load. Only messages that were in that worker may fail.
- *cores*: a filter that computes for a millisecond, with one worker and with two.
- *threads*: one process of a free-threaded Python, with the GIL off and on: a filter that computes, and one that does
  next to nothing.
- *idle*: eight busy connections while 2,000 others are open, compared with the filter in C in the same state.
- *stop*: the filter is stopped under load. No message may be accepted that it had not judged.
"""

import argparse
import contextlib
import json
import os
import resource
import signal
import socket
import statistics
import sys
import sysconfig
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.contenders import Program
from benchmarks.generator import Generator
from benchmarks.process import FilterProcess
from benchmarks.workshop import HERE, Workshop

CONNECTIONS = 8
IDLE = 2000
PATIENCE = 60.0  # seconds until something hangs


@dataclass
class Yard:
    """Where the filters run."""

    directory: Path
    workshop: Workshop
    generator: Generator
    names: Iterator[str]

    @contextlib.contextmanager
    def running(self, module: str, workers: int, **variables: str) -> Iterator[FilterProcess]:
        """``milter run`` with one of the benchmark's filters, and more variables of its environment."""
        command = [sys.executable, "-m", "milter", "run", f"{module}:app", "--workers", str(workers), "--socket"]
        paths = [str(self.workshop.milter("static")), str(self.workshop.filters())]
        program = Program(command, {"PYTHONPATH": os.pathsep.join(paths), **variables})
        with FilterProcess(program, "unix", self.directory, next(self.names)) as process:
            yield process

    def load(self, process: FilterProcess, seconds: float) -> dict[str, Any]:
        return self.generator.run(process.socket, connections=CONNECTIONS, per_connection=1, seconds=seconds)


class Manager:
    """Hears what a filter tells systemd."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.path)
        self._socket.settimeout(PATIENCE)

    def wait_for(self, word: bytes) -> None:
        while not self._socket.recv(200).startswith(word):
            pass


def reloads(yard: Yard, count: int) -> dict[str, Any]:
    manager = Manager(yard.directory / "notify")
    told: Counter[str] = Counter()
    over = threading.Event()
    with yard.running("milter_message", 2, NOTIFY_SOCKET=manager.path) as process:
        manager.wait_for(b"READY=1")

        def load() -> None:
            while not over.is_set():
                _add(told, yard.load(process, 1.0))

        thread = threading.Thread(target=load)
        thread.start()
        for _ in range(count):
            os.kill(process.pid, signal.SIGHUP)
            manager.wait_for(b"RELOADING=1")
            manager.wait_for(b"READY=1")
        over.set()
        thread.join()
    return {"reloads": count, **told}


def kills(yard: Yard, count: int) -> dict[str, Any]:
    told: Counter[str] = Counter()
    with yard.running("milter_message", 2) as process:
        for _ in range(count):
            _wait_for_workers(process, 2)
            thread = threading.Thread(target=lambda: _add(told, yard.load(process, 0.4)))
            thread.start()
            time.sleep(0.2)
            os.kill(_workers(process)[0], signal.SIGKILL)
            thread.join()
    return {"kills": count, **told}


def cores(yard: Yard, rounds: int) -> dict[str, Any]:
    with yard.running("cpu_bound", 1) as one, yard.running("cpu_bound", 2) as two:
        _wait_for_workers(two, 2)
        ratios = []
        for _ in range(rounds):
            alone = yard.load(one, 2.0)["per_second"]
            ratios.append(yard.load(two, 2.0)["per_second"] / alone)
    return {"rounds": rounds, "ratio": round(statistics.median(ratios), 2)}


def threads(yard: Yard, rounds: int) -> dict[str, Any]:
    if not sysconfig.get_config_var("Py_GIL_DISABLED"):
        return {"unavailable": "it needs a free-threaded Python, such as python3.14t"}
    return {
        "rounds": rounds,
        **_side_by_side(yard, "computing", rounds),
        **_side_by_side(yard, "milter_message", rounds),
    }


def _side_by_side(yard: Yard, module: str, rounds: int) -> dict[str, Any]:
    """Messages of threads side by side, for each one of threads one at a time."""
    with yard.running(module, 1, PYTHON_GIL="0") as free, yard.running(module, 1, PYTHON_GIL="1") as bound:
        ratios, rates = [], []
        for _ in range(rounds):
            alone = yard.load(bound, 2.0)["per_second"]
            rates.append(yard.load(free, 2.0)["per_second"])
            ratios.append(rates[-1] / alone)
    return {
        f"{module}_per_second": round(statistics.median(rates)),
        f"{module}_ratios": [round(ratio, 2) for ratio in sorted(ratios)],
    }


def idle(yard: Yard, rounds: int) -> dict[str, Any]:
    c = Program([str(yard.workshop.c_filter()), "nr"])
    ratios, rates = [], []
    with (
        FilterProcess(c, "unix", yard.directory, next(yard.names)) as reference,
        yard.running("milter_message", 1) as ours,
        yard.generator.holding(reference.socket, IDLE, CONNECTIONS),
        yard.generator.holding(ours.socket, IDLE, CONNECTIONS),
    ):
        for _ in range(rounds):
            theirs = yard.load(reference, 1.0)["per_second"]
            rates.append(yard.load(ours, 1.0)["per_second"])
            ratios.append(rates[-1] / theirs)
    return {
        "idle": IDLE,
        "rounds": rounds,
        "messages_per_second": round(statistics.median(rates)),
        "ratio": round(statistics.median(ratios), 2),
    }


def stop(yard: Yard, count: int) -> dict[str, Any]:
    told: Counter[str] = Counter()
    codes: Counter[int] = Counter()
    for _ in range(count):
        with yard.running("milter_message", 2) as process:
            thread = threading.Thread(target=lambda process=process: _add(told, yard.load(process, 0.6)))
            thread.start()
            time.sleep(0.3)
            os.kill(process.pid, signal.SIGTERM)
            codes[process.wait()] += 1
            thread.join()
    return {"stops": count, "exit_codes": dict(codes), **told}


def _add(told: "Counter[str]", one: dict[str, Any]) -> None:
    """What became of the messages. An MTA that cannot connect, or loses the connection, has no verdict."""
    told["messages"] += one["messages"]
    told["failed"] += one["wrong"]
    for complaint in one["complaints"]:
        kind = "refused" if complaint.startswith("no connection") else "cut"
        told[kind if "closed the connection" in complaint or kind == "refused" else "wrong"] += 1


def _workers(process: FilterProcess) -> list[int]:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(child) for child in children]


def _wait_for_workers(process: FilterProcess, count: int) -> None:
    end = time.monotonic() + PATIENCE
    while len(_workers(process)) < count and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(0.3)  # they load the filter


PARTS: dict[str, tuple[Callable[[Yard, int], dict[str, Any]], int]] = {
    "reloads": (reloads, 100),
    "kills": (kills, 50),
    "cores": (cores, 5),
    "threads": (threads, 5),
    "idle": (idle, 5),
    "stop": (stop, 10),
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.operation", description="Reloads, kills, workers.")
    parser.add_argument("--only", action="append", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    parser.add_argument("--cache", type=Path, default=HERE / ".cache", metavar="DIR", help="for what is built")
    parsed = parser.parse_args(arguments)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 3 * IDLE)), hard))
    workshop = Workshop(parsed.cache)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="milter-bench-") as directory:
        names = (f"filter-{number}" for number in range(1_000_000))
        yard = Yard(Path(directory), workshop, Generator(workshop.load(), patience=30), names)
        for name in parsed.only or PARTS:
            part, size = PARTS[name]
            results[name] = part(yard, size)
            print(f"{name}: {', '.join(f'{key} {value}' for key, value in results[name].items())}", flush=True)
    if parsed.json:
        parsed.json.write_text(json.dumps(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
