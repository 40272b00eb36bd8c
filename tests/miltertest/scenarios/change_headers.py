# SPDX-License-Identifier: GPL-3.0-or-later
"""A filter that adds, inserts, changes and deletes header fields."""

import sys

from milter import EomContext, Milter, Status

app = Milter("change_headers")


@app.on_eom
def rewrite(ctx: EomContext) -> Status:
    ctx.add_header("X-Added", "at the end")
    ctx.add_header("X-Folded", "one\r\n\ttwo\n three")
    ctx.add_header("X-Empty", "")
    ctx.insert_header(0, "X-Top", "above the MTA's own")
    ctx.insert_header(1, "X-Below", "100% below")
    ctx.replace_header("Subject", 1, "[checked] hello")
    ctx.replace_header("received", 2, "changed")
    ctx.replace_header("X-Spam", 2, None)
    ctx.replace_header("X-Spam", 1, "")
    return Status.CONTINUE


if __name__ == "__main__":
    app.run(sys.argv[1])
