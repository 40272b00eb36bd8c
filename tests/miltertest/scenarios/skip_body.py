# SPDX-License-Identifier: GPL-3.0-or-later
"""A filter with two handlers that need only the beginning of a body, of different lengths."""

import sys
from dataclasses import dataclass, field

from milter import Context, EomContext, Milter, Status


@dataclass
class Beginnings:
    first: list[bytes] = field(default_factory=list)
    second: list[bytes] = field(default_factory=list)


app = Milter("skip_body", transaction=Beginnings)


@app.on_body
def need_one(ctx: Context[object, Beginnings], chunk: bytes) -> Status:
    ctx.transaction.first.append(chunk)
    return Status.SKIP


@app.on_body
def need_two(ctx: Context[object, Beginnings], chunk: bytes) -> Status:
    ctx.transaction.second.append(chunk)
    return Status.SKIP if len(ctx.transaction.second) == 2 else Status.CONTINUE


@app.on_eom
def tell(ctx: EomContext[object, Beginnings]) -> None:
    print(ctx.transaction.first, ctx.transaction.second)


if __name__ == "__main__":
    app.run(sys.argv[1])
