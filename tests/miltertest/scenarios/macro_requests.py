# SPDX-License-Identifier: GPL-3.0-or-later
"""A filter that asks for macros besides those that the MTA sends anyway."""

import sys

from milter import Address, ClientAddress, Context, EomContext, Milter, NegotiateContext, Params, Stage, Status

app = Milter("macro_requests")


@app.on_negotiate
def ask(ctx: NegotiateContext) -> None:
    ctx.request_macros(Stage.RCPT, ["nrcpts"])
    ctx.request_macros(Stage.EOM, ["{msg_id}", "{second}"])


@app.on_connect(macros=["client_ptr", "{client_port}"])
def on_connect(ctx: Context, hostname: str, address: ClientAddress) -> Status:
    return Status.CONTINUE


@app.on_mail(macros=["{auth_authen}"])
def on_mail(ctx: Context, sender: Address, params: Params) -> Status:
    return Status.CONTINUE


@app.on_header(macros=["{at_header}"])
def on_header(ctx: Context, name: str, value: str) -> Status:
    return Status.CONTINUE


@app.on_body(macros=["{at_body}"])
def on_body(ctx: Context, chunk: bytes) -> Status:
    return Status.CONTINUE


@app.on_eoh(macros=["{at_eoh}"])
def on_eoh(ctx: Context) -> Status:
    return Status.CONTINUE


@app.on_eom(macros=["{first}"])
def on_eom(ctx: EomContext) -> Status:
    return Status.CONTINUE


if __name__ == "__main__":
    app.run(sys.argv[1])
