# SPDX-License-Identifier: GPL-3.0-or-later
"""Filters whose parent left them something unusual: signals that are ignored or blocked, other descriptors."""

from pathlib import Path
from typing import Any

from tests.filter_process import FilterProcess

_START = "import os, signal, sys\n{}\nos.execv(sys.executable, [sys.executable, *sys.argv[1:]])\n"


class Launched(FilterProcess):
    """A filter, after some lines of Python, in the process that becomes it.

    Arguments:
        before: these lines; `os` and `signal` are imported.
        arguments: what follows `python` on the command line.
    """

    def __init__(self, before: str, *arguments: str | Path, **more: Any) -> None:
        # Isolated: only the filter is to find the test's own log.
        super().__init__("-I", "-c", _START.format(before), *arguments, **more)


class Program(Launched):
    """A filter of the test's own, by ``app.run`` or by ``milter run``.

    Arguments:
        by: ``app.run`` or ``milter run``.
        text: the filter's code.
        directory: where that is written, and the filter's socket is.
        options: of ``milter run``.
    """

    def __init__(self, by: str, text: str, directory: Path, *options: str, before: str = "", **more: Any) -> None:
        self.path = socket = f"unix:{directory}/s"
        if by == "app.run":
            text += f"\nif __name__ == '__main__':\n    app.run({socket!r})\n"
            arguments = ["thefilter.py"]
        else:
            arguments = ["-m", "milter", "run", "thefilter:app", "--socket", socket, *options]
        (directory / "thefilter.py").write_text(text)
        super().__init__(before, *arguments, directory=directory, **more)


BOTH = ("app.run", "milter run")
