# SPDX-License-Identifier: GPL-3.0-or-later
"""Answers unknown commands, and prints the names of header fields.

python tests/mta/filters/unknown_commands.py SOCKET
"""

import sys

from milter import Context, Milter, Reply, Status

app = Milter("unknown_commands")


@app.on_unknown
def refuse(ctx: Context, command: str) -> Reply:
    # A permanent one would reach the client from Postfix before 3.10 only; from then on Postfix tells the whole line.
    return Reply(450, "4.5.1", f"{command.split()[0]} is 100% unknown")


@app.on_header
def print_name(ctx: Context, name: str, value: str) -> Status:
    print(name, flush=True)
    return Status.CONTINUE


if __name__ == "__main__":
    app.run(sys.argv[1])
