# SPDX-License-Identifier: GPL-3.0-or-later
"""The examples of docs/testing.md: files that a user would write, run by pytest as a user would."""

import os
import re
import sys
from pathlib import Path

import pytest
from mypy import api

pytest_plugins = ["pytester"]

REPOSITORY = Path(__file__).parent.parent
TEXT = (REPOSITORY / "docs" / "testing.md").read_text()
FILES = dict(re.findall(r"```python\n# (\w+\.py)\n(.*?)```", TEXT, re.DOTALL))
FAILING = "test_failing.py"


@pytest.fixture
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A directory with all files of the page, and the mails that it speaks of."""
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    for name, source in FILES.items():
        (pytester.path / name).write_text(source)
    for name, body in (("clean/hello", "How are you?"), ("clean/empty", ""), ("virus/first", "a virus")):
        mail = pytester.path / "mails" / f"{name}.eml"
        mail.parent.mkdir(parents=True, exist_ok=True)
        mail.write_text(f"From: ann@client.example\nSubject: {name}\n\n{body}\n")
    return pytester


def test_every_program_of_the_page_is_a_file() -> None:
    assert len(FILES) == TEXT.count("```python\n") == len(re.findall(r"^# \w+\.py$", TEXT, re.MULTILINE))


def test_each_example_passes(project: pytest.Pytester) -> None:
    names = sorted(name for name in FILES if name.startswith("test_") and name != FAILING)
    result = project.runpytest_subprocess("-p", "pytest_milter", "-p", "no:cacheprovider", *names)
    tests = sum(FILES[name].count("\ndef test_") for name in names)
    result.assert_outcomes(passed=tests + 2)  # one is there for two MTAs, one for two mails
    for name in names:
        result.stdout.fnmatch_lines([f"{name} *"])


def test_a_failure_looks_as_the_page_says(project: pytest.Pytester) -> None:
    result = project.runpytest_subprocess("-p", "pytest_milter", FAILING)
    result.assert_outcomes(failed=1)
    shown = re.findall(r"```text\n(.*?)```", TEXT, re.DOTALL)[0].rstrip()
    assert shown in result.stdout.str()


def test_the_examples_are_typed(project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MYPYPATH", f"{REPOSITORY}{os.pathsep}{project.path}")
    monkeypatch.chdir(project.path)
    report, errors, status = api.run(["--strict", "--python-executable", sys.executable, *sorted(FILES)])
    assert (status, errors) == (0, ""), report
