# SPDX-License-Identifier: GPL-3.0-or-later
"""Where Python's logging goes, when a filter is a program of its own: standard error or syslog, text or JSON.

The command line and ``app.run`` call :func:`configure` once. Whoever embeds a filter sets up ``logging``
himself, and never needs this.

Text is one line a record: what is not printable is escaped, and the lines of a traceback are indented, so no
record can look like another one::

    2026-01-31T12:00:00.123+00:00 INFO milter[4711]: guard is listening on inet:3000@127.0.0.1

JSON is one object a line, in ASCII: ``time``, ``level``, ``logger``, ``pid``, ``message``, with a traceback
``exception``; and whatever a record brings in its dict ``record.milter``, as those of the access log do.

To syslog goes the same, facility ``mail``, without what syslog says itself: time and level. And when standard error
is systemd's journal, text has the form that the journal takes level and process from (sd-daemon(3)).
"""

import contextlib
import json
import logging
import math
import os
import socket
import stat
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from logging.handlers import SYSLOG_UDP_PORT, SysLogHandler
from typing import Any, Literal

from milter.errors import MilterError
from milter.outlets import Outlet, patient_stream
from milter.printable import printable

__all__ = ["JournalFormatter", "JsonFormatter", "SyslogFormatter", "TextFormatter", "configure"]

_DEEPEST = 8  # levels of a value in record.milter; it might contain itself

_installed: logging.Handler | None = None


def configure(level: str | int = "info", format: Literal["text", "json"] = "text", syslog: str | None = None) -> None:
    """Send all that Python logs to one place. A later call replaces what an earlier one set up.

    Arguments:
        level: the least that is shown: ``debug``, ``info``, ``warning``, ``error``, ``critical``.
        format: ``text`` or ``json``.
        syslog: instead of standard error: the socket of the system's log, such as ``/dev/log``, or ``host:port``
            of another machine's (UDP; without a port: 514).

    Raises ``ValueError`` for a level or format that does not exist, and :class:`MilterError <milter.MilterError>`
    when the system's log cannot be reached.
    """
    global _installed
    number = _level(level)
    if format not in ("text", "json"):
        raise ValueError(f"a log is of the format text or json, not {format!r}")
    handler: logging.Handler = _stream_handler() if syslog is None else _syslog_handler(syslog)
    if format == "text":
        handler.setFormatter(_text_formatter(syslog))
    else:
        handler.setFormatter(JsonFormatter(prefix=_tag if syslog is not None else _nothing))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(number)
    if _installed is not None:
        root.removeHandler(_installed)
        _installed.close()
    _installed = handler


def _stream_handler() -> logging.Handler:
    return logging.StreamHandler(patient_stream(sys.stderr, "standard error"))


def _level(level: str | int) -> int:
    if isinstance(level, int):
        return level
    number = logging.getLevelNamesMapping().get(level.upper())
    if number is None:
        raise ValueError(f"{level!r} is no level of a log: there are debug, info, warning, error, critical")
    return number


def _text_formatter(syslog: str | None) -> logging.Formatter:
    if syslog is not None:
        return SyslogFormatter()
    return JournalFormatter() if _is_journal(2) else TextFormatter()


def _is_journal(descriptor: int) -> bool:
    """systemd says in a variable which file its journal is; a child may have got it, and write somewhere else."""
    try:
        file = os.fstat(descriptor)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{file.st_dev}:{file.st_ino}"


# ---- Formats ---------------------------------------------------------------------------------


class TextFormatter(logging.Formatter):
    """For people, on standard error."""

    def format(self, record: logging.LogRecord) -> str:
        first = f"{_time(record)} {record.levelname} {_tag(record)}{printable(record.getMessage())}"
        return "\n".join([first, *(f"  {printable(line)}" for line in _traceback(record).splitlines())])


class SyslogFormatter(logging.Formatter):
    """For syslog, which knows time and level; always on one line."""

    def format(self, record: logging.LogRecord) -> str:
        level = f"{record.levelname.lower()}: " if record.levelno != logging.INFO else ""
        traceback = _traceback(record)
        return _tag(record) + level + printable("\n".join(filter(None, [record.getMessage(), traceback])))


class JournalFormatter(logging.Formatter):
    """For systemd's journal, which knows time and process, and reads the level of each line from its beginning."""

    def format(self, record: logging.LogRecord) -> str:
        level = f"<{_priority(record.levelno)}>"
        first = f"{level}{record.name}: {printable(record.getMessage())}"
        return "\n".join([first, *(f"{level}  {printable(line)}" for line in _traceback(record).splitlines())])


def _priority(level: int) -> int:
    """Of syslog(3)."""
    priorities = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))
    return next((priority for least, priority in priorities if level >= least), 7)


def _tag(record: logging.LogRecord) -> str:
    return f"{record.name}[{record.process or os.getpid()}]: "


def _nothing(record: logging.LogRecord) -> str:
    return ""


class JsonFormatter(logging.Formatter):
    """For programs.

    Arguments:
        prefix: what comes before the object, which syslog wants to know.
    """

    def __init__(self, prefix: Callable[[logging.LogRecord], str] = _nothing) -> None:
        super().__init__()
        self._prefix = prefix

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": _time(record),
            "level": record.levelname,
            "logger": record.name,
            "pid": record.process or os.getpid(),
            "message": record.getMessage(),
        }
        traceback = _traceback(record)
        if traceback:
            entry["exception"] = traceback
        fields = _plain(getattr(record, "milter", None))
        if isinstance(fields, dict):
            entry.update({name: value for name, value in fields.items() if name not in entry})
        return self._prefix(record) + json.dumps(entry)


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")


def _traceback(record: logging.LogRecord) -> str:
    """As ``logging`` would print it, without keeping it in the record, where another formatter may want another."""
    parts = []
    if record.exc_info and record.exc_info[0] is not None:
        parts.append(logging.Formatter().formatException(record.exc_info))
    if record.stack_info:
        parts.append(record.stack_info)
    return "\n".join(parts)


def _plain(value: Any, depth: int = 0) -> Any:
    """What JSON has a form for, of whatever a record brings."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value) if abs(value) < 1 << 64 else hex(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if depth < _DEEPEST and isinstance(value, Mapping):
        return {str(key): _plain(item, depth + 1) for key, item in value.items()}
    if depth < _DEEPEST and isinstance(value, list | tuple | set | frozenset):
        return [_plain(item, depth + 1) for item in value]
    return repr(value) if depth < _DEEPEST else "…"


# ---- Syslog ----------------------------------------------------------------------------------


class _Syslog(SysLogHandler):
    """Sends through an outlet: a system's log that hangs or is gone stops nobody. It is looked for again each time."""

    socket: Any

    def __init__(self, name: str, address: str | tuple[str, int]) -> None:
        self._outlet = Outlet(f"the system's log at {name}", self._send, self._say_lost)
        self._place = name
        super().__init__(address, facility=SysLogHandler.LOG_MAIL)
        self.append_nul = isinstance(address, str)  # a datagram to another machine has its own end

    def emit(self, record: logging.LogRecord) -> None:
        try:
            priority = self.encodePriority(self.facility, self.mapPriority(record.levelname))
            text = self.format(record)
        except Exception:
            self.handleError(record)
            return
        end = b"\0" if self.append_nul else b""
        self._outlet.write(f"<{priority}>{text}".encode("utf-8", "backslashreplace") + end)

    def _send(self, data: bytes, seconds: float) -> None:
        try:
            self._send_once(data, seconds)
        except (BlockingIOError, TimeoutError):
            raise
        except OSError:  # it was started anew, and has another socket
            self._disconnect()
            self._send_once(data, seconds)

    def _send_once(self, data: bytes, seconds: float) -> None:
        if not self.socket:
            self.createSocket()
        connection = self.socket
        connection.settimeout(seconds)
        if isinstance(self.address, str):
            connection.sendall(data)
        else:
            connection.sendto(data, self.address)

    def _disconnect(self) -> None:
        if self.socket:
            self.socket.close()
        self.socket = None

    def _say_lost(self, failure: OSError) -> None:
        """Where it can be read: not there."""
        with contextlib.suppress(Exception):
            sys.stderr.write(
                f"milter: the system's log at {self._place} cannot be written ({failure.strerror or failure}): lines "
                "are lost until that is mended. Mail is served as before\n"
            )


def _syslog_handler(syslog: str) -> SysLogHandler:
    if syslog.startswith("/"):
        _require_listener(syslog)
        return _Syslog(syslog, syslog)
    host, port = _host_and_port(syslog)
    try:
        # Looked for now, and not with each line, which would wait for DNS.
        *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        return _Syslog(syslog, (str(address[0]), int(address[1])))
    except OSError as failure:
        raise MilterError(f"the syslog at {syslog} cannot be reached: {failure.strerror}") from failure


def _require_listener(path: str) -> None:
    """SysLogHandler itself would stay silent, now and later."""
    advice = "start the system's log, or name another: its socket, or host:port"
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            raise MilterError(f"{path} is no socket of the system's log: {advice}")
        for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM):
            with socket.socket(socket.AF_UNIX, kind) as probe:
                if probe.connect_ex(path) == 0:
                    return
    except OSError as failure:
        raise MilterError(f"the system's log at {path} cannot be reached ({failure.strerror}): {advice}") from failure
    raise MilterError(f"nobody listens at {path}, the system's log: {advice}")


def _host_and_port(syslog: str) -> tuple[str, int]:
    host, colon, port = syslog.rpartition(":")
    if not colon or syslog.endswith("]"):
        host, port = syslog, str(SYSLOG_UDP_PORT)
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"{syslog!r} is no syslog: write /dev/log, host:port or [2001:db8::1]:514")
    return host, int(port)
