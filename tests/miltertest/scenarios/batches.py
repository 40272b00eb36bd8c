# SPDX-License-Identifier: GPL-3.0-or-later
"""A filter that observes nearly everything; it fails at senders and header fields that are bad."""

import logging
import sys

from milter import Address, Context, EomContext, Milter, Params, Status

app = Milter("batches")


def note(ctx: Context, *words: object) -> None:
    print(ctx.helo, *words)


def refuse_bad(text: str) -> None:
    if text.startswith("bad"):
        raise ValueError(text)


@app.on_connect
def connect(ctx: Context, hostname: str, address: object) -> None:
    note(ctx, "connect", hostname)


@app.on_helo
def helo(ctx: Context, name: str) -> None:
    note(ctx, "helo")


@app.on_mail
def mail(ctx: Context, sender: Address, params: Params) -> None:
    note(ctx, "mail", sender)
    refuse_bad(sender)


@app.on_rcpt
def rcpt(ctx: Context, recipient: Address, params: Params) -> None:
    note(ctx, "rcpt", recipient, "of", ctx.sender, ctx.macros.get("rcpt_mailer"))


@app.on_header
def header(ctx: Context, name: str, value: str) -> None:
    note(ctx, "header", name, value)
    refuse_bad(value)


@app.on_eoh
def eoh(ctx: Context) -> None:
    note(ctx, "eoh")


@app.on_body
def body(ctx: Context, chunk: bytes) -> None:
    note(ctx, "body", len(chunk), "bytes:", chunk[:8].decode())


@app.on_unknown
def unknown(ctx: Context, command: str) -> Status:
    note(ctx, "unknown", command)
    return Status.CONTINUE


@app.on_eom
def eom(ctx: EomContext) -> Status:
    note(ctx, "eom", *ctx.recipients)
    return Status.ACCEPT


@app.on_abort
def abort(ctx: Context) -> None:
    note(ctx, "abort", ctx.sender)


@app.on_close
def close(ctx: Context) -> None:
    note(ctx, "close")


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s: %(message)s")
    app.run(sys.argv[1])
