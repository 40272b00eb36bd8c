# SPDX-License-Identifier: GPL-3.0-or-later
"""Runs the load generator against a filter, and reads what it tells."""

import contextlib
import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Told = dict[str, Any]


class LoadFailed(Exception):
    """The generator could not do its work; the text is what it said."""


@dataclass(frozen=True)
class Generator:
    program: Path
    headers: int = 20
    body: int = 4096
    recipients: int = 1
    patience: int = 30

    def run(self, socket: str, **options: float) -> Told:
        """Plays the MTAs; `options` are those of the program, with ``_`` for ``-``."""
        done = subprocess.run(self._command(socket, options), capture_output=True, text=True, check=False)
        return _told(done.stdout, done.stderr)

    @contextlib.contextmanager
    def holding(self, socket: str, idle: int, connections: int) -> Iterator[Told]:
        """Inside, `idle` connections are open, and have had a message each."""
        command = self._command(socket, {"idle": idle, "connections": connections})
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            assert process.stderr is not None
            line = process.stdout.readline()
            try:
                yield _told(line, "" if line else process.stderr.read())
            finally:
                process.stdin.close()

    def _command(self, socket: str, options: dict[str, float]) -> list[str]:
        work = {"headers": self.headers, "body": self.body, "recipients": self.recipients, "patience": self.patience}
        command = [str(self.program), "--socket", socket]
        for name, value in {**work, **options}.items():
            command += [f"--{name.replace('_', '-')}", str(value)]
        return command


def _told(output: str, errors: str) -> Told:
    if not output:
        raise LoadFailed(errors.strip() or "the load generator ended without a word")
    told: Told = json.loads(output)
    return told
