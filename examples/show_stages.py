# SPDX-License-Identifier: GPL-3.0-or-later
"""Print every stage of a conversation, its arguments and its macros: ``milter inspect`` in short.

python examples/show_stages.py inet:3000@localhost
"""

import sys

from milter import Address, ClientAddress, Context, EomContext, Milter, NegotiateContext, Params, Stage, Status

app = Milter("show_stages")


def show(ctx: Context, stage: str, *arguments: object) -> Status:
    print(f"[{ctx.id}] {stage:<10}", *map(ascii, arguments), dict(ctx.macros), flush=True)
    return Status.CONTINUE


@app.on_negotiate
def on_negotiate(ctx: NegotiateContext) -> None:
    ctx.request_macros(Stage.CONNECT, ["{client_addr}", "{client_port}"])
    print(f"[{ctx.id}] NEGOTIATE ", ctx.offered_actions, ctx.offered_options, flush=True)


@app.on_connect
def on_connect(ctx: Context, hostname: str, address: ClientAddress) -> Status:
    return show(ctx, "CONNECT", hostname, address)


@app.on_helo
def on_helo(ctx: Context, name: str) -> Status:
    return show(ctx, "HELO", name)


@app.on_mail
def on_mail(ctx: Context, sender: Address, params: Params) -> Status:
    return show(ctx, "MAIL", sender.raw, *params.raw)


@app.on_rcpt
def on_rcpt(ctx: Context, recipient: Address, params: Params) -> Status:
    return show(ctx, "RCPT", recipient.raw, *params.raw)


@app.on_data
def on_data(ctx: Context) -> Status:
    return show(ctx, "DATA")


@app.on_header
def on_header(ctx: Context, name: str, value: str) -> Status:
    return show(ctx, "HEADER", name, value)


@app.on_eoh
def on_eoh(ctx: Context) -> Status:
    return show(ctx, "EOH")


@app.on_body
def on_body(ctx: Context, chunk: bytes) -> Status:
    return show(ctx, "BODY", chunk)


@app.on_eom
def on_eom(ctx: EomContext) -> Status:
    return show(ctx, "EOM", ctx.sender, ctx.recipients)


@app.on_unknown
def on_unknown(ctx: Context, command: str) -> Status:
    return show(ctx, "UNKNOWN", command)


@app.on_abort
def on_abort(ctx: Context) -> None:
    show(ctx, "ABORT")


@app.on_close
def on_close(ctx: Context) -> None:
    show(ctx, "CLOSE")


if __name__ == "__main__":
    app.run(sys.argv[1])
