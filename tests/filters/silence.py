# SPDX-License-Identifier: GPL-3.0-or-later
"""A filter that gives silent MTAs up after a second, and says so: SOCKET."""

import sys

from milter import Context, Milter

app = Milter("silence")


@app.on_abort
def aborted(ctx: Context) -> None:
    print(f"abort {ctx.helo}", flush=True)


@app.on_close
def closed(ctx: Context) -> None:
    print(f"close {ctx.helo}", flush=True)


app.run(sys.argv[1], timeout=1)
