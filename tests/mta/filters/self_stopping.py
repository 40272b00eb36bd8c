# SPDX-License-Identifier: GPL-3.0-or-later
"""Is told to stop at the end of each message, by a signal that reaches the thread of the handler.

    python tests/mta/filters/self_stopping.py SOCKET

The system may give a signal for the process to any thread that does not block it.
"""

import os
import signal
import sys
import threading

from milter import EomContext, Milter, Status

app = Milter("self_stopping")


@app.on_eom
def stop(ctx: EomContext) -> Status:
    if signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, []):
        os.kill(os.getpid(), signal.SIGTERM)
    else:
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
    ctx.add_header("X-Stopped", "yes")
    return Status.CONTINUE


if __name__ == "__main__":
    app.run(sys.argv[1])
