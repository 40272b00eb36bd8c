# SPDX-License-Identifier: GPL-3.0-or-later
"""The command ``milter``: finds the subcommand, and leaves the rest to its module."""

import argparse
import logging
import sys
from collections.abc import Sequence

from milter import checker, inspector, run_command
from milter._version import VERSION
from milter.gil import python_version
from milter.outlets import end_without_reader, reader_is_gone


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code. Wrong arguments exit with 2, as argparse does."""
    try:
        return _run(arguments)
    except BrokenPipeError:
        if not reader_is_gone(sys.stdout):  # it was another pipe
            raise
        return end_without_reader()


def _run(arguments: Sequence[str] | None) -> int:
    try:
        parsed = _parser().parse_args(arguments)
        if parsed.run is not run_command.main:  # which has options for that
            logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING, stream=sys.stderr)
        run = parsed.run
        code: int = run(parsed)
        return code
    finally:
        if sys.stdout is not None:
            sys.stdout.flush()  # here, where a reader that has gone is noticed


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="milter", description="Mail filters for Postfix and Sendmail.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="serve a filter: workers, reload, clean stop")
    run_command.add_arguments(run)
    run.set_defaults(run=run_command.main)

    inspect = commands.add_parser("inspect", help="print every stage of every conversation")
    inspector.add_arguments(inspect)
    inspect.set_defaults(run=inspector.main)

    check = commands.add_parser("check", help="play the MTA: send a message to a filter")
    checker.add_arguments(check)
    check.set_defaults(run=checker.main)

    version = commands.add_parser("version", help="print the versions of this library and of libmilter")
    version.set_defaults(run=_version)
    return parser


def _version(parsed: argparse.Namespace) -> int:
    from milter.libmilter import libmilter

    running, compiled = (".".join(map(str, parts)) for parts in (libmilter.version, libmilter.compiled_version))
    print(f"milter {VERSION}")
    print(f"libmilter {running} running, {compiled} compiled against")
    print(f"libmilter is linked {libmilter.link}")
    print(python_version())
    return 0
