# SPDX-License-Identifier: GPL-3.0-or-later
"""The texts of ``milter COMMAND --help``, for the reference of the commands."""

import os
import subprocess
import sys
from pathlib import Path

COMMANDS = ("run", "check", "inspect", "version")


def substitutions() -> dict[str, str]:
    """What ``{{ help_run }}`` and the like stand for."""
    return {f"help_{command}": _section(command) for command in COMMANDS}


def _section(command: str) -> str:
    text = subprocess.run(
        [sys.executable, "-m", "milter", command, "--help"],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "COLUMNS": "100", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return f"## `milter {command}`\n\n```text\n{text}```\n"
