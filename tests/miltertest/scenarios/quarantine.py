# SPDX-License-Identifier: GPL-3.0-or-later
"""A filter that puts messages aside for a human to look at."""

import sys

from milter import EomContext, Milter, Status

app = Milter("quarantine")


@app.on_eom
def put_aside(ctx: EomContext) -> Status:
    if ctx.sender and ctx.sender.matches("suspect@client.example"):
        ctx.quarantine("looks 100% suspicious")
    return Status.ACCEPT


if __name__ == "__main__":
    app.run(sys.argv[1])
