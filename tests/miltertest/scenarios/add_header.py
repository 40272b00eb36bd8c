# SPDX-License-Identifier: GPL-3.0-or-later
"""A filter that adds a header field to each message."""

import sys

from milter import EomContext, Milter, Status

app = Milter("add_header")


@app.on_eom
def mark(ctx: EomContext) -> Status:
    ctx.add_header("X-Greeting", "hello, world")
    return Status.ACCEPT


if __name__ == "__main__":
    app.run(sys.argv[1])
