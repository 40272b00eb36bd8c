# SPDX-License-Identifier: GPL-3.0-or-later
"""The library's own loggers, which never raise: a log that fails changes no verdict and stops no server.

``logging`` catches what goes wrong while a line is written. It does not catch what a filter or a handler of a
program's own raises, nor that of the standard library when it opens a file again (``WatchedFileHandler``). Such an
exception would come out of the library's calls, in the middle of somebody's message. It is told on standard error
instead, the first one of each type with its traceback.
"""

import logging
import sys
import threading
import traceback
from collections.abc import Mapping
from typing import Any

__all__ = ["SafeLog", "enable_loggers"]

_BEHIND_US = 3
"""Frames between the line that logs and the logger: a formatter names that line."""

_loggers: set[logging.Logger] = set()
_told: set[type[Exception]] = set()
_telling = threading.Lock()


class SafeLog:
    """The logger of this name."""

    def __init__(self, name: str) -> None:
        self.logger = logging.getLogger(name)
        _loggers.add(self.logger)

    def is_enabled_for(self, level: int) -> bool:
        return self.logger.isEnabledFor(level)

    def debug(self, message: str, *arguments: object) -> None:
        self._log(logging.DEBUG, message, arguments)

    def info(
        self, message: str, *arguments: object, extra: Mapping[str, object] | None = None, exc_info: Any = None
    ) -> None:
        self._log(logging.INFO, message, arguments, exc_info, extra=extra)

    def warning(self, message: str, *arguments: object) -> None:
        self._log(logging.WARNING, message, arguments)

    def error(self, message: str, *arguments: object, exc_info: Any = None) -> None:
        self._log(logging.ERROR, message, arguments, exc_info)

    def exception(self, message: str, *arguments: object) -> None:
        self._log(logging.ERROR, message, arguments, exc_info=True)

    def critical(self, message: str, *arguments: object, exc_info: Any = None) -> None:
        self._log(logging.CRITICAL, message, arguments, exc_info)

    def log(self, level: int, message: str, *arguments: object) -> None:
        self._log(level, message, arguments)

    def _log(
        self,
        level: int,
        message: str,
        arguments: tuple[object, ...],
        exc_info: Any = None,
        extra: Mapping[str, object] | None = None,
    ) -> None:
        try:
            self.logger.log(level, message, *arguments, exc_info=exc_info, extra=extra, stacklevel=_BEHIND_US)
        except Exception as failure:
            _tell(failure)


def enable_loggers() -> None:
    """When a filter starts: ``dictConfig`` and ``fileConfig`` disable all loggers that exist, if they are not told not
    to. A filter that configures its own log does not mean the access log, nor what is said of its errors."""
    for logger in _loggers:
        logger.disabled = False


def _tell(failure: Exception) -> None:
    """Once for each type: or a full disk would fill the next one."""
    with _telling:
        if type(failure) in _told:
            return
        _told.add(type(failure))
    try:
        sys.stderr.write(
            "milter: the log failed, and lines of it are missing. Mail is served as before. A handler, filter or "
            f"formatter of logging raised:\n{''.join(traceback.format_exception(failure))}"
        )
        sys.stderr.flush()
    except Exception:  # nothing is left that could be told
        return
