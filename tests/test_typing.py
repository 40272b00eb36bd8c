# SPDX-License-Identifier: GPL-3.0-or-later
"""What type checkers say of handlers, and of tests: right ones pass in strict mode, wrong ones are errors."""

import re
from pathlib import Path

import pytest
from mypy import api

PROGRAMS = Path(__file__).parent / "typing"


@pytest.mark.parametrize("name", ["handlers.py", "testing.py"])
def test_mypy_finds_each_wrong_line_and_no_other(name: str) -> None:
    program = PROGRAMS / name
    expected = {
        number: match[1]
        for number, line in enumerate(program.read_text().splitlines(), start=1)
        if (match := re.search(r"# error: (.+)$", line))
    }
    report, errors, _ = api.run(["--strict", "--no-error-summary", "--hide-error-context", str(program)])
    assert errors == ""
    found = {
        int(match[1]): match[2]
        for match in re.finditer(r"^[^:]+:(\d+): (?:error|note): (.+)$", report, re.MULTILINE)
        if ": error: " in match[0] or "Revealed" in match[2]
    }
    assert set(found) == set(expected), report
    for number, text in expected.items():
        assert text in found[number], report
