# SPDX-License-Identifier: GPL-3.0-or-later
"""What type checkers say of handlers: right ones pass in strict mode, wrong ones are errors."""

import re
from pathlib import Path

from mypy import api

PROGRAM = Path(__file__).parent / "typing" / "handlers.py"


def test_mypy_finds_each_wrong_handler_and_no_other() -> None:
    expected = {
        number: match[1]
        for number, line in enumerate(PROGRAM.read_text().splitlines(), start=1)
        if (match := re.search(r"# error: (.+)$", line))
    }
    report, errors, _ = api.run(["--strict", "--no-error-summary", "--hide-error-context", str(PROGRAM)])
    assert errors == ""
    found = {
        int(match[1]): match[2]
        for match in re.finditer(r"^[^:]+:(\d+): (?:error|note): (.+)$", report, re.MULTILINE)
        if ": error: " in match[0] or "Revealed" in match[2]
    }
    assert set(found) == set(expected), report
    for number, text in expected.items():
        assert text in found[number], report
