# SPDX-License-Identifier: GPL-3.0-or-later
"""A filter that gives back what it got."""

import sys

from milter import Address, Context, EomContext, Milter, Params, Status

app = Milter("encoding")


@app.on_rcpt
def collect(ctx: Context, recipient: Address, params: Params) -> Status:
    return Status.CONTINUE


@app.on_header
def remember(ctx: Context, name: str, value: str) -> None:
    ctx.transaction.value = value


@app.on_body
def look(ctx: Context, chunk: bytes) -> None:
    ctx.transaction.body = chunk


@app.on_eom
def give_back(ctx: EomContext) -> None:
    print(ascii(ctx.transaction.value), ascii(ctx.sender), ascii(ctx.macros["i"]), ascii(ctx.helo))
    ctx.add_header("X-Value", ctx.transaction.value)
    ctx.add_header("X-Macro", ctx.macros["i"])
    ctx.add_recipient(ctx.recipients[0])
    ctx.replace_sender(str(ctx.sender))
    ctx.replace_body(ctx.transaction.body)


if __name__ == "__main__":
    app.run(sys.argv[1])
