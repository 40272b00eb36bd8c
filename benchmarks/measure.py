# SPDX-License-Identifier: GPL-3.0-or-later
"""Goes through the rounds: all filters take turns, so that a slow moment of the machine hits them alike."""

import contextlib
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.contenders import Contender, Program
from benchmarks.generator import Generator, LoadFailed, Told
from benchmarks.process import FilterProcess, StartFailed
from benchmarks.scenarios import Scenario

Round = dict[str, Any]
Result = dict[str, Any]
Results = dict[str, Result]
"""Of one scenario, by the filter's name: figures, or ``wrong``, or ``unavailable``."""

SOAK_POINTS = 20
CPU_LEAST = 0.1  # seconds


@dataclass(frozen=True)
class Settings:
    rounds: int
    seconds: float
    """Of one run of the generator."""
    warm_up: float
    patience_seconds: float
    idle: int
    soak: int
    """Messages; 0: no soak."""


class WrongAnswers(Exception):
    """A filter's answers were wrong: there are no figures for it. The text describes the first ones."""


@dataclass
class Post:
    """A running filter in one scenario, and what was measured of it."""

    scenario: Scenario
    contender: Contender
    process: FilterProcess
    generator: Generator
    settings: Settings
    rounds: list[Round] = field(default_factory=list)
    wrong: str | None = None
    messages: int = 0

    def play(self) -> None:
        """One round; none any more once an answer was wrong."""
        if self.wrong is not None:
            return
        try:
            self.rounds.append(_PLAYS[self.scenario.kind](self))
        except WrongAnswers as wrong:
            self.wrong = str(wrong)
        except (LoadFailed, OSError, StartFailed) as failure:  # OSError: the process is not there any more
            self.wrong = f"{failure} (the filter's last words: {self.process.last_words()})"

    def warm_up(self) -> None:
        with contextlib.suppress(WrongAnswers, LoadFailed):  # the first round will tell
            self.load(seconds=self.settings.warm_up)

    def load(self, **options: float) -> Told:
        scenario = self.scenario
        if scenario.body is not None:
            options["body"] = scenario.body
        options = {"connections": scenario.connections, "per_connection": scenario.per_connection, **options}
        told = self.generator.run(self.process.socket, **options)
        self.messages += int(told["messages"])
        return checked(told)

    def result(self) -> Result:
        """Ends the filter."""
        if self.wrong is not None:
            return {"wrong": self.wrong}
        resident, peak = self.process.rss_kib(), self.process.peak_kib()
        numbers = [name for name, value in self.rounds[0].items() if isinstance(value, (int, float))]
        return {
            "median": {name: statistics.median(one[name] for one in self.rounds) for name in numbers},
            "cpu_us_per_message": _cpu_us_per_message(self.rounds),
            "rounds": self.rounds,
            "rss_kib": resident,
            "peak_rss_kib": peak,
            "switches_per_message": round(self.process.end() / self.messages, 1) if self.messages else None,
        }


def _cpu_us_per_message(rounds: list[Round]) -> float | None:
    """Of all rounds together; None when it was too little to tell, since the kernel counts hundredths of a second."""
    seconds = sum(one.get("cpu_seconds", 0) for one in rounds)
    return None if seconds < CPU_LEAST else round(seconds / sum(one["messages"] for one in rounds) * 1e6, 1)


def checked(told: Told) -> Told:
    """What the generator tells, if all answers were right."""
    if told["wrong"] > 0:
        raise WrongAnswers(f"{told['wrong']} wrong answers: " + "; ".join(dict.fromkeys(told["complaints"])))
    if told["messages"] == 0:
        raise WrongAnswers("no message was answered")
    return told


# ---- One round of each kind -------------------------------------------------------------------


def _play_rate(post: Post, seconds: float | None = None) -> Round:
    before, busy_before, start = post.process.cpu_seconds(), machine.busy_seconds(), time.monotonic()
    told = post.load(seconds=seconds or post.settings.seconds)
    used = post.process.cpu_seconds() - before
    busy, elapsed = machine.busy_seconds() - busy_before, time.monotonic() - start
    return {
        "messages": told["messages"],
        "per_second": told["per_second"],
        "cpu_seconds": round(used, 2),
        "p50_us": told["latency_us"]["p50"],
        "p99_us": told["latency_us"]["p99"],
        "max_us": told["latency_us"]["max"],
        "from_connect_p50_us": told["from_connect_us"]["p50"],
        "longest_us": told["longest_us"],
        "load_share": round(told["load_cpu_seconds"] / told["seconds"], 3),
        "others_share": round(max(0, busy - used - told["load_cpu_seconds"]) / (elapsed * machine.cpus()), 3),
    }


def _play_patience(post: Post) -> Round:
    one = _play_rate(post, post.settings.patience_seconds)
    return {**one, "longest_to_median": round(max(one["longest_us"]) / one["p50_us"], 2)}


def _play_idle(post: Post) -> Round:
    before = post.process.rss_kib()
    with post.generator.holding(post.process.socket, post.settings.idle, post.scenario.connections) as told:
        checked(told)
        after = post.process.rss_kib()
    return {"connections": post.settings.idle, "kib_per_connection": round((after - before) / post.settings.idle, 2)}


def _play_soak(post: Post) -> Round:
    curve = [post.process.rss_kib()]
    part = max(1, post.settings.soak // SOAK_POINTS)
    for _ in range(SOAK_POINTS):
        post.load(messages=part)
        curve.append(post.process.rss_kib())
    settled = SOAK_POINTS // 4  # by then everything has been used once
    grown = (curve[-1] - curve[settled]) * 1024 / (part * (SOAK_POINTS - settled))
    return {"messages": part * SOAK_POINTS, "rss_kib": curve, "bytes_grown_per_message": round(grown, 3)}


_PLAYS: Mapping[str, Callable[[Post], Round]] = {
    "rate": _play_rate,
    "delay": _play_rate,
    "patience": _play_patience,
    "idle": _play_idle,
    "soak": _play_soak,
}


# ---- All rounds of a group --------------------------------------------------------------------


def measure(
    scenarios: Sequence[Scenario],
    crew: Sequence[tuple[Contender, Program]],
    generator: Generator,
    settings: Settings,
) -> dict[str, Results]:
    """The scenarios of one group, by name."""
    found: dict[str, Results] = {scenario.name: {} for scenario in scenarios}
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="milter-bench-")))
        posts = []
        for scenario, (contender, program) in itertools.product(scenarios, crew):
            if contender.single_message and not scenario.one_message_each:
                found[scenario.name][contender.name] = {"unavailable": contender.single_message}
                continue
            transport = "tcp" if contender.tcp_only else scenario.transport
            name = f"{contender.name}-{scenario.name}"
            try:
                process = stack.enter_context(FilterProcess(program, transport, directory, name))
            except StartFailed as failure:
                found[scenario.name][contender.name] = {"unavailable": f"it does not start: {failure}"}
            else:
                posts.append(Post(scenario, contender, process, generator, settings))
        for post in posts:
            post.warm_up()
        for number in range(1 if scenarios[0].once else settings.rounds):
            for post in _rotated(posts, number):
                post.play()
        for post in posts:
            found[post.scenario.name][post.contender.name] = post.result()
    return found


def _rotated(posts: list[Post], number: int) -> list[Post]:
    start = number % len(posts) if posts else 0
    return posts[start:] + posts[:start]
