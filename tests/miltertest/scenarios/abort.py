# SPDX-License-Identifier: GPL-3.0-or-later
"""A filter that counts how messages begin and end."""

import sys

from milter import Address, Context, EomContext, Milter, Params, Status

app = Milter("abort")


@app.on_mail
def begin(ctx: Context, sender: Address, params: Params) -> Status:
    print("begin", sender)
    return Status.REJECT if sender.local == "refused" else Status.CONTINUE


@app.on_eom
def end(ctx: EomContext) -> Status:
    print("end", ctx.sender)
    return Status.TEMPFAIL if str(ctx.sender).startswith("later@") else Status.CONTINUE


@app.on_unknown
def unknown(ctx: Context, command: str) -> None:
    print(command, "within the message of", ctx.sender)


@app.on_abort
def give_up(ctx: Context) -> None:
    print("give up", ctx.sender, [str(recipient) for recipient in ctx.recipients])


@app.on_close
def close(ctx: Context) -> None:
    print("close", ctx.sender)


if __name__ == "__main__":
    app.run(sys.argv[1])
