# SPDX-License-Identifier: GPL-3.0-or-later
"""A filter that ends itself: SOCKET stop asks for the stop, SOCKET break takes the socket from libmilter."""

import os
import sys

from milter import ClientAddress, Context, Milter, Status
from milter.libmilter import libmilter

app = Milter("ends_itself")


@app.on_connect
def end(ctx: Context, hostname: str, address: ClientAddress) -> Status:
    if sys.argv[2] == "stop":
        app.stop()
    else:
        os.close(libmilter._descriptor)
    return Status.CONTINUE


app.run(sys.argv[1])
