# SPDX-License-Identifier: GPL-3.0-or-later
"""The tables of docs/mtas.md, from the scenarios, which are held to the truth by running them.

python -m tests.mta.tables          # write them anew
"""

import re
from collections.abc import Sequence
from itertools import pairwise

from tests.filter_process import REPOSITORY

from .scenario import DIRECTORY, SERVERS, Expected, Scenario, all_scenarios

DOCUMENT = REPOSITORY / "docs" / "mtas.md"
REASONS = DIRECTORY / "differences.txt"

# More than these are no help to a reader.
_LINES = 3
_WIDTH = 70

_SECTION = re.compile(r"(<!-- ([a-z]+): python -m tests.mta.tables -->\n).*?(<!-- end -->)", re.DOTALL)


def reasons() -> dict[str, str]:
    """What each difference is about, by its name."""
    lines = [line for line in REASONS.read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split(": ", 1) for line in lines)


def document(text: str) -> str:
    """The document with its tables made anew."""
    scenarios = all_scenarios()
    tables = {"differences": differences, "macros": macros, "faults": faults}
    return _SECTION.sub(lambda match: match[1] + "\n" + tables[match[2]](scenarios) + "\n\n" + match[3], text)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in lines)


# ---- differences


def differences(scenarios: Sequence[Scenario]) -> str:
    """A row for each reason: what each server does, by the example of one scenario."""
    rows = []
    for name, about in sorted(reasons().items()):
        concerned = [scenario for scenario in scenarios if any(line.reason == name for line in scenario.lines)]
        # There are too many macros for a cell.
        cells = ["", ""] if name == "macros" else [_cell(concerned[0], name, server) for server in SERVERS]
        rows.append([about, *cells, str(len(concerned))])
    return _table(["What", "Postfix", "Sendmail", "Scenarios"], rows)


def _cell(scenario: Scenario, reason: str, server: str) -> str:
    """What the server does; of a line that both have, in which place."""
    lines = [line for line in scenario.lines if line.server in ("", server)]
    texts = [{line.text for line in scenario.lines if (line.server, line.reason) == (s, reason)} for s in SERVERS]
    shown = [
        f"{_code(line.text)} below {_code(above.text)}" if texts[0] == texts[1] else _code(line.text)
        for above, line in pairwise(lines)
        if line.reason == reason
    ]
    return " ".join([*shown[:_LINES], *(["…"] if len(shown) > _LINES else [])]) or "–"


def _code(text: str) -> str:
    """The line without the letter that says what kind of line it is."""
    if text == "C: (wait)":
        return "hangs up"
    plain = re.sub(r"^(S: |\| |F: (?=show))", "", text)
    plain = re.sub(r"^F: ", "shown: ", re.sub(r"^or: ", "from some version on: ", plain))
    plain = plain if len(plain) <= _WIDTH else f"{plain[: _WIDTH - 1]}…"
    return f"`{plain}`" if plain.strip("| ") else "an empty line"


# ---- macros


def macros(scenarios: Sequence[Scenario]) -> str:
    """Which macros come with which stage, unasked."""
    named = {scenario.name: scenario for scenario in scenarios}
    plain, tls, auth = ([_shown(named[f"macros-{kind}"], s) for s in SERVERS] for kind in ("plain", "tls", "auth"))
    stages = list(dict.fromkeys(stage for stage, _ in plain[0]))
    rows = [[stage.upper(), *(_names(_new(shown, stage)) for shown in plain)] for stage in stages]
    rows.append(
        ["HELO after STARTTLS", *(_names(_last(t, "helo") - _last(p, "helo")) for p, t in zip(plain, tls, strict=True))]
    )
    rows.append(
        ["MAIL after AUTH", *(_names(_last(a, "mail") - _last(p, "mail")) for p, a in zip(plain, auth, strict=True))]
    )
    return _table(["Stage", "Postfix", "Sendmail"], rows)


def _shown(scenario: Scenario, server: str) -> list[tuple[str, set[str]]]:
    """Stages in order, and the macros that were known there."""
    lines = [line.split()[1:] for line in scenario.on(server).seen]
    return [(stage, set(names)) for stage, *names in lines]


def _new(shown: Sequence[tuple[str, set[str]]], stage: str) -> set[str]:
    """Those that are known at the first call of the stage, and were not before."""
    first = [name for name, _ in shown].index(stage)
    before = set().union(*(names for _, names in shown[:first]))
    late = shown[first + 1][1] - shown[first][1] if shown[first + 1 :] and shown[first + 1][0] == stage else set()
    return (shown[first][1] - before) | {f"{name} (from the second one on)" for name in late}


def _last(shown: Sequence[tuple[str, set[str]]], stage: str) -> set[str]:
    return [names for name, names in shown if name == stage][-1]


def _names(names: set[str]) -> str:
    return " ".join(f"`{name.partition(' ')[0]}`{name[len(name.partition(' ')[0]) :]}" for name in sorted(names)) or "–"


# ---- faults


def faults(scenarios: Sequence[Scenario]) -> str:
    """What the client is told when a filter fails, and what becomes of the message."""
    rows = []
    for scenario in scenarios:
        if scenario.name.startswith("fault-"):
            rows.append([scenario.title.rstrip("."), *(_told(scenario, server) for server in SERVERS)])
    return _table(["What happens", "Postfix", "Sendmail"], rows)


def _told(scenario: Scenario, server: str) -> str:
    script = scenario.on(server)
    refusals = [step for step in script.steps if isinstance(step, Expected) and step.code >= 400]
    told = ", then ".join(f"`{refusal}`" for refusal in refusals) or "`250`"
    return f"{told}; delivered" if script.delivered else told


if __name__ == "__main__":
    DOCUMENT.write_text(document(DOCUMENT.read_text()))
