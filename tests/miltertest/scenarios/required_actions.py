# SPDX-License-Identifier: GPL-3.0-or-later
"""A filter that is of no use where it cannot put messages into quarantine."""

import logging
import sys

from milter import Actions, Context, EomContext, Milter

app = Milter("required_actions", requires=Actions.QUARANTINE | Actions.REPLACE_BODY)


@app.on_eom
def put_aside(ctx: EomContext) -> None:
    ctx.quarantine("each message")


@app.on_close
def close(ctx: Context) -> None:
    print("close", ctx.hostname)


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s: %(message)s")
    app.run(sys.argv[1])
