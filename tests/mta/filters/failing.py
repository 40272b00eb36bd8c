# SPDX-License-Identifier: GPL-3.0-or-later
"""Has one handler, which raises for whoever is called poison, be it the client or the sender.

    python tests/mta/filters/failing.py SOCKET STAGE KIND [POLICY]

KIND is ``judge``, a handler that may reply, or ``observe``, one that promises not to; POLICY ``tempfail`` or
``shutdown``.
"""

import sys
from typing import Literal

from milter import Context, Milter, Status


def judge(ctx: Context, *arguments: object) -> Status:
    if any("poison" in (name or "") for name in (ctx.hostname, ctx.helo, ctx.sender)):
        raise RuntimeError("poisoned")
    return Status.CONTINUE


def observe(ctx: Context, *arguments: object) -> None:
    judge(ctx)


if __name__ == "__main__":
    socket, stage, kind, *policy = sys.argv[1:]
    on_error: Status | Literal["shutdown"] = "shutdown" if policy == ["shutdown"] else Status.TEMPFAIL
    app = Milter("failing", on_error=on_error)
    getattr(app, f"on_{stage}")({"judge": judge, "observe": observe}[kind])
    app.run(socket)
