# SPDX-License-Identifier: GPL-3.0-or-later
"""A filter with hooks: SOCKET [start|stop], the one that raises."""

import sys

from milter import Milter

app = Milter("hooks")
broken = sys.argv[2:]


@app.on_start
def start() -> None:
    print("start", flush=True)
    if "start" in broken:
        raise RuntimeError("the database is gone")


@app.on_stop
def stop() -> None:
    print("stop", flush=True)
    if "stop" in broken:
        raise RuntimeError("the database is gone")


app.run(sys.argv[1])
