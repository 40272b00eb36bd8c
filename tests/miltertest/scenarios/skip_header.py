# SPDX-License-Identifier: GPL-3.0-or-later
"""A filter with a handler that needs only one header field, and one that wants them all."""

import sys

from milter import Context, EomContext, Milter, Status

app = Milter("skip_header")


@app.on_header
def find_subject(ctx: Context, name: str, value: str) -> Status:
    print("looking at", name)
    return Status.SKIP if name.lower() == "subject" else Status.CONTINUE


@app.on_header
def read_all(ctx: Context, name: str, value: str) -> Status:
    print("reading", name)
    return Status.CONTINUE


@app.on_eom
def end(ctx: EomContext) -> None:
    print("end")


if __name__ == "__main__":
    app.run(sys.argv[1])
