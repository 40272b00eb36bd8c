# SPDX-License-Identifier: GPL-3.0-or-later
"""A filter that observes one stage, and fails the first time. Nobody waits for its reply there."""

import logging
import sys

from milter import Context, Milter

app = Milter("raising_observers")
socket, stage = sys.argv[1:]
failures = iter([LookupError("the database is gone")])


def observe(ctx: Context, *arguments: object) -> None:
    for failure in failures:
        raise failure


getattr(app, f"on_{stage}")(observe)

if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s: %(message)s")
    app.run(socket)
