# SPDX-License-Identifier: GPL-3.0-or-later
"""A filter put together from three."""

import sys

from milter import Address, Context, EomContext, Milter, Params, Reply, Status

app = Milter("include_order", on_error=Status.REJECT)
greylist = Milter("greylist")
archive = Milter("archive")


@app.on_start
def start() -> None:
    print("app starts")


@app.on_rcpt
def before(ctx: Context, recipient: Address, params: Params) -> Status:
    print("before", recipient)
    return Status.CONTINUE


@greylist.on_start
def open_greylist() -> None:
    print("greylist starts")


@greylist.on_rcpt
def delay(ctx: Context, recipient: Address, params: Params) -> Status | Reply:
    print("greylist", recipient)
    if recipient.matches("new@mta.example"):
        return Reply(450, "4.7.1", "come back in 5 minutes")
    return Status.CONTINUE


@greylist.on_stop
def close_greylist() -> None:
    print("greylist stops")


@archive.on_rcpt
def count(ctx: Context, recipient: Address, params: Params) -> None:
    print("archive", recipient)


@archive.on_eom
def keep_a_copy(ctx: EomContext) -> None:
    ctx.add_recipient("archive@mta.example")


app.include(greylist)
app.include(archive)


@app.on_rcpt
def after(ctx: Context, recipient: Address, params: Params) -> Status:
    print("after", recipient)
    return Status.CONTINUE


@app.on_eom
def last(ctx: EomContext) -> None:
    if str(ctx.sender).startswith("trouble@"):
        raise RuntimeError("the policy of the whole holds for its parts")


@app.on_stop
def stop() -> None:
    print("app stops")


if __name__ == "__main__":
    app.run(sys.argv[1])
