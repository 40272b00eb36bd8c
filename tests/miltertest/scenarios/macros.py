# SPDX-License-Identifier: GPL-3.0-or-later
"""A filter that prints the MTA's macros at each stage."""

import sys

from milter import Context, EomContext, Milter, Params, Status

app = Milter("macros")

NAMES = ("j", "{client_name}", "{tls_version}", "{auth_authen}", "{rcpt_addr}", "i", "{mine}", "{absent}")


def show(stage: str, ctx: Context) -> Status:
    found = {name: ctx.macros.get(name) for name in NAMES}
    print(stage, *(f"{name}={value}" for name, value in found.items() if value is not None))
    return Status.CONTINUE


@app.on_connect
def on_connect(ctx: Context, hostname: str, address: object) -> Status:
    return show("connect", ctx)


@app.on_helo
def on_helo(ctx: Context, name: str) -> Status:
    return show("helo", ctx)


@app.on_mail
def on_mail(ctx: Context, sender: str, params: Params) -> Status:
    return show("mail", ctx)


@app.on_rcpt
def on_rcpt(ctx: Context, recipient: str, params: Params) -> Status:
    return show("rcpt", ctx)


@app.on_data
def on_data(ctx: Context) -> Status:
    return show("data", ctx)


@app.on_header
def on_header(ctx: Context, name: str, value: str) -> Status:
    return show("header", ctx)


@app.on_eoh
def on_eoh(ctx: Context) -> Status:
    return show("eoh", ctx)


@app.on_body
def on_body(ctx: Context, chunk: bytes) -> Status:
    return show("body", ctx)


@app.on_eom
def on_eom(ctx: EomContext) -> Status:
    macros = ctx.macros
    print("braces or none:", macros["i"], macros["{i}"], macros["client_name"], macros["{client_name}"])
    print("queue id:", ctx.queue_id)
    print("absent:", "{absent}" in macros, macros.get("absent", "default"))
    try:
        macros["{absent}"]
    except KeyError as missing:
        print("KeyError:", missing)
    try:
        macros["not a name"]
    except ValueError:
        print("ValueError")
    print("all that the library knows:", dict(macros))
    return show("eom", ctx)


if __name__ == "__main__":
    app.run(sys.argv[1])
