# SPDX-License-Identifier: GPL-3.0-or-later
"""A filter whose handler starts a process, and prints which signals are blocked there: SOCKET."""

import subprocess
import sys

from milter import Context, Milter, Status

app = Milter("children")
SHOW = "import signal; print(sorted(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, []))))"


@app.on_helo
def start_a_process(ctx: Context, name: str) -> Status:
    output = subprocess.run([sys.executable, "-S", "-c", SHOW], capture_output=True, text=True, check=True).stdout
    print("blocked in the child:", output.strip(), flush=True)
    return Status.CONTINUE


app.run(sys.argv[1])
