# SPDX-License-Identifier: GPL-3.0-or-later
"""Many messages, over several connections at once: how many a second, and how long each takes.

Each message has a connection of its own, as the messages of different SMTP clients have. Its latency is the time
from before the connecting to the verdict. The sender is Python, too, in one process: some thousand messages a second
are its own limit, and a filter that is faster is not measured by it.
"""

import math
import threading
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, repeat

from milter.checker.arguments import Order
from milter.checker.mails import Source, as_received
from milter.checker.sending import INTERRUPTED, Result, check_message, worst
from milter.testing.delivery import Message


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

    def add(self, result: Result, seconds: float) -> None:
        """Count a message."""
        self.exit_codes.add(result.exit_code)
        if result.outcome is None:
            self.problems[result.problem or "no verdict"] += 1
        else:
            self.verdicts[result.outcome.value] += 1
            self.times.append(seconds)


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
    senders = _Senders(order, chain.from_iterable(repeat(messages, order.repeat)), figures, show)
    start = time.perf_counter()
    try:
        senders.run()
    except KeyboardInterrupt:
        figures.interrupted = True
    senders.stop()
    figures.seconds = time.perf_counter() - start
    return figures


class _Senders:
    """Threads that take one message after the other. Their lock guards what is to do, and the figures."""

    def __init__(
        self,
        order: Order,
        messages: Iterator[tuple[str, Message]],
        figures: Figures,
        show: Callable[[Figures], None],
    ) -> None:
        self._order = order
        self._messages = messages
        self._figures = figures
        self._show = show
        self._lock = threading.Lock()
        self._stopped = False

    def run(self) -> None:
        """Until all is sent."""
        count = min(self._order.connections, self._figures.wanted)
        threads = [threading.Thread(target=self._send, name=f"sender {n}", daemon=True) for n in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def stop(self) -> None:
        """Count no more: a message that is on its way is not waited for."""
        with self._lock:
            self._stopped = True

    def _send(self) -> None:
        while (item := self._next()) is not None:
            start = time.perf_counter()
            result = check_message(self._order, *item)
            self._note(result, time.perf_counter() - start)

    def _next(self) -> tuple[str, Message] | None:
        with self._lock:
            return None if self._stopped else next(self._messages, None)

    def _note(self, result: Result, seconds: float) -> None:
        with self._lock:
            if self._stopped:
                return
            self._figures.add(result, seconds)
            self._show(self._figures)
            # Where nobody listens from the beginning, each of a million messages would say the same.
            self._stopped = result.transcript is None and not self._figures.verdicts


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
