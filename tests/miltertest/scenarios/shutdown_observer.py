# SPDX-License-Identifier: GPL-3.0-or-later
"""A filter that stops when its observer raises, and clears up."""

import logging
import sys

from milter import Context, HandlerError, Milter

app = Milter("shutdown_observer", on_error="shutdown")


@app.on_header
def look(ctx: Context, name: str, value: str) -> None:
    if name == "X-Trouble":
        raise RuntimeError(value)


@app.on_close
def close(ctx: Context) -> None:
    print("close")


@app.on_stop
def stop() -> None:
    print("stop")


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        app.run(sys.argv[1])
    except HandlerError as failure:
        print(failure)
        print(repr(failure.__cause__))
        sys.exit(3)
