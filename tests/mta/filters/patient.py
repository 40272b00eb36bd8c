# SPDX-License-Identifier: GPL-3.0-or-later
"""Asks at its standard input what to do with each message: ``accept`` or ``reject``.

python tests/mta/filters/patient.py SOCKET
"""

import sys

from milter import EomContext, Milter, Reply, Status

app = Milter("patient")


@app.on_eom
def ask(ctx: EomContext) -> Status | Reply:
    print("what now?", flush=True)
    if sys.stdin.readline() == "reject\n":
        return Reply(554, "5.7.1", "nobody wanted it")
    ctx.add_header("X-Patient", "wanted")
    return Status.CONTINUE


if __name__ == "__main__":
    app.run(sys.argv[1])
