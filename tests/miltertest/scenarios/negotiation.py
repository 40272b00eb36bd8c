# SPDX-License-Identifier: GPL-3.0-or-later
"""A filter that lets everything pass, with handlers for the stages that are named when it is started.

``rcpt`` is a handler that may reply, ``rcpt:None`` one that only observes.
"""

import sys

from milter import Context, Milter, Status

app = Milter("negotiation")
socket, _case, *handlers = sys.argv[1:]


def judge(ctx: Context, *arguments: object) -> Status:
    return Status.CONTINUE


def observe(ctx: Context, *arguments: object) -> None:
    pass


def unannotated(ctx, *arguments):  # type: ignore[no-untyped-def]
    pass


KINDS = {"": judge, "None": observe, "?": unannotated}

for handler in handlers:
    stage, _, kind = handler.partition(":")
    getattr(app, f"on_{stage}")(KINDS[kind])

if __name__ == "__main__":
    app.run(socket)
