# SPDX-License-Identifier: GPL-3.0-or-later
"""A filter that prints each stage of a conversation, and lets everything pass."""

import sys

from milter import Address, ClientAddress, Context, EomContext, Milter, NegotiateContext, Params, Status

app = Milter("all_stages")


@app.on_start
def on_start() -> None:
    print("start")


@app.on_negotiate
def on_negotiate(ctx: NegotiateContext) -> None:
    print("negotiate")


@app.on_connect
def on_connect(ctx: Context, hostname: str, address: ClientAddress) -> Status:
    print("connect", hostname, address)
    return Status.CONTINUE


@app.on_helo
def on_helo(ctx: Context, name: str) -> Status:
    print("helo", name)
    return Status.CONTINUE


@app.on_mail
def on_mail(ctx: Context, sender: Address, params: Params) -> Status:
    print("mail", sender, sender.raw, dict(params))
    return Status.CONTINUE


@app.on_rcpt
def on_rcpt(ctx: Context, recipient: Address, params: Params) -> Status:
    print("rcpt", recipient, recipient.raw, dict(params))
    return Status.CONTINUE


@app.on_data
def on_data(ctx: Context) -> Status:
    print("data")
    return Status.CONTINUE


@app.on_header
def on_header(ctx: Context, name: str, value: str) -> Status:
    print("header", name, repr(value))
    return Status.CONTINUE


@app.on_eoh
def on_eoh(ctx: Context) -> Status:
    print("eoh")
    return Status.CONTINUE


@app.on_body
def on_body(ctx: Context, chunk: bytes) -> Status:
    print("body", chunk)
    return Status.CONTINUE


@app.on_eom
def on_eom(ctx: EomContext) -> Status:
    print("eom")
    return Status.CONTINUE


@app.on_unknown
def on_unknown(ctx: Context, command: str) -> Status:
    print("unknown", command)
    return Status.CONTINUE


@app.on_abort
def on_abort(ctx: Context) -> None:
    print("abort")


@app.on_close
def on_close(ctx: Context) -> None:
    print("close")


@app.on_stop
def on_stop() -> None:
    print("stop")


if __name__ == "__main__":
    app.run(sys.argv[1])
