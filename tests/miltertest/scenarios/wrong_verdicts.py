# SPDX-License-Identifier: GPL-3.0-or-later
"""A filter that makes each mistake there is in what a handler returns. Type checkers would find most of them."""

import logging
import sys

from milter import Address, ClientAddress, Context, EomContext, Milter, Params, Reply, Status, Verdict

app = Milter("wrong_verdicts", on_error=Reply(451, "4.3.5", "the filter is wrong"))

MISTAKES = {
    "int": 0,
    "bool": True,
    "str": "REJECT",
    "tuple": ("550", "5.7.1", "text"),
    "class": Status,
    "skip": Status.SKIP,
}


@app.on_connect
def on_connect(ctx: Context, hostname: str, address: ClientAddress) -> Status:
    return Status.DISCARD if hostname == "discard.example" else Status.CONTINUE


@app.on_helo
def on_helo(ctx: Context, name: str) -> Status:
    return Status.SKIP if name == "skip.example" else Status.CONTINUE


@app.on_mail
def on_mail(ctx: Context, sender: Address, params: Params) -> Verdict:
    return MISTAKES.get(sender)  # type: ignore[return-value]


@app.on_unknown
def on_unknown(ctx: Context, command: str) -> Status:
    return Status[command]


@app.on_data
def on_data(ctx: Context) -> None:
    return Status.REJECT  # type: ignore[return-value]


@app.on_eom
def on_eom(ctx: EomContext) -> Status:
    return Status.SKIP


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s: %(message)s")
    app.run(sys.argv[1])
