# SPDX-License-Identifier: GPL-3.0-or-later
"""Observes every stage, and prints what it sees; a sender "poison-STAGE@" makes it fail there.

    python tests/mta/filters/observing.py SOCKET

A line is an array in JSON: the stage and its arguments.
"""

import json
import sys
from collections.abc import Callable
from typing import Any

from milter import Context, Milter

app = Milter("observing")


def observer(stage: str) -> Callable[..., None]:
    def observe(ctx: Context, *arguments: Any) -> None:
        shown = [argument.decode() if isinstance(argument, bytes) else str(argument) for argument in arguments]
        print(json.dumps([stage, *shown]), flush=True)
        if ctx.sender and ctx.sender.startswith(f"poison-{stage}@"):
            raise RuntimeError("poisoned")

    return observe


for stage in ("connect", "helo", "mail", "rcpt", "data", "header", "eoh", "body", "eom", "abort", "close"):
    getattr(app, f"on_{stage}")(observer(stage))

if __name__ == "__main__":
    app.run(sys.argv[1])
