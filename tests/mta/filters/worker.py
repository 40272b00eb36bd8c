# SPDX-License-Identifier: GPL-3.0-or-later
"""Marks each message with the number of the process that judged it. For `milter run worker:app`.

A line of output for each sender: the process and the address.
"""

import os

from milter import Context, EomContext, Milter, Status

app = Milter("worker")


@app.on_mail
def begin(ctx: Context, sender: str, params: object) -> Status:
    os.write(1, f"{os.getpid()} {sender}\n".encode())  # in one piece, since workers share the descriptor
    return Status.CONTINUE


@app.on_eom
def mark(ctx: EomContext) -> None:
    ctx.add_header("X-Worker", str(os.getpid()))


if __name__ == "__main__":
    app.run("inet:3000@localhost")
