# SPDX-License-Identifier: GPL-3.0-or-later
"""Handles the stages that are named and no others: prints each, and lets everything pass.

python tests/mta/filters/some_stages.py SOCKET STAGE...
"""

import sys
from collections.abc import Callable

from milter import Context, Milter, Status


def printer(stage: str) -> Callable[..., Status]:
    def show(ctx: Context, *arguments: object) -> Status:
        print(stage, flush=True)
        return Status.CONTINUE

    return show


if __name__ == "__main__":
    socket, *stages = sys.argv[1:]
    app = Milter("some_stages")
    for stage in stages:
        getattr(app, f"on_{stage}")(printer(stage))
    app.run(socket)
