# SPDX-License-Identifier: GPL-3.0-or-later
"""A file with the number of the process that a signal goes to."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from milter.errors import MilterError

__all__ = ["pidfile"]


@contextlib.contextmanager
def pidfile(path: str | None) -> Iterator[None]:
    """Written by another name first, so that nobody reads half a number; removed at the end if it is still ours."""
    if path is None:
        yield
        return
    number = f"{os.getpid()}\n"
    _write(Path(path), number)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # as when the process has given up its privileges
            if Path(path).read_text("ascii") == number:
                Path(path).unlink()


def _write(path: Path, number: str) -> None:
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        new.write_text(number, "ascii")
        new.replace(path)
    except OSError as failure:
        with contextlib.suppress(OSError):
            new.unlink()
        raise MilterError(f"cannot write the pidfile {path}: {failure.strerror}") from failure
