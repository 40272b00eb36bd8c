# SPDX-License-Identifier: GPL-3.0-or-later
"""A filter whose handler of one stage raises, the first time that it is called."""

import logging
import sys

from milter import Context, Milter, Status

app = Milter("raising")
socket, stage = sys.argv[1:]
failures = iter([LookupError("the database is gone")])


def look_up(ctx: Context, *arguments: object) -> Status:
    for failure in failures:
        raise failure
    return Status.CONTINUE


getattr(app, f"on_{stage}")(look_up)

if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s: %(message)s")
    app.run(socket)
