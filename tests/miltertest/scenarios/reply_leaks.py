# SPDX-License-Identifier: GPL-3.0-or-later
"""A filter that refuses some recipients with a text of its own, and others without."""

import sys

from milter import Address, Context, Milter, Params, Reply, Status

app = Milter("reply_leaks")

ANSWERS: dict[str, Status | Reply] = {
    "text@mta.example": Reply(550, "5.1.1", "nobody of that name"),
    "later@mta.example": Reply(450, "4.2.1", "not today"),
    "no@mta.example": Status.REJECT,
    "not-now@mta.example": Status.TEMPFAIL,
}


@app.on_rcpt
def look_up(ctx: Context, recipient: Address, params: Params) -> Status | Reply | None:
    return ANSWERS.get(recipient)


@app.on_data
def refuse(ctx: Context) -> Status | None:
    return Status.REJECT if ctx.sender and ctx.sender.matches("spammer@client.example") else None


if __name__ == "__main__":
    app.run(sys.argv[1])
