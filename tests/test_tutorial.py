# SPDX-License-Identifier: GPL-3.0-or-later
"""The tutorial, done step by step as its reader does it: files are written, commands run, and say what it shows."""

import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.filter_process import REPOSITORY, FilterProcess
from tests.pages import DOCS, Block, blocks

PAGE = DOCS / "tutorial.md"
WRONG = "## When something goes wrong"
SYSTEM = ("mkdir ", "python3 -m venv", ". venv/", "pip install")
"""Commands that prepare a machine: this one is prepared."""


class Reader:
    """Somebody with two terminals and a directory."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self.directory = directory
        self.commands: list[str] = []
        self._stack = stack
        self._filter: FilterProcess | None = None
        self._reloads = 0

    def write(self, block: Block) -> None:
        (self.directory / block.caption).write_text(block.source, "utf-8")

    def run(self, command: str) -> str:
        """What it prints."""
        self.commands.append(command)
        if command.startswith("milter run "):
            return self._start(command)
        if command == "kill -HUP $(cat guard.pid)":
            return self._reload()
        assert command.startswith("milter "), f"the tests do not know how to {command}"
        return self._milter(command)

    def _milter(self, command: str) -> str:
        arguments = [sys.executable, "-m", *shlex.split(command)]
        run = subprocess.run(
            arguments,
            cwd=self.directory,
            env={"PYTHONPATH": str(REPOSITORY)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.stderr == ""
        return run.stdout

    def _start(self, command: str) -> str:
        if self._filter is not None:
            self._filter.stop()
        arguments = shlex.split(command.replace(":3000@", ":0@"))[1:]  # whatever port is free
        self._filter = self._stack.enter_context(FilterProcess("-m", "milter", *arguments, directory=self.directory))
        assert self._filter.socket
        return ""

    def _reload(self) -> str:
        assert self._filter is not None
        assert (self.directory / "guard.pid").read_text().strip() == str(self._filter.pid)
        self._filter.signal(signal.SIGHUP)
        self._reloads += 1
        self._filter.log.wait_for_count("was loaded again", self._reloads)
        return ""


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    with ExitStack() as stack:
        yield Reader(tmp_path, stack)


def steps(block: Block) -> Iterator[tuple[str, list[str]]]:
    """The commands of a transcript, each with the lines that it shall print; "…" stands for any others."""
    for part in re.split(r"^\$ ", block.source, flags=re.MULTILINE)[1:]:
        command, *lines = part.splitlines()
        yield command, [line for line in lines if line != "…"]


def test_each_step_does_what_the_tutorial_says(reader: Reader) -> None:
    mistake = PAGE.read_text("utf-8").splitlines().index(WRONG)
    made = False
    for block in blocks(PAGE):
        if block.caption.endswith((".py", ".eml")):
            reader.write(block)
        if block.language != "console" or block.source.startswith("# "):
            continue
        if block.line > mistake and not made:
            guard = reader.directory / "guard.py"
            assert "message.headers[" in guard.read_text()
            guard.write_text(guard.read_text().replace("message.headers[", "message.header["))
            made = True
        for command, lines in steps(block):
            if not command.startswith(SYSTEM):
                printed = reader.run(command)
                for line in lines:
                    assert line in printed, f"{command}\n{printed}"
    assert made
    assert sum(command.startswith("milter check") for command in reader.commands) == 5
