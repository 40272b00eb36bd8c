# SPDX-License-Identifier: GPL-3.0-or-later
"""From libmilter's log lines to Python's logging, through a pipe.

libmilter writes a line wherever it is, on threads that must not wait for Python. So the line goes into a
pipe (shim/redirect.c), and a thread here logs it. If the pipe is full, the line goes to the system's log instead.
"""

import logging
import os
import select
import threading
from collections import deque

from milter import children
from milter.errors import MilterError
from milter.safe_log import SafeLog
from milter.scarcity import start_thread

log = SafeLog("milter.libmilter")

_LEVELS = (
    logging.CRITICAL,  # LOG_EMERG
    logging.CRITICAL,  # LOG_ALERT
    logging.CRITICAL,  # LOG_CRIT
    logging.ERROR,
    logging.WARNING,
    logging.INFO,  # LOG_NOTICE
    logging.INFO,
    logging.DEBUG,
)
_AFTER_THE_END = ("TASKMGR_LOCK error", "TASKMGR_UNLOCK error")
"""Said by a worker thread that comes when libmilter has stopped and its pool's mutex is no more (mi_worker in
libmilter/worker.c). It ends then, and nobody has to do anything about it."""
_PATIENCE = 5.0
"""Seconds that a program's own handlers of log records get at the end."""


class LogPipe:
    """Lives as long as the process: a line of libmilter's may be on its way at any time."""

    def __init__(self) -> None:
        self._reader, self.writer = os.pipe()
        hidden = children.hide(self._reader)
        os.set_blocking(self.writer, False)
        self._drained: deque[threading.Event] = deque()
        try:
            start_thread(self._read, "milter: libmilter's log")
        except MilterError:
            children.show(hidden)
            os.close(self._reader)
            os.close(self.writer)
            raise

    def drain(self) -> None:
        """Wait until all lines that are in the pipe now are logged."""
        logged = threading.Event()
        self._drained.append(logged)
        writable = select.poll()
        writable.register(self.writer, select.POLLOUT)
        while True:
            try:
                os.write(self.writer, b"\n")  # libmilter's lines are not empty
                break
            except BlockingIOError:
                writable.poll()
        logged.wait(_PATIENCE)

    def _read(self) -> None:
        begun = b""
        while True:
            *lines, begun = (begun + os.read(self._reader, 65536)).split(b"\n")
            for line in lines:
                if line:
                    _log(line)
                else:
                    self._drained.popleft().set()


def _log(line: bytes) -> None:
    """Log a line such as ``<3>filter: something is wrong``."""
    priority, _, rest = line[1:].partition(b">")
    text = rest.decode("utf-8", "backslashreplace")
    log.log(logging.DEBUG if text in _AFTER_THE_END else _LEVELS[int(priority) & 7], "%s", text)
