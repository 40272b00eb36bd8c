# SPDX-License-Identifier: GPL-3.0-or-later
"""A filter with one handler, at the end of a message, which knows what went before."""

import sys

from milter import EomContext, Milter

app = Milter("conversation")


@app.on_eom
def tell(ctx: EomContext) -> None:
    print(f"{ctx.hostname} at {ctx.address}, which calls itself {ctx.helo}, connection {ctx.id}")
    assert ctx.sender is not None
    print(f"from {ctx.sender} ({ctx.sender.raw})", *ctx.sender.params.raw)
    for recipient in ctx.recipients:
        print(f"to {recipient} ({recipient.raw})", *recipient.params.raw)


if __name__ == "__main__":
    app.run(sys.argv[1])
