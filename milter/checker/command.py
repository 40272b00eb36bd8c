# SPDX-License-Identifier: GPL-3.0-or-later
"""The run of ``milter check``: finds the messages, has them sent, and prints.

The exit code says what an SMTP client would be told: 0 for 2xx, 1 for 5xx, 75 for 4xx (sysexits.h,
EX_TEMPFAIL). A message that is discarded or quarantined counts as accepted, since the client
cannot tell; the output can. 2 means that there was no verdict. Of several messages the worst counts:
2, then 1, then 75.
"""

import argparse
import os
import sys
from collections import Counter
from collections.abc import Iterable, Sequence

from milter.checker import documents
from milter.checker.arguments import Order, read_order
from milter.checker.bar import Bar
from milter.checker.load import Figures, figures_lines, measure
from milter.checker.mails import MailError, Source, sources
from milter.checker.sending import FAILED, INTERRUPTED, Result, check, worst
from milter.checker.text import brief_lines, delivery_lines, diff_lines, result_lines, summary_lines, verdict_word
from milter.printable import printable

_READER_GONE = 141


def main(args: argparse.Namespace) -> int:
    """Run ``milter check``; returns the exit code."""
    order = read_order(args)
    try:
        messages = sources(order.paths)
        return _measure(order, messages) if order.measures else _check_all(order, messages)
    except MailError as error:
        return _fail(str(error))
    except BrokenPipeError:
        # Whoever read the output, say "head", has seen enough. What is left in the buffer goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _READER_GONE


def _check_all(order: Order, messages: Sequence[Source]) -> int:
    verdicts: Counter[str] = Counter()
    exit_codes: set[int] = set()
    try:
        for source in messages:
            result = check(order, source)
            verdicts[verdict_word(result)] += 1
            exit_codes.add(result.exit_code)
            _tell(order, result, len(messages) > 1)
    except KeyboardInterrupt:
        exit_codes = {INTERRUPTED}
    if (len(messages) > 1 or INTERRUPTED in exit_codes) and not order.json:
        _print(summary_lines(verdicts))
    return worst(exit_codes)


def _tell(order: Order, result: Result, one_of_many: bool) -> None:
    if order.json:
        _print([documents.line(documents.of_result(result))])
    elif order.brief:
        _print(brief_lines(result))
    else:
        _print([f"== {printable(result.name)}"] if one_of_many else [])
        _print(result_lines(result))
        _print(delivery_lines(result) if order.delivered else diff_lines(result))
        _print([""] if one_of_many else [])
    if result.problem is not None and not order.json:
        _fail(result.problem)


def _measure(order: Order, messages: Sequence[Source]) -> int:
    bar = Bar(sys.stderr)
    figures = measure(order, messages, lambda figures: bar.show(figures.count, figures.wanted))
    bar.remove()
    if order.json:
        _print([documents.line(documents.of_figures(figures))])
    else:
        _print(figures_lines(figures))
        _tell_problems(figures)
    return figures.exit_code


def _tell_problems(figures: Figures) -> None:
    for problem, count in figures.problems.most_common():
        _fail(f"{problem} ({count} times)")


def _print(lines: Iterable[str]) -> None:
    """Print lines, also to a terminal whose encoding lacks their characters."""
    encoding = sys.stdout.encoding or "ascii"
    for line in lines:
        print(line.encode(encoding, "backslashreplace").decode(encoding))
    sys.stdout.flush()


def _fail(problem: str) -> int:
    print(f"milter check: {printable(problem)}", file=sys.stderr)
    return FAILED
