# SPDX-License-Identifier: GPL-3.0-or-later
"""A filter that stops when one of its handlers raises: ``on_error="shutdown"``."""

import logging
import sys

from milter import Address, Context, Milter, Params, Status

app = Milter("callback_panic", on_error="shutdown")


@app.on_mail
def begin(ctx: Context, sender: Address, params: Params) -> Status:
    if sender.matches("second@client.example"):
        raise RuntimeError("no second message, please")
    return Status.CONTINUE


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s: %(message)s")
    app.run(sys.argv[1])
    print("run() returned, where it should have raised")
