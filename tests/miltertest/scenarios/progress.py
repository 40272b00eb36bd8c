# SPDX-License-Identifier: GPL-3.0-or-later
"""A filter that takes its time, and says so."""

import sys

from milter import EomContext, Milter, Status

app = Milter("progress")


@app.on_eom
def work(ctx: EomContext) -> Status:
    ctx.signal_progress()
    ctx.signal_progress()
    ctx.add_header("X-Work", "done")
    ctx.signal_progress()
    ctx.append_body_chunk(b"one\r\n")
    ctx.signal_progress()
    ctx.append_body_chunk(b"two\r\n")
    ctx.signal_progress()
    return Status.CONTINUE


if __name__ == "__main__":
    app.run(sys.argv[1])
