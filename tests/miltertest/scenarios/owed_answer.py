# SPDX-License-Identifier: GPL-3.0-or-later
"""A filter with an observer that fails for some senders, and handlers that reply at later stages."""

import logging
import sys

from milter import Address, Context, EomContext, Milter, Params, Reply, Status

app = Milter("owed_answer", on_error=Reply(451, "4.3.0", "the filter is out of order"))


@app.on_mail
def observe(ctx: Context, sender: Address, params: Params) -> None:
    if sender.local == "trouble":
        raise LookupError("the database is gone")


@app.on_rcpt
def check_recipient(ctx: Context, recipient: Address, params: Params) -> Status:
    print("rcpt", recipient)
    return Status.CONTINUE


@app.on_eoh
def check_header(ctx: Context) -> Status:
    print("eoh")
    return Status.CONTINUE


@app.on_eom
def mark(ctx: EomContext) -> None:
    print("eom")
    ctx.add_header("X-Mark", "checked")


@app.on_abort
def give_up(ctx: Context) -> None:
    print("give up", ctx.sender)


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s: %(message)s")
    app.run(sys.argv[1])
