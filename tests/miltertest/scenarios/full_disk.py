# SPDX-License-Identifier: GPL-3.0-or-later
"""A filter that gets messages whole, and has little room for those that do not fit in memory.

    python full_disk.py SOCKET CASE DIRECTORY

CASE ``limit`` allows no file over 100,000 bytes; ``gone`` takes DIRECTORY away while a sender "no-room@" sends his
message; with ``tmpfs`` there is a small file system at DIRECTORY.
"""

import logging
import resource
import sys
from pathlib import Path

from milter import Address, Context, EomContext, Message, Milter, Params, Status

socket, case, spool_directory = sys.argv[1:]
directory = Path(spool_directory)
app = Milter("full_disk", spool_size=1000, spool_directory=directory)


@app.on_mail
def prepare(ctx: Context, sender: Address, params: Params) -> Status:
    if case == "gone":
        if sender.local == "no-room":
            directory.rmdir()
        else:
            directory.mkdir(exist_ok=True)
    return Status.CONTINUE


@app.on_message
def look(ctx: EomContext, message: Message) -> None:
    whole = message.body == b"x" * len(message.body)
    print(message.sender, len(message.body), "bytes", "whole" if whole else "damaged")
    message.headers["X-Scanned"] = "clean"


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s: %(message)s")
    if case == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))  # Python ignores SIGXFSZ
    app.run(socket)
