# SPDX-License-Identifier: GPL-3.0-or-later
"""A filter whose end of message waits for a line on standard input: SOCKET [OPTION=SECONDS ...]."""

import sys

from milter import EomContext, Milter, Status

app = Milter("slow")


@app.on_eom
def wait_for_input(ctx: EomContext) -> Status:
    print("at the end of a message", flush=True)
    sys.stdin.readline()
    ctx.add_header("X-Slow", "yes")
    return Status.CONTINUE


@app.on_stop
def stopped() -> None:
    print("stopped", flush=True)


grace = float(sys.argv[2]) if len(sys.argv) > 2 else 30.0
app.run(sys.argv[1], grace=grace)
print("run() returned", flush=True)
