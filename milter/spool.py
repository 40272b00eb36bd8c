# SPDX-License-Identifier: GPL-3.0-or-later
"""The directory for large messages: tried at the start, and told of when it fails, once, and when it is well again.

The files are made in shim/content.c.
"""

import errno
import os
import tempfile
import threading

from milter.errors import MilterError
from milter.safe_log import SafeLog

__all__ = ["Spool", "directory"]

log = SafeLog("milter")

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""What may pass by itself: no reason not to start, since most messages need no file."""


def directory(wanted: str | os.PathLike[str] | None) -> str:
    """Where large messages go. Raises :class:`MilterError` when no file can be made there."""
    try:
        found = os.fspath(wanted or tempfile.gettempdir())
    except FileNotFoundError as failure:
        raise MilterError(
            "there is no directory for messages larger than Milter(spool_size=…): let Milter(spool_directory=…) or "
            f"TMPDIR name one that can be written ({failure.strerror})"
        ) from failure
    try:
        with tempfile.TemporaryFile(prefix="milter-", dir=found, buffering=0) as probe:
            probe.write(bytes(4096))
    except OSError as failure:
        if failure.errno not in _FULL:
            raise MilterError(
                f"no file can be made in {found}, Milter(spool_directory=…), for messages larger than "
                f"Milter(spool_size=…): {failure.strerror}. Create it, let this user write there, or name another one"
            ) from failure
        log.error("messages larger than Milter(spool_size=…) %s", _cannot_be_kept(found, failure.errno))
    return found


class Spool:
    """How it is with the directory while the filter runs. Any thread."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._fails = False

    def failed(self, error: int) -> OSError:
        """A message could not be kept: what to raise for it."""
        with self._lock:
            first, self._fails = not self._fails, True
        if first:
            log.error("a message %s; until then messages are answered by on_error", _cannot_be_kept(self._path, error))
        return OSError(error, f"the message could not be kept for on_message in {self._path}: {os.strerror(error)}")

    def worked(self) -> None:
        """A message lies in a file."""
        if self._fails:
            with self._lock:
                first, self._fails = self._fails, False
            if first:
                log.info("messages can be kept in %s again", self._path)


def _cannot_be_kept(path: str, error: int) -> str:
    cure = {
        errno.ENOSPC: "make room there",
        errno.EDQUOT: "make room there",
        errno.EMFILE: "raise the limit of open files (LimitNOFILE=, ulimit -n)",
        errno.ENOMEM: "the memory has run out",
    }.get(error, "check the directory and its permissions")
    return f"cannot be kept in {path}, Milter(spool_directory=…): {os.strerror(error)}; {cure}"
