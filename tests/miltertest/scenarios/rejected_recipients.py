# SPDX-License-Identifier: GPL-3.0-or-later
"""A filter that counts who tries recipients that do not exist."""

import sys

from milter import Address, Context, EomContext, Milter, Params, Status

app = Milter("rejected_recipients", rejected_recipients=True)


@app.on_rcpt
def look(ctx: Context, recipient: Address, params: Params) -> Status:
    refused = ctx.macros.get("{rcpt_mailer}") == "error"
    print(recipient, ctx.macros.get("{rcpt_addr}") if refused else "is known")
    return Status.CONTINUE


@app.on_eom
def tell(ctx: EomContext) -> None:
    print("to", *ctx.recipients)


if __name__ == "__main__":
    app.run(sys.argv[1])
