# SPDX-License-Identifier: GPL-3.0-or-later
"""The command ``milter check``: play the MTA, send messages to a filter, and show what comes of it.

Nothing is sent anywhere else. ``milter.cli`` calls `add_arguments` and `main`. The rooms:

- ``arguments`` describes the command line, and reads an `Order` out of it;
- ``offers`` has what the MTA that is played offers, and its macros;
- ``mails`` finds and reads the messages;
- ``sending`` sends one of them, and finds out what comes of it: a `Result`;
- ``diff`` compares a message before and after;
- ``text`` and ``documents`` tell results to people and to programs;
- ``load`` sends many at once, and ``bar`` shows how far that is;
- ``command`` puts them together.
"""

import argparse

from milter.checker.arguments import add_arguments

__all__ = ["add_arguments", "main"]


def main(args: argparse.Namespace) -> int:
    """Run ``milter check``; returns the exit code."""
    from milter.checker import command  # what it needs besides is nothing for a filter that runs by "milter run"

    return command.main(args)
