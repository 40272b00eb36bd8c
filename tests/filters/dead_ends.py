# SPDX-License-Identifier: GPL-3.0-or-later
"""A filter with handlers at the stages that its arguments name: SOCKET [STAGE ...]."""

import sys
from typing import Any

from milter import Context, Milter, Status

app = Milter("dead_ends")


def reply(ctx: Context, *arguments: Any) -> Status:
    return Status.CONTINUE


for stage in sys.argv[2:]:
    getattr(app, f"on_{stage}")(reply)

app.run(sys.argv[1])
