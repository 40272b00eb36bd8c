# SPDX-License-Identifier: GPL-3.0-or-later
"""A file with the number of the process that a signal goes to.

The process holds a lock on its file, which ends with it, however it ends. So a second copy of the filter is refused,
while a file that was left behind is replaced, whichever process has its number now. The lock is of the kind that
children do not inherit: workers that still drain do not stop the next start.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from milter.errors import MilterError

__all__ = ["pidfile"]

_LONGEST = 64
_ATTEMPTS = 10  # against others that start at the same moment


@contextlib.contextmanager
def pidfile(path: str | None) -> Iterator[None]:
    """Written by another name first, so that nobody reads half a number; removed at the end if it is still ours."""
    if path is None:
        yield
        return
    number = f"{os.getpid()}\n".encode("ascii")
    ours = _take(Path(path), number)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # as when the process has given up its privileges
            if _is_at(ours, Path(path)) and os.pread(ours, _LONGEST, 0) == number:
                Path(path).unlink()
        os.close(ours)  # and with it the lock, so not before the file is gone


def _take(path: Path, number: bytes) -> int:
    """The descriptor of the file at `path`, which is new and locked."""
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        ours = os.open(new, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        try:
            fcntl.lockf(ours, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.write(ours, number)
            _put_in_place(new, path)
        except BaseException:
            os.close(ours)
            new.unlink(missing_ok=True)
            raise
    except OSError as failure:
        raise MilterError(f"cannot write the pidfile {path}: {failure.strerror}") from failure
    return ours


def _put_in_place(new: Path, path: Path) -> None:
    """Nobody else can put one there meanwhile: who replaces a file holds its lock, and a link replaces none."""
    for _ in range(_ATTEMPTS):
        try:
            left_behind = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            with contextlib.suppress(FileExistsError):
                os.link(new, path)
                new.unlink()
                return
            continue
        try:
            _lock(left_behind, path)
            if _is_at(left_behind, path):
                new.replace(path)
                return
        finally:
            os.close(left_behind)
    raise MilterError(f"cannot write the pidfile {path}: other processes replace it all the time")


def _lock(descriptor: int, path: Path) -> None:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        owner = os.pread(descriptor, _LONGEST, 0).decode("ascii", "replace").strip()
        raise MilterError(
            f"the pidfile {path} belongs to process {owner}, which is running: stop that first, or name another file"
        ) from None


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
