# SPDX-License-Identifier: GPL-3.0-or-later
"""The filter with this library, replying at each stage: ``milter_replying.py [each] SOCKET``.

``each``: to each header field by itself, and not to all of them at the end of the header.
"""

import sys
from dataclasses import dataclass

from milter import Address, ClientAddress, Context, EomContext, Milter, Params, Status


@dataclass
class Count:
    size: int = 0


app = Milter("benchmark", transaction=Count, header_replies="each" if "each" in sys.argv else "together")


@app.on_connect
def connect(ctx: Context[object, Count], hostname: str, address: ClientAddress) -> Status:
    return Status.CONTINUE


@app.on_helo
def helo(ctx: Context[object, Count], name: str) -> Status:
    return Status.CONTINUE


@app.on_mail
def mail(ctx: Context[object, Count], sender: Address, params: Params) -> Status:
    return Status.CONTINUE


@app.on_rcpt
def rcpt(ctx: Context[object, Count], recipient: Address, params: Params) -> Status:
    return Status.CONTINUE


@app.on_data
def data(ctx: Context[object, Count]) -> Status:
    return Status.CONTINUE


@app.on_header
def header(ctx: Context[object, Count], name: str, value: str) -> Status:
    ctx.transaction.size += len(value if value.isascii() else value.encode("utf-8", "surrogateescape"))
    return Status.CONTINUE


@app.on_eoh
def eoh(ctx: Context[object, Count]) -> Status:
    return Status.CONTINUE


@app.on_body
def body(ctx: Context[object, Count], chunk: bytes) -> Status:
    ctx.transaction.size += len(chunk)
    return Status.CONTINUE


@app.on_eom
def eom(ctx: EomContext[object, Count]) -> Status:
    ctx.add_header("X-Sum", str(ctx.transaction.size))
    return Status.CONTINUE


if __name__ == "__main__":
    app.run(sys.argv[-1])
