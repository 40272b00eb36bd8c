# SPDX-License-Identifier: GPL-3.0-or-later
"""A filter with several handlers for a stage."""

import sys

from milter import Address, Context, EomContext, Milter, Params, Reply, Status

app = Milter("first_verdict")


@app.on_rcpt
def watch(ctx: Context, recipient: Address, params: Params) -> None:
    print("watch", recipient)


@app.on_rcpt
def refuse(ctx: Context, recipient: Address, params: Params) -> Status | None:
    print("refuse", recipient)
    return Status.REJECT if recipient.matches("nobody@mta.example") else None


@app.on_rcpt
def explain(ctx: Context, recipient: Address, params: Params) -> Reply | None:
    print("explain", recipient)
    return Reply(550, "5.1.1", "moved") if recipient.matches("nobody@mta.example", "moved@mta.example") else None


@app.on_eom
def mark(ctx: EomContext) -> Status:
    print("to", *ctx.recipients)
    ctx.add_header("X-First", "1")
    return Status.CONTINUE


@app.on_eom
def accept(ctx: EomContext) -> Status:
    ctx.add_header("X-Second", "2")
    return Status.ACCEPT


@app.on_eom
def never(ctx: EomContext) -> Status:
    ctx.add_header("X-Third", "3")
    return Status.REJECT


if __name__ == "__main__":
    app.run(sys.argv[1])
