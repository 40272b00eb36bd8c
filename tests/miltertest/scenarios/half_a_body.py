# SPDX-License-Identifier: GPL-3.0-or-later
"""A filter that lets messages pass when it fails, and fails in the middle of a new body."""

import logging
import sys
from collections.abc import Iterator

from milter import EomContext, Milter, Status

app = Milter("half_a_body", on_error=Status.ACCEPT)


def interrupted() -> Iterator[bytes]:
    yield b"first\r\n"
    raise OSError("the rest cannot be read")


@app.on_eom
def replace(ctx: EomContext) -> None:
    if str(ctx.sender).startswith("body@"):
        ctx.replace_body(interrupted())
    raise RuntimeError("failed before anything was changed")


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s: %(message)s")
    app.run(sys.argv[1])
