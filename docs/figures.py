# SPDX-License-Identifier: GPL-3.0-or-later
"""The figures in the documentation: all of them come from the benchmark's results, none is typed."""

import json
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.contenders import BASELINE
from benchmarks.requirements import rate_ratio

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results" / "debian12-2cpu.json"
CHART = RESULTS.with_suffix(".svg")


def substitutions(path: Path = RESULTS) -> dict[str, str]:
    """What ``{{ name }}`` stands for in a page."""
    results = json.loads(path.read_text())
    machine = results["machine"]
    return {
        "machine": f"{machine['date']}: {machine['cpus']} processors ({machine['cpu']}), {machine['kernel']}, "
        f"{machine['python']}, libmilter of Sendmail {machine['libmilter']}",
        "ratio_c": _ratio(results, "each-8", "milter-message", BASELINE),
        "ratio_c_replying": _ratio(results, "each-8", "milter-message", "c-replying"),
        "ratio_pymilter": _ratio(results, "each-8", "milter-message", "pymilter-noreply"),
        "ratio_replying": _ratio(results, "each-8", "milter-message", "milter-replying"),
        "ratio_long": _ratio(results, "long-4", "milter-message", BASELINE),
        "rates_each_8": _table(results, "each-8"),
        "rates_long_4": _table(results, "long-4"),
    }


def _ratio(results: dict[str, Any], scenario: str, contender: str, other: str) -> str:
    ratio = rate_ratio(results["scenarios"], scenario, contender, other)
    if ratio is None:
        raise ValueError(f"the results have no {contender} or no {other} in {scenario}")
    return f"{ratio:.1f}"


def _table(results: dict[str, Any], scenario: str) -> str:
    """Messages per second and processor time of each filter that was measured."""
    rows = ["| filter | × C, no reply | messages/s | CPU µs a message |", "| --- | ---: | ---: | ---: |"]
    for contender, label in results["contenders"].items():
        if "median" in results["scenarios"][scenario]["results"].get(contender, {}):
            entry = report.Entry(results, scenario, contender)
            cells = [label, entry.rate_ratio(), entry.median("per_second", ",.0f"), entry.cpu()]
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)
