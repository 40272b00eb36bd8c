# SPDX-License-Identifier: GPL-3.0-or-later
"""``milter run``: its arguments, which are the options of :meth:`Milter.run <milter.Milter.run>`, and its exit code.

Exit codes: 0 after a stop; 1 when the filter could not be started; 2 for wrong arguments; 70 when it could not go on,
or did not end in time.
"""

import argparse
import sys

from milter.errors import MilterError
from milter.options import RunOptions
from milter.outlets import patient_streams
from milter.runner import run_by_name

__all__ = ["add_arguments", "main"]

_EXIT_NOT_STARTED = 1
_LEVELS = ("debug", "info", "warning", "error", "critical")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Serve a filter until SIGTERM or SIGINT, which let open connections end; a second one ends at once. SIGHUP "
        "loads the filter again, without a message lost: the new version serves before the old one ends."
    )
    parser.add_argument(
        "filter", metavar="MODULE:APP", help="the module of the filter, and the name of its Milter there"
    )
    parser.add_argument(
        "-s",
        "--socket",
        metavar="SOCKET",
        help="where to listen: inet:port@host, inet6:port@host, unix:path, fd:number; without it, what systemd passes",
    )
    parser.add_argument(
        "-w",
        "--workers",
        type=_number,
        default=1,
        metavar="N",
        help="processes that serve, say one for each processor [1]",
    )
    parser.add_argument("--user", metavar="NAME", help="become this user once the socket is open")
    parser.add_argument(
        "--group", metavar="NAME", help="the group of a Unix socket, and with --user of the processes [the user's own]"
    )
    parser.add_argument("--mode", type=_mode, metavar="MODE", help="the permissions of a Unix socket, such as 660")
    parser.add_argument("--pidfile", metavar="FILE", help="write the number of the process that signals go to")
    parser.add_argument(
        "--timeout",
        type=_number,
        default=7210,
        metavar="SECONDS",
        help="wait so long for the MTA's next command [7210]",
    )
    parser.add_argument(
        "--backlog", type=_number, default=128, metavar="N", help="connections that may wait to be accepted [128]"
    )
    parser.add_argument(
        "--grace",
        type=_seconds,
        default=30.0,
        metavar="SECONDS",
        help="time for open connections to end, at a stop [30]",
    )
    parser.add_argument(
        "--access-log",
        action="store_true",
        help="log a line for each message: client, envelope, verdict, changes",
    )
    parser.add_argument(
        "--metrics", metavar="[HOST:]PORT", help="tell Prometheus figures there, on 127.0.0.1 if no host is given"
    )
    parser.add_argument("--log-level", choices=_LEVELS, default="info", help="the least that is logged [info]")
    parser.add_argument("--log-format", choices=("text", "json"), default="text", help="[text]")
    parser.add_argument(
        "--syslog",
        nargs="?",
        const="/dev/log",
        metavar="SOCKET|HOST[:PORT]",
        help="log there, facility mail, and not to standard error [/dev/log]",
    )


def main(parsed: argparse.Namespace) -> int:
    options: RunOptions = {
        "workers": parsed.workers,
        "user": _name_or_number(parsed.user),
        "group": _name_or_number(parsed.group),
        "mode": parsed.mode,
        "pidfile": parsed.pidfile,
        "timeout": parsed.timeout,
        "backlog": parsed.backlog,
        "grace": parsed.grace,
        "access_log": parsed.access_log,
        "metrics": parsed.metrics,
        "log_level": parsed.log_level,
        "log_format": parsed.log_format,
        "syslog": parsed.syslog,
    }
    with patient_streams():
        try:
            return run_by_name(parsed.filter, parsed.socket, options)
        except (MilterError, ValueError) as failure:
            print(f"milter run: {failure}", file=sys.stderr)
            return _EXIT_NOT_STARTED


def _number(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds")
    return seconds


def _mode(text: str) -> int:
    try:
        mode = int(text, 8)
    except ValueError:
        mode = -1
    if not 0 <= mode <= 0o777:
        raise argparse.ArgumentTypeError(f"{text!r} are no permissions; write three octal digits, as in 660")
    return mode


def _name_or_number(text: str | None) -> str | int | None:
    return int(text) if text is not None and text.isascii() and text.isdigit() else text
