# SPDX-License-Identifier: GPL-3.0-or-later
"""How a filter is run: the options of ``start()``, and what ``run()`` and ``milter run`` have besides."""

from collections.abc import Mapping
from typing import Any, Literal, TypedDict, cast

__all__ = ["RunOptions", "StartOptions", "run_options", "start_options", "those_of_start"]

_PACKET = 65535


class StartOptions(TypedDict, total=False):
    """The options of :meth:`Milter.start <milter.Milter.start>`, and of :meth:`Milter.run <milter.Milter.run>`."""

    timeout: int
    """Seconds that libmilter waits for the MTA's next command, or for it to read; 7210 (``smfi_settimeout``)."""
    backlog: int
    """How many connections may wait to be accepted; 128 (``listen(2)``)."""
    remove_socket: bool
    """Remove a Unix socket that a filter left behind, once nobody listens there; True."""
    mode: int | None
    """The permissions of a Unix socket, such as ``0o660``, before anybody can connect; None: as the umask has it."""
    group: str | int | None
    """The group of a Unix socket, by name or number; with ``user`` the group of the processes, too."""
    grace: float
    """Seconds that open connections get to end, when the filter is told to stop; 30."""
    debug: int
    """libmilter's debug level, 0 to 6: what it does, on standard output (``smfi_setdbg``)."""
    max_data_size: int
    """Bytes of one packet of the protocol, for an MTA built for larger ones; 65535 (``smfi_setmaxdatasize``)."""
    access_log: bool
    """A line for each message, to the logger ``milter.access``; False. See :mod:`milter.access`."""
    metrics: str | None
    """Where Prometheus can ask for figures, ``host:port`` or a port of 127.0.0.1; None. See :mod:`milter.metrics`."""


class RunOptions(StartOptions, total=False):
    """The options of :meth:`Milter.run <milter.Milter.run>`; ``milter run`` has them by the same names."""

    workers: int
    """How many processes serve; 1. With more, a process that does nothing else watches them, and replaces dead ones."""
    user: str | int | None
    """Become this user, by name or number, when the socket is open and before any other code of the filter runs."""
    pidfile: str | None
    """A file for the number of the process that signals go to."""
    log_level: str | None
    """What Python's logging shows: ``debug``, ``info``, ``warning``, ``error``; None: logging stays as it is."""
    log_format: Literal["text", "json"] | None
    """How; see :mod:`milter.logs`."""
    syslog: str | None
    """Where to, instead of standard error: ``/dev/log``, or ``host:port`` of another machine's syslog."""


_START_DEFAULTS: StartOptions = {
    "timeout": 7210,
    "backlog": 128,
    "remove_socket": True,
    "mode": None,
    "group": None,
    "grace": 30.0,
    "debug": 0,
    "max_data_size": _PACKET,
    "access_log": False,
    "metrics": None,
}
_RUN_DEFAULTS: RunOptions = {
    **_START_DEFAULTS,
    "workers": 1,
    "user": None,
    "pidfile": None,
    "log_level": None,
    "log_format": None,
    "syslog": None,
}

_LOWEST = {"timeout": 1, "backlog": 1, "grace": 0, "debug": 0, "max_data_size": _PACKET, "workers": 1}


def start_options(given: StartOptions) -> StartOptions:
    """All of them, checked."""
    return cast(StartOptions, _complete(given, _START_DEFAULTS))


def run_options(given: RunOptions) -> RunOptions:
    """All of them, checked."""
    return cast(RunOptions, _complete(given, _RUN_DEFAULTS))


def those_of_start(options: RunOptions) -> StartOptions:
    """What a server wants of the options of a whole run."""
    return cast(StartOptions, {name: value for name, value in options.items() if name in _START_DEFAULTS})


def _complete(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    unknown = given.keys() - defaults.keys()
    if unknown:
        raise TypeError(f"unknown options: {', '.join(sorted(unknown))}; there are {', '.join(sorted(defaults))}")
    merged = {**defaults, **given}
    for name, lowest in _LOWEST.items():
        if name in merged and merged[name] < lowest:
            raise ValueError(f"{name} must be {lowest} or more, not {merged[name]}")
    return merged
