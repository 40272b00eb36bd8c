# SPDX-License-Identifier: GPL-3.0-or-later
"""What the library must reach: a list of ratios, each with its limit, judged on the figures of one run."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from benchmarks.contenders import BASELINE

Scenarios = dict[str, Any]
"""The part ``scenarios`` of the results, see ``__main__``."""
Figure = Callable[[Scenarios], float | None]

PYMILTERS = ("pymilter-replying", "pymilter-observing", "pymilter-noreply")


@dataclass(frozen=True)
class Requirement:
    what: str
    figure: Figure
    bound: Literal["at least", "at most"]
    limit: float
    unit: str = ""


def of(scenarios: Scenarios, scenario: str, contender: str) -> dict[str, Any] | None:
    """What was measured; None when nothing was, or the answers were wrong."""
    result: dict[str, Any] | None = scenarios.get(scenario, {}).get("results", {}).get(contender)
    return result if result is not None and "median" in result else None


def rate_ratio(scenarios: Scenarios, scenario: str, contender: str, other: str) -> float | None:
    """Messages per second, compared round by round: the median of the quotients."""
    ours, theirs = of(scenarios, scenario, contender), of(scenarios, scenario, other)
    if ours is None or theirs is None:
        return None
    return _median_quotient(ours, theirs, "per_second")


def _median_quotient(ours: dict[str, Any], theirs: dict[str, Any], name: str) -> float:
    pairs = zip(ours["rounds"], theirs["rounds"], strict=True)
    return float(statistics.median(one[name] / two[name] for one, two in pairs))


def _rate(scenario: str, contender: str, other: str) -> Figure:
    return lambda scenarios: rate_ratio(scenarios, scenario, contender, other)


def _rate_to_best(scenario: str, contender: str, others: tuple[str, ...]) -> Figure:
    def figure(scenarios: Scenarios) -> float | None:
        ratios = [rate_ratio(scenarios, scenario, contender, other) for other in others]
        return min((ratio for ratio in ratios if ratio is not None), default=None)

    return figure


def _more_switches(scenario: str, contender: str, other: str) -> Figure:
    """How much more often its threads leave a processor, for each message."""

    def figure(scenarios: Scenarios) -> float | None:
        ours, theirs = of(scenarios, scenario, contender), of(scenarios, scenario, other)
        counted = [result.get("switches_per_message") if result else None for result in (ours, theirs)]
        return None if counted[0] is None or counted[1] is None else float(counted[0] - counted[1])

    return figure


def _median(scenario: str, contender: str, name: str) -> Figure:
    def figure(scenarios: Scenarios) -> float | None:
        result = of(scenarios, scenario, contender)
        return None if result is None else result["median"][name]

    return figure


def delay_ratio(scenarios: Scenarios, contender: str) -> float | None:
    """How much longer a message takes over TCP than over a Unix socket."""
    tcp, unix = of(scenarios, "tcp-1", contender), of(scenarios, "unix-1", contender)
    if tcp is None or unix is None:
        return None
    return _median_quotient(tcp, unix, "p50_us")


def _delay(contender: str) -> Figure:
    return lambda scenarios: delay_ratio(scenarios, contender)


MESSAGE = "milter-message"
PLACES = {
    "each-8": "8 connections, a message each",
    "long-4": "4 long-lived connections",
    "unix-1": "1 connection",
    "large": "1 MB bodies",
}
"""Scenarios of the following, and how they are told."""

RATIOS: list[tuple[str, str, str, dict[str, float]]] = [
    ("on_message to C, no reply", MESSAGE, BASELINE, {"each-8": 1.3, "long-4": 1.3, "unix-1": 1.3, "large": 0.95}),
    (
        "on_message to indymilter",
        MESSAGE,
        "indymilter",
        {"each-8": 1, "long-4": 1, "unix-1": 1, "large": 1},
    ),
    ("on_message, shared library, to C, no reply", "milter-message-shared", BASELINE, {"each-8": 1, "long-4": 1}),
    ("replying to C, replying", "milter-replying", "c-replying", {"each-8": 1.2, "long-4": 1.2}),
    ("replying to pymilter, replying", "milter-replying", "pymilter-replying", {"each-8": 2, "long-4": 2}),
    ("replying, shared library, to C, replying", "milter-replying-shared", "c-replying", {"each-8": 1, "long-4": 1}),
    ("replying to each field to C, replying", "milter-replying-each", "c-replying", {"each-8": 0.8, "long-4": 0.8}),
    (
        "replying to each field to pymilter, replying",
        "milter-replying-each",
        "pymilter-replying",
        {"each-8": 1, "long-4": 1},
    ),
    (
        "header and body observed to pymilter with the same @noreply",
        "milter-observing",
        "pymilter-observing",
        {"each-8": 2.5, "long-4": 2.5},
    ),
]

REQUIRED = [
    *(
        Requirement(f"{what} ({PLACES[scenario]})", _rate(scenario, contender, other), "at least", limit)
        for what, contender, other, limits in RATIOS
        for scenario, limit in limits.items()
    ),
    Requirement(
        "on_message to pymilter at its best (8 connections, a message each)",
        _rate_to_best("each-8", MESSAGE, PYMILTERS),
        "at least",
        5,
    ),
    *(
        Requirement(f"{what}: context switches a message, more than C's", figure, "at most", 2)
        for what, figure in (
            ("on_message", _more_switches("each-8", MESSAGE, BASELINE)),
            ("replying", _more_switches("each-8", "milter-replying", "c-replying")),
        )
    ),
    Requirement("on_message, TCP to Unix socket: median time of a message", _delay(MESSAGE), "at most", 2),
    Requirement(
        "on_message, connections that never pause: longest wait to median",
        _median("unpausing", MESSAGE, "longest_to_median"),
        "at most",
        20,
    ),
    Requirement(
        "on_message, memory of an idle connection",
        _median("idle", MESSAGE, "kib_per_connection"),
        "at most",
        25,
        " KiB",
    ),
    Requirement(
        "on_message, memory that grows with each message (soak)",
        _median("soak", MESSAGE, "bytes_grown_per_message"),
        "at most",
        4,
        " bytes",
    ),
]


def judge(scenarios: Scenarios) -> list[dict[str, Any]]:
    return [_judged(requirement, requirement.figure(scenarios)) for requirement in REQUIRED]


def _judged(requirement: Requirement, figure: float | None) -> dict[str, Any]:
    if figure is None:
        verdict = "not measured"
    elif requirement.bound == "at least":
        verdict = "ok" if figure >= requirement.limit else "MISSED"
    else:
        verdict = "ok" if figure <= requirement.limit else "MISSED"
    return {
        "what": requirement.what,
        "bound": requirement.bound,
        "limit": requirement.limit,
        "unit": requirement.unit,
        "figure": None if figure is None else round(figure, 3),
        "verdict": verdict,
    }
