# SPDX-License-Identifier: GPL-3.0-or-later
"""Shows the results: as text after a run; as Markdown and as a chart from the JSON file of a run.

python -m benchmarks.report results.json                               Markdown, on standard output
python -m benchmarks.report results.json --into README.md --svg x.svg  between its marks; and the chart
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import chart
from benchmarks.contenders import BASELINE
from benchmarks.requirements import delay_ratio, of, rate_ratio

Results = dict[str, Any]
Row = list[str]
NOTHING = "–"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
BUSY = 0.9  # above that share of its processor, the load generator may be what limits


class Entry:
    """A filter in a scenario, and how its figures are written."""

    def __init__(self, results: Results, scenario: str, contender: str) -> None:
        self._scenarios = results["scenarios"]
        self._scenario = scenario
        self._contender = contender
        self._result = of(self._scenarios, scenario, contender) or {}

    def median(self, name: str, form: str) -> str:
        return format(self._result["median"][name], form)

    def cpu(self) -> str:
        used = self._result["cpu_us_per_message"]
        return NOTHING if used is None else f"{used:.0f}"

    def switches(self) -> str:
        counted = self._result.get("switches_per_message")
        return NOTHING if counted is None else f"{counted:.1f}"

    def mebibytes(self, name: str) -> str:
        return f"{self._result[name] / 1024:.1f}"

    def rate_ratio(self) -> str:
        return _written(rate_ratio(self._scenarios, self._scenario, self._contender, BASELINE))

    def delay_ratio(self) -> str:
        return _written(delay_ratio(self._scenarios, self._contender))

    def curve(self) -> str:
        return " ".join(f"{kib / 1024:.1f}" for kib in self._result["rounds"][0]["rss_kib"])


Column = tuple[str, Callable[[Entry], str]]

_COMMON: list[Column] = [
    ("CPU µs a message", Entry.cpu),
    ("switches a message", Entry.switches),
    ("p50 µs", lambda entry: entry.median("p50_us", ".0f")),
    ("p99 µs", lambda entry: entry.median("p99_us", ".0f")),
    ("peak MiB", lambda entry: entry.mebibytes("peak_rss_kib")),
    ("final MiB", lambda entry: entry.mebibytes("rss_kib")),
]
COLUMNS: dict[str, list[Column]] = {
    "rate": [
        ("× C, no reply", Entry.rate_ratio),
        ("messages/s", lambda entry: entry.median("per_second", ",.0f")),
        *_COMMON,
    ],
    "delay": [("TCP to Unix", Entry.delay_ratio), *_COMMON],
    "patience": [
        ("longest to median", lambda entry: entry.median("longest_to_median", ",.1f")),
        ("messages/s", lambda entry: entry.median("per_second", ",.0f")),
        *_COMMON,
    ],
    "idle": [
        ("KiB a connection", lambda entry: entry.median("kib_per_connection", ".1f")),
        ("connections", lambda entry: entry.median("connections", ",.0f")),
    ],
    "soak": [
        ("bytes grown a message", lambda entry: entry.median("bytes_grown_per_message", ".2f")),
        ("messages", lambda entry: entry.median("messages", ",.0f")),
        ("resident MiB, from start to end", Entry.curve),
    ],
}


def text(results: Results) -> str:
    """For a terminal."""
    parts = ["Required ratios", _aligned(["", "ratio", "required", ""], required_rows(results))]
    for name, scenario in results["scenarios"].items():
        headings, rows, notes = _scenario_table(results, name)
        parts += ["", scenario["title"], _aligned(headings, rows), *notes]
    return "\n".join([*parts, "", _machine(results)])


def markdown(results: Results) -> str:
    """For README.md."""
    parts = [_machine(results), "", _piped(["", "ratio", "required", ""], required_rows(results))]
    for name, scenario in results["scenarios"].items():
        headings, rows, notes = _scenario_table(results, name)
        parts += ["", f"### {scenario['title']}", "", _piped(headings, rows)]
        parts += ["", *(f"- {note}" for note in notes)] if notes else []
    return "\n".join(parts)


def required_rows(results: Results) -> list[Row]:
    return [
        [
            one["what"],
            _written(one["figure"]) + one["unit"] if one["figure"] is not None else NOTHING,
            f"{one['bound']} {one['limit']:g}{one['unit']}",
            one["verdict"],
        ]
        for one in results["required"]
    ]


def _scenario_table(results: Results, name: str) -> tuple[Row, list[Row], list[str]]:
    """Headings, rows, and what is to be said besides: no figure of a filter that answered wrongly."""
    scenario = results["scenarios"][name]
    columns = COLUMNS[scenario["kind"]]
    rows, notes = [], []
    for contender, label in results["contenders"].items():
        result = scenario["results"][contender]
        if "median" in result:
            entry = Entry(results, name, contender)
            rows.append([label, *(write(entry) for _, write in columns)])
            if result["median"].get("load_share", 0) > BUSY:
                notes.append(f"{label}: the load generator was busy all the time; the filter may be faster.")
        else:
            rows.append([label, *(NOTHING for _ in columns)])
            reason = f"WRONG: {result['wrong']}" if "wrong" in result else f"not measured: {result['unavailable']}"
            notes.append(f"{label}: {reason}")
    if scenario["kind"] == "patience" and "standstill_us" in results["machine"]:
        notes.append(
            f"Processes that only looked at the clock, for the same time with nothing else running, were stopped "
            f"for up to {results['machine']['standstill_us'] / 1000:.1f} ms: the machine's share of a longest wait."
        )
    return ["", *(heading for heading, _ in columns)], rows, notes


def _written(ratio: float | None) -> str:
    return NOTHING if ratio is None else f"{ratio:,.2f}"


def _machine(results: Results) -> str:
    machine, settings = results["machine"], results["settings"]
    return (
        f"{machine['date']}: {machine['cpus']} CPUs ({machine['cpu']}), {machine['kernel']}, {machine['python']}, "
        f"libmilter of Sendmail {machine['libmilter']}. Medians of {settings['rounds']} interleaved rounds of "
        f"{settings['seconds']:g} s; {settings['headers']} headers, {settings['body']:,} bytes of body, "
        f"recipients: {settings['recipients']}, one header added."
        f"{_others(results)}"
    )


def _others(results: Results) -> str:
    """How much the machine had to do besides: with more than a little, the figures are not to be trusted."""
    shares = [
        one["others_share"]
        for scenario in results["scenarios"].values()
        for result in scenario["results"].values()
        for one in result.get("rounds", [])
        if "others_share" in one
    ]
    if not shares:
        return ""
    return f" Other processes took {statistics.median(shares):.0%} of the processors (in one round {max(shares):.0%})."


def _aligned(headings: Row, rows: list[Row]) -> str:
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    return "\n".join(
        f"  {row[0]:<{widths[0]}}  " + "  ".join(map(str.rjust, row[1:], widths[1:])) for row in [headings, *rows]
    )


def _piped(headings: Row, rows: list[Row]) -> str:
    rules = ["---", *("---:" for _ in headings[1:])]
    return "\n".join("| " + " | ".join(row) + " |" for row in [headings, rules, *rows])


def fill(document: str, results: Results) -> str:
    """The document with the results between its marks."""
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"the document has no place for results: {BEGIN} … {END}")
    return f"{before}{BEGIN}\n\n{markdown(results)}\n\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description="Show the results of a run.")
    parser.add_argument("results", type=Path, help="the JSON file of a run")
    parser.add_argument("--into", type=Path, metavar="FILE", help="fill the place for results in this Markdown file")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw the chart")
    parsed = parser.parse_args()
    for file in filter(None, [parsed.results, parsed.into]):
        if not file.is_file():
            parser.error(f"there is no file {file}")
    results = json.loads(parsed.results.read_text(encoding="utf-8"))
    if parsed.svg is not None:
        parsed.svg.write_text(chart.draw(results), encoding="utf-8")
    if parsed.into is not None:
        parsed.into.write_text(fill(parsed.into.read_text(encoding="utf-8"), results), encoding="utf-8")
    elif parsed.svg is None:
        sys.stdout.write(markdown(results) + "\n")


if __name__ == "__main__":
    main()
