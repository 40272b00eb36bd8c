# SPDX-License-Identifier: GPL-3.0-or-later
"""A filter that tells where the messages lie that it gets whole: in memory, or in a file.

python spool.py SOCKET SPOOL_SIZE
"""

import contextlib
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from milter import EomContext, Message, Milter

socket, spool_size = sys.argv[1:]
spool_directory = TemporaryDirectory()
app = Milter("spool", spool_size=int(spool_size), spool_directory=spool_directory.name)


def spool_files() -> int:
    """How many files of the directory are open; they have no names."""
    targets = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # another thread has closed it meanwhile
            targets.append(os.readlink(link))
    return sum(target.startswith(spool_directory.name) for target in targets)


@app.on_message
def look(ctx: EomContext, message: Message) -> None:
    number, size = message.headers["X-Number"], message.size
    files = spool_files()
    with message.open() as file:
        content = file.read()
    assert content == message.as_bytes()
    whole = content == f"X-Number: {number}\r\n\r\n".encode().ljust(size, number.encode())
    print(f"message {number}: {size} bytes,", "whole," if whole else "damaged,", f"in {files} files")
    assert os.listdir(spool_directory.name) == []


if __name__ == "__main__":
    with spool_directory:
        app.run(socket)
