# SPDX-License-Identifier: GPL-3.0-or-later
"""A filter that is told to stop in the middle of a message."""

import logging
import os
import signal
import sys
import threading

from milter import Address, Context, EomContext, Milter, Params, Status

app = Milter("drain")
draining = threading.Event()


class Watcher(logging.Handler):
    """Notices when the filter tells the log that it waits for open connections."""

    def emit(self, record: logging.LogRecord) -> None:
        if "waiting" in record.getMessage():
            draining.set()


@app.on_mail
def stop_soon(ctx: Context, sender: Address, params: Params) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@app.on_rcpt
def look_around(ctx: Context, recipient: Address, params: Params) -> Status:
    print("draining:", draining.wait(20))
    return Status.CONTINUE


@app.on_eom
def mark(ctx: EomContext) -> None:
    ctx.add_header("X-Mark", "checked")
    print("end")


@app.on_close
def close(ctx: Context) -> None:
    print("close")


@app.on_stop
def stop() -> None:
    print("stop")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, handlers=[Watcher()])
    app.run(sys.argv[1])
    print("run() returned")
