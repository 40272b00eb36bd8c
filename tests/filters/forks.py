# SPDX-License-Identifier: GPL-3.0-or-later
"""A filter that forks while it serves, and whose child leaves by the same with-statement: SOCKET."""

import os
import signal
import sys

from milter import Milter, MilterError

app = Milter("forks")
with app.start(sys.argv[1]) as server:
    signal.signal(signal.SIGTERM, lambda number, frame: server.request_stop())
    child = os.fork()
    if child == 0:
        try:
            Milter("child").start("inet:0@127.0.0.1")
        except MilterError as failure:
            print("child says:", failure, flush=True)
        sys.exit(0)
    _, status = os.waitpid(child, 0)
    print("child ended with", os.waitstatus_to_exitcode(status), flush=True)
    server.wait()
