# SPDX-License-Identifier: GPL-3.0-or-later
"""What type checkers say of handlers, and of tests: right ones pass in strict mode, wrong ones are errors."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mypy import api

from tests.filter_process import REPOSITORY

TYPING = Path(__file__).parent / "typing"
PROGRAMS = ["handlers.py", "testing.py"]


def expected_errors(program: Path) -> dict[int, str]:
    """What mypy shall say, by line."""
    return {
        number: match[1]
        for number, line in enumerate(program.read_text().splitlines(), start=1)
        if (match := re.search(r"# error: (.+)$", line))
    }


@pytest.fixture(scope="module")
def pyright() -> list[dict[str, Any]]:
    """What pyright says of the examples and of the programs, in strict mode as pyproject.toml has it."""
    command = [sys.executable, "-m", "basedpyright", "--outputjson", "--pythonpath", sys.executable]
    run = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    diagnostics: list[dict[str, Any]] = json.loads(run.stdout)["generalDiagnostics"]
    return diagnostics


@pytest.mark.parametrize("name", PROGRAMS)
def test_mypy_finds_each_wrong_line_and_no_other(name: str) -> None:
    program = TYPING / name
    expected = expected_errors(program)
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


@pytest.mark.parametrize("name", PROGRAMS)
def test_pyright_finds_each_wrong_line_and_no_other(pyright: list[dict[str, Any]], name: str) -> None:
    program = TYPING / name
    report = [entry for entry in pyright if entry["file"] == str(program)]
    assert {entry["range"]["start"]["line"] + 1 for entry in report} == set(expected_errors(program)), report


def test_pyright_infers_the_state_of_sessions_and_transactions_from_their_factories(
    pyright: list[dict[str, Any]],
) -> None:
    program = str(TYPING / "handlers.py")
    revealed = [entry for entry in pyright if entry["severity"] == "information" and entry["file"] == program]
    assert [entry["message"] for entry in revealed] == [
        'Type of "plain" is "Milter[Any, Any]"',
        'Type of "typed" is "Milter[Session, Transaction]"',
        'Type of "with_session" is "Milter[Session, Any]"',
    ]


def test_pyright_finds_nothing_in_the_examples(pyright: list[dict[str, Any]]) -> None:
    assert [entry for entry in pyright if not entry["file"].startswith(str(TYPING))] == []
