# SPDX-License-Identifier: GPL-3.0-or-later
"""Handlers that have no end of their own, a coroutine at RCPT and a plain function at the end of a message.

What takes half a second is late here.
"""

import asyncio
import sys

from milter import Context, EomContext, Milter, Status, watch

watch._LATE = 0.5
watch._LATE_AT = {}

app = Milter("endless", progress=None)


@app.on_rcpt
async def ask(ctx: Context, recipient: str, params: object) -> Status:
    if recipient.startswith("ask"):
        await asyncio.Event().wait()
    return Status.CONTINUE


@app.on_eom
def scan(ctx: EomContext) -> Status:
    while ctx.connected:
        pass
    return Status.CONTINUE


if __name__ == "__main__":
    app.run(sys.argv[1])
