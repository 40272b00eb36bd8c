# SPDX-License-Identifier: GPL-3.0-or-later
"""A filter with options from its command line: SOCKET [NAME=NUMBER ...]. It tells the size of each header."""

import sys

from milter import Context, Milter, Status
from milter.options import StartOptions

app = Milter("options")


@app.on_header
def tell_size(ctx: Context, name: str, value: str) -> Status:
    print(len(value), flush=True)
    return Status.CONTINUE


options: StartOptions = {}
for argument in sys.argv[2:]:
    name, _, number = argument.partition("=")
    options[name] = int(number)  # type: ignore[literal-required]
app.run(sys.argv[1], **options)
