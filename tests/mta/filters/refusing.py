# SPDX-License-Identifier: GPL-3.0-or-later
"""Refuses what a client asks to be refused, and prints a line of JSON for each record of the access log.

python tests/mta/filters/refusing.py SOCKET

The sender ``mail@…`` is refused at MAIL, ``eom@…`` at the end, and so on; ``accept@…`` is accepted at MAIL. The
recipients ``no@…`` and ``later@…`` are refused, for good and for now. ``u10a-41@…`` is refused with a text in which
the characters of these numbers stand.
"""

import json
import logging
import os
import sys
from typing import Any

from milter import Context, EomContext, Milter, Params, Reply, Status

TEXT = "A{}250 2.1.5 fine"

app = Milter("refusing")


class Printed(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        os.write(1, f"{json.dumps(vars(record)['milter'])}\n".encode())


def refusal(ctx: Context, stage: str) -> Reply | None:
    return Reply(554, "5.7.1", f"no {stage}") if (ctx.sender or "").startswith(f"{stage}@") else None


@app.on_mail
def mail(ctx: Context, sender: str, params: Params) -> Status | Reply | None:
    return Status.ACCEPT if sender.startswith("accept@") else refusal(ctx, "mail")


@app.on_rcpt
def rcpt(ctx: Context, recipient: str, params: Params) -> Reply | None:
    local = recipient.partition("@")[0]
    if local.startswith("u"):
        characters = "".join(chr(int(number, 16)) for number in local[1:].split("-"))
        return Reply(551, "5.7.1", TEXT.format(characters))
    return {"no": Reply(550, "5.7.1", "not for you"), "later": Reply(451, "4.7.1", "not yet")}.get(local)


@app.on_data
def data(ctx: Context) -> Reply | None:
    return refusal(ctx, "data")


@app.on_header
def header(ctx: Context, name: str, value: str) -> Reply | None:
    return refusal(ctx, "header")


@app.on_eoh
def eoh(ctx: Context) -> Reply | None:
    return refusal(ctx, "eoh")


@app.on_body
def body(ctx: Context, chunk: bytes) -> Reply | None:
    return refusal(ctx, "body")


@app.on_eom
def eom(ctx: EomContext) -> Reply | None:
    return refusal(ctx, "eom")


@app.on_connect
def connect(ctx: Context, hostname: str, address: Any) -> None:
    os.write(1, f"{json.dumps(['connect', hostname, address and str(address.host)])}\n".encode())


if __name__ == "__main__":
    logging.getLogger("milter.access").addHandler(Printed())
    app.run(sys.argv[1], access_log=True)
