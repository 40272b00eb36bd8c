# SPDX-License-Identifier: GPL-3.0-or-later
"""A filter that gives silent MTAs up after a second, and says so: SOCKET. Many at once: each line is one write."""

import os
import sys

from milter import Context, Milter

app = Milter("silence")


@app.on_abort
def aborted(ctx: Context) -> None:
    os.write(1, f"abort {ctx.helo}\n".encode())


@app.on_close
def closed(ctx: Context) -> None:
    os.write(1, f"close {ctx.helo}\n".encode())


app.run(sys.argv[1], timeout=1)
