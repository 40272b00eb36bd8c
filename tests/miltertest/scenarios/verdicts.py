# SPDX-License-Identifier: GPL-3.0-or-later
"""A filter that gives one verdict at one stage: the verdict by which the client calls itself."""

import sys

from milter import Context, Milter, Status

app = Milter("verdicts")
socket, stage = sys.argv[1:]


def give_verdict(ctx: Context, *arguments: object) -> Status:
    assert ctx.hostname is not None
    return Status[ctx.hostname]


getattr(app, f"on_{stage}")(give_verdict)


@app.on_abort
def given_up(ctx: Context) -> None:
    print("given up:", ctx.hostname)


if __name__ == "__main__":
    app.run(socket)
