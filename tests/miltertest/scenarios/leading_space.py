# SPDX-License-Identifier: GPL-3.0-or-later
"""A filter that signs messages must see header fields byte for byte."""

import sys

from milter import Context, EomContext, Milter, ProtocolOptions

app = Milter("leading_space", leading_space=True)


@app.on_header
def look(ctx: Context, name: str, value: str) -> None:
    print(name, repr(value), ProtocolOptions.LEADING_SPACE in ctx.options)


@app.on_eom
def sign(ctx: EomContext) -> None:
    ctx.add_header("X-Signature", " one space" if ProtocolOptions.LEADING_SPACE in ctx.options else "no space")


if __name__ == "__main__":
    app.run(sys.argv[1])
