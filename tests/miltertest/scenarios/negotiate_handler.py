# SPDX-License-Identifier: GPL-3.0-or-later
"""A filter that looks at what the MTA offers, and takes less of it."""

import logging
import sys

from milter import Actions, EomContext, Milter, NegotiateContext, ProtocolOptions, Stage

app = Milter("negotiate_handler", leading_space=True)


@app.on_negotiate
def choose(ctx: NegotiateContext) -> None:
    if Actions.ADD_HEADER not in ctx.offered_actions:
        raise RuntimeError("no use without header fields")
    print("skip" if ProtocolOptions.SKIP in ctx.offered_options else "no skip", ctx.leading_space)
    try:
        ctx.actions |= Actions.REQUEST_MACROS | Actions.QUARANTINE
    except ValueError as refusal:
        print(refusal)
    try:
        ctx.request_macros(Stage.CLOSE, ["i"])
    except ValueError as refusal:
        print(refusal)
    ctx.actions = Actions.ADD_HEADER
    ctx.leading_space = False


@app.on_eom
def mark(ctx: EomContext) -> None:
    ctx.add_header("X-Mark", "checked")


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s: %(message)s")
    app.run(sys.argv[1])
