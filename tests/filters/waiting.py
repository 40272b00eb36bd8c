# SPDX-License-Identifier: GPL-3.0-or-later
"""A filter whose end of message waits, in a coroutine, for a line on standard input: SOCKET (run | start).

With "start" the filter is never stopped: the line ends the program.
"""

import asyncio
import sys

from milter import EomContext, Milter, Status

app = Milter("waiting")


@app.on_start
async def started() -> None:
    print("started", flush=True)


@app.on_eom
async def wait_for_input(ctx: EomContext) -> Status:
    print("at the end of a message", flush=True)
    if sys.argv[2] == "start":
        await asyncio.Event().wait()
    await asyncio.to_thread(sys.stdin.readline)
    return Status.ACCEPT


@app.on_stop
async def stopped() -> None:
    print("stopped", flush=True)


if sys.argv[2] == "run":
    app.run(sys.argv[1])
    print("run() returned", flush=True)
else:
    app.start(sys.argv[1])
    sys.stdin.readline()
