# SPDX-License-Identifier: GPL-3.0-or-later
"""docs/parity.md: no empty cell, and each test that it names exists."""

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parent
DOCUMENT = TESTS.parent / "docs" / "parity.md"


def rows() -> list[list[str]]:
    lines = [line for line in DOCUMENT.read_text().splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if not set("".join(row)) <= {"-", " "} and row[0] != "the crate"]


def test_each_row_says_what_it_is_here_and_what_proves_it() -> None:
    assert len(rows()) > 60
    for row in rows():
        assert len(row) == 3, row
        assert all(row), row


def test_each_test_that_is_named_exists() -> None:
    for row in rows():
        match = re.fullmatch(r"`([\w/.]+)(?:::(\w+))?`", row[2])
        assert match, row
        source = (TESTS / match[1]).read_text()
        functions = {node.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)}
        assert match[2] is None or match[2] in functions, row
