# SPDX-License-Identifier: GPL-3.0-or-later
"""The command: ``python -m benchmarks``. Exit code 1: a filter's answers were wrong, or one that must run does not."""

import argparse
import json
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import chart, machine, report, standstill
from benchmarks.contenders import CONTENDERS, Contender, Program
from benchmarks.generator import Generator
from benchmarks.measure import Settings, measure
from benchmarks.requirements import judge
from benchmarks.scenarios import GROUPS, SOAK, Scenario
from benchmarks.workshop import HERE, Unavailable, Workshop

FULL = {"rounds": 5, "seconds": 1.5, "warm_up": 0.5, "patience_seconds": 15.0, "idle": 1000}
QUICK = {"rounds": 2, "seconds": 0.4, "warm_up": 0.1, "patience_seconds": 2.0, "idle": 200}


def main(arguments: Sequence[str] | None = None) -> int:
    parsed = _parser().parse_args(arguments)
    _allow_many_connections()
    workshop = Workshop(parsed.cache)
    try:
        load = workshop.load()
    except Unavailable as reason:
        raise SystemExit(f"the load generator cannot be built: {reason}") from None
    generator = Generator(load, parsed.headers, parsed.body, parsed.recipients)
    settings = _settings(parsed)
    chosen = _chosen_contenders(parsed)
    crew, unavailable = _prepare(workshop, chosen)
    results: dict[str, Any] = {
        "format": 1,
        "machine": machine.facts(),
        "settings": {
            **asdict(settings),
            "headers": parsed.headers,
            "body": parsed.body,
            "recipients": parsed.recipients,
        },
        "contenders": {contender.name: contender.label for contender in chosen},
        "scenarios": _measure_all(_chosen_groups(parsed), crew, unavailable, generator, settings),
    }
    if any(scenario["kind"] == "patience" for scenario in results["scenarios"].values()):
        results["machine"]["standstill_us"] = standstill.longest_us(settings.patience_seconds, machine.cpus())
    results["required"] = judge(results["scenarios"])
    _write(results, parsed)
    return 1 if _failed(results) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Compare filters that do the same work.",
    )
    names = [scenario.name for group in [*GROUPS, [SOAK]] for scenario in group]
    parser.add_argument("--quick", action="store_true", help="under two minutes, with less certain figures")
    parser.add_argument("--rounds", type=int, metavar="N", help=f"[{FULL['rounds']}]")
    parser.add_argument("--seconds", type=float, metavar="S", help=f"of one run in a round [{FULL['seconds']}]")
    parser.add_argument("--soak", type=int, default=0, metavar="MESSAGES", help="watch the memory for so many messages")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw a chart")
    parser.add_argument("--headers", type=int, default=20, metavar="N", help="of a message [20]")
    parser.add_argument("--body", type=int, default=4096, metavar="BYTES", help="of a message [4096]")
    parser.add_argument("--recipients", type=int, default=1, metavar="N", help="of a message [1]")
    parser.add_argument("--only", action="append", choices=names, metavar="SCENARIO", help=", ".join(names))
    parser.add_argument(
        "--filter",
        action="append",
        choices=[contender.name for contender in CONTENDERS],
        metavar="NAME",
        help=", ".join(contender.name for contender in CONTENDERS),
    )
    parser.add_argument("--cache", type=Path, default=HERE / ".cache", metavar="DIR", help="for what is built")
    return parser


def _settings(parsed: argparse.Namespace) -> Settings:
    chosen: dict[str, Any] = {**(QUICK if parsed.quick else FULL), "soak": parsed.soak}
    for name in ("rounds", "seconds"):
        if getattr(parsed, name) is not None:
            chosen[name] = getattr(parsed, name)
    return Settings(**chosen)


def _chosen_contenders(parsed: argparse.Namespace) -> list[Contender]:
    return [contender for contender in CONTENDERS if not parsed.filter or contender.name in parsed.filter]


def _chosen_groups(parsed: argparse.Namespace) -> list[list[Scenario]]:
    groups = [*GROUPS, [SOAK]] if parsed.soak else GROUPS
    if not parsed.only:
        return groups
    chosen = [[scenario for scenario in group if scenario.name in parsed.only] for group in groups]
    return [group for group in chosen if group]


def _prepare(
    workshop: Workshop, contenders: Sequence[Contender]
) -> tuple[list[tuple[Contender, Program]], dict[str, str]]:
    """The filters that can run, and why the others cannot."""
    crew, unavailable = [], {}
    for contender in contenders:
        try:
            crew.append((contender, contender.prepare(workshop)))
        except Unavailable as reason:
            unavailable[contender.name] = str(reason)
            _note(f"{contender.label}: {reason}")
    return crew, unavailable


def _measure_all(
    groups: Sequence[Sequence[Scenario]],
    crew: Sequence[tuple[Contender, Program]],
    unavailable: dict[str, str],
    generator: Generator,
    settings: Settings,
) -> dict[str, Any]:
    measured = {}
    for group in groups:
        start = time.monotonic()
        found = measure(group, crew, generator, settings)
        for scenario in group:
            missing = {name: {"unavailable": reason} for name, reason in unavailable.items()}
            measured[scenario.name] = {**asdict(scenario), "results": {**found[scenario.name], **missing}}
        _note(f"{', '.join(scenario.title for scenario in group)}: {time.monotonic() - start:.0f} s")
    return measured


def _write(results: dict[str, Any], parsed: argparse.Namespace) -> None:
    print(report.text(results))
    if parsed.json is not None:
        parsed.json.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if parsed.svg is not None:
        parsed.svg.write_text(chart.draw(results), encoding="utf-8")


def _failed(results: dict[str, Any]) -> bool:
    """Whether an answer was wrong, or a filter that must run does not."""
    optional = {contender.name for contender in CONTENDERS if contender.optional}
    return any(
        "wrong" in result or ("unavailable" in result and name not in optional)
        for scenario in results["scenarios"].values()
        for name, result in scenario["results"].items()
    )


def _allow_many_connections() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _note(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
