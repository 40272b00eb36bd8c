# SPDX-License-Identifier: GPL-3.0-or-later
"""Many messages, over several connections at once: how many a second, and how long each takes.

Each message has a connection of its own, as the messages of different SMTP clients have. Its latency is the time
from before the connecting to the verdict. Connections at once are processes, so that none waits for another.
They are Python: some thousand messages a second are their own limit, and a faster filter is not measured by them.
"""

import contextlib
import math
import multiprocessing
import signal
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice, repeat
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple, TypeAlias

from milter.checker.arguments import Order
from milter.checker.mails import Source, as_received
from milter.checker.sending import INTERRUPTED, check_message, worst
from milter.testing.delivery import Message

_Messages: TypeAlias = Sequence[tuple[str, Message]]


class Attempt(NamedTuple):
    """A message that was sent. ``verdict`` is None where there was none, ``reached`` whether the filter was."""

    verdict: str | None
    problem: str | None
    exit_code: int
    seconds: float
    reached: bool


@dataclass(slots=True)
class Figures:
    """What was measured, until now or altogether. ``wanted``: how many messages there are to send."""

    wanted: int
    connections: int
    seconds: float = 0.0
    times: "array[float]" = field(default_factory=lambda: array("d"))
    verdicts: Counter[str] = field(default_factory=Counter)
    problems: Counter[str] = field(default_factory=Counter)
    exit_codes: set[int] = field(default_factory=set)
    interrupted: bool = False

    @property
    def count(self) -> int:
        """How many messages were sent, with a verdict or without."""
        return self.verdicts.total() + self.problems.total()

    @property
    def rate(self) -> float:
        """Verdicts per second."""
        return self.verdicts.total() / self.seconds if self.seconds else 0.0

    @property
    def latencies(self) -> dict[str, float]:
        """Seconds to the verdict: of the middle one, of the slowest of 99 in 100, and of the slowest."""
        times = sorted(self.times)
        return {name: quantile(times, part) for name, part in (("p50", 0.5), ("p99", 0.99), ("max", 1.0))}

    @property
    def exit_code(self) -> int:
        """The worst of all messages."""
        return INTERRUPTED if self.interrupted else worst(self.exit_codes)

    def add(self, attempt: Attempt) -> None:
        """Count a message."""
        self.exit_codes.add(attempt.exit_code)
        if attempt.verdict is None:
            self.problems[attempt.problem or "no verdict"] += 1
        else:
            self.verdicts[attempt.verdict] += 1
            self.times.append(attempt.seconds)


def quantile(ordered: Sequence[float], part: float) -> float:
    """The smallest value that so large a part of all do not exceed; 0 of nothing.

    >>> quantile([1.0, 2.0, 3.0, 4.0], 0.5), quantile([1.0, 2.0, 3.0, 4.0], 0.99)
    (2.0, 4.0)
    """
    return ordered[max(math.ceil(part * len(ordered)) - 1, 0)] if ordered else 0.0


def measure(order: Order, sources: Sequence[Source], show: Callable[[Figures], None]) -> Figures:
    """Send all messages as often as it was ordered. `show` is told of each; Ctrl-C ends it early.

    Raises `MailError` for a message that cannot be read, before anything is sent.
    """
    messages = [(source.name, as_received(source.read(), order.rules)) for source in sources]
    figures = Figures(len(messages) * order.repeat, order.connections)
    try:
        with _senders(order, messages, min(order.connections, figures.wanted)) as attempts:
            _count(attempts, figures, show)
    except KeyboardInterrupt:
        figures.interrupted = True
    return figures


def _count(attempts: Iterator[Attempt], figures: Figures, show: Callable[[Figures], None]) -> None:
    start = time.perf_counter()
    try:
        for attempt in attempts:
            figures.add(attempt)
            show(figures)
            # Where nobody listens from the beginning, each of a million messages would say the same.
            if not attempt.reached and not figures.verdicts:
                return
    finally:
        figures.seconds = time.perf_counter() - start


# ---- who sends


@contextlib.contextmanager
def _senders(order: Order, messages: _Messages, count: int) -> Iterator[Iterator[Attempt]]:
    """The attempts, as they are made. All who send are ready at the beginning, and have ended at the end."""
    if count == 1:
        yield _attempts(order, messages, 0, 1)
        return
    # Threads would wait for one another, and what is measured would be that. The server forks quickly, and knows
    # nothing of the threads that may be here.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    pipes, processes = [], []
    try:
        for number in range(count):
            here, there = context.Pipe()
            process = context.Process(target=_send_share, args=(there, order, messages, number, count), daemon=True)
            process.start()
            there.close()
            pipes.append(here)
            processes.append(process)
        for pipe in pipes:
            pipe.recv()
        for pipe in pipes:
            pipe.send("go")
        yield _gathered(pipes)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _gathered(pipes: "list[Connection[Any, Any]]") -> Iterator[Attempt]:
    """What comes through the pipes, until all are closed."""
    while pipes:
        for pipe in wait(pipes):
            assert isinstance(pipe, Connection)
            try:
                yield pipe.recv()
            except (EOFError, ConnectionResetError):
                pipes.remove(pipe)


def _send_share(pipe: "Connection[Any, Any]", order: Order, messages: _Messages, number: int, count: int) -> None:
    """A process: one of so many."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one who counts
    pipe.send("ready")
    pipe.recv()
    for attempt in _attempts(order, messages, number, count):
        pipe.send(attempt)


def _attempts(order: Order, messages: _Messages, number: int, count: int) -> Iterator[Attempt]:
    """Send every `count`-th message, from that number on."""
    everything = chain.from_iterable(repeat(messages, order.repeat))
    for name, message in islice(everything, number, None, count):
        start = time.perf_counter()
        result = check_message(order, name, message)
        seconds = time.perf_counter() - start
        verdict = result.outcome.value if result.outcome else None
        yield Attempt(verdict, result.problem, result.exit_code, seconds, result.transcript is not None)


# ---- what is told


def figures_lines(figures: Figures) -> Iterator[str]:
    """The figures, told to people."""
    yield (
        f"messages  {figures.count} of {figures.wanted} in {figures.seconds:.3f} s, "
        f"over {figures.connections} connections at once"
    )
    yield f"rate      {figures.rate:.1f} messages/s"
    if figures.times:
        told = ", ".join(f"{name} {seconds * 1000:.2f} ms" for name, seconds in figures.latencies.items())
        yield f"latency   {told}"
    if figures.verdicts:
        yield "verdicts  " + ", ".join(f"{verdict} {count}" for verdict, count in sorted(figures.verdicts.items()))
