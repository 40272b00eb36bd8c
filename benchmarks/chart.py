# SPDX-License-Identifier: GPL-3.0-or-later
"""A chart of the results as SVG: for each scenario, a bar for each filter, measured in "C, no reply"."""

from typing import Any
from xml.sax.saxutils import escape

from benchmarks.contenders import BASELINE
from benchmarks.requirements import rate_ratio

WIDTH, MARGIN, LABELS, FIGURES = 860, 16, 250, 60
BAR, STEP, TITLE = 14, 20, 34
OURS, OTHERS, RULE, INK = "#2f6f9f", "#b4bcc4", "#c0392b", "#222222"


def draw(results: dict[str, Any]) -> str:
    scenarios = results["scenarios"]
    groups = [(scenario["title"], _bars(results, name)) for name, scenario in scenarios.items() if scenario["charted"]]
    longest = max((ratio for _, bars in groups for _, ratio, _ in bars), default=1.0)
    scale = (WIDTH - 2 * MARGIN - LABELS - FIGURES) / max(longest, 1.0)
    parts, y = [], MARGIN
    for title, bars in groups:
        parts.append(_text(MARGIN, y + 16, f"{title}: messages per second, “C, no reply” = 1", weight="bold"))
        y += TITLE
        top = y
        for label, ratio, colour in bars:
            parts += _bar(y, label, ratio, scale, colour)
            y += STEP
        one = MARGIN + LABELS + scale
        parts.append(
            f'<line x1="{one:.1f}" y1="{top - 5}" x2="{one:.1f}" y2="{y}" stroke="{RULE}" stroke-dasharray="3 3"/>'
        )
        y += MARGIN
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y}" viewBox="0 0 {WIDTH} {y}" '
            'font-family="sans-serif" font-size="13">',
            f'<rect width="{WIDTH}" height="{y}" fill="white"/>',
            *parts,
            "</svg>\n",
        ]
    )


def _bars(results: dict[str, Any], scenario: str) -> list[tuple[str, float, str]]:
    """Label, ratio and colour of each filter that has a figure, the fastest first."""
    bars = []
    for contender, label in results["contenders"].items():
        ratio = rate_ratio(results["scenarios"], scenario, contender, BASELINE)
        if ratio is not None:
            bars.append((label, ratio, OURS if contender.startswith("milter-") else OTHERS))
    return sorted(bars, key=lambda bar: -bar[1])


def _bar(y: int, label: str, ratio: float, scale: float, colour: str) -> list[str]:
    left, length = MARGIN + LABELS, ratio * scale
    return [
        _text(left - 8, y + 11, label, anchor="end"),
        f'<rect x="{left}" y="{y}" width="{length:.1f}" height="{BAR}" fill="{colour}"/>',
        _text(round(left + length + 6), y + 11, f"{ratio:.2f}"),
    ]


def _text(x: int, y: int, words: str, *, anchor: str = "start", weight: str = "normal") -> str:
    return f'<text x="{x}" y="{y}" fill="{INK}" text-anchor="{anchor}" font-weight="{weight}">{escape(words)}</text>'
