# SPDX-License-Identifier: GPL-3.0-or-later
"""A filter that only looks, and counts, so that the MTA need not wait for it before the end of a message."""

import sys
from collections import Counter
from dataclasses import dataclass, field

from milter import Address, Context, EomContext, Milter, Params


@dataclass
class Seen:
    events: list[str] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)


app = Milter("observers", transaction=Seen)


@app.on_mail
def on_mail(ctx: Context[object, Seen], sender: Address, params: Params) -> None:
    ctx.transaction.events.append("mail")


@app.on_rcpt
def on_rcpt(ctx: Context[object, Seen], recipient: Address, params: Params) -> None:
    ctx.transaction.events.append(f"{recipient} {ctx.macros.get('rcpt_addr')}")


@app.on_data
def on_data(ctx: Context[object, Seen]) -> None:
    ctx.transaction.events.append("data")


@app.on_header
def on_header(ctx: Context[object, Seen], name: str, value: str) -> None:
    ctx.transaction.events.append("header")
    ctx.transaction.numbers.append(int(value.split()[0]))


@app.on_eoh
def on_eoh(ctx: Context[object, Seen]) -> None:
    ctx.transaction.events.append("eoh")


@app.on_body
def on_body(ctx: Context[object, Seen], chunk: bytes) -> None:
    ctx.transaction.events.append(f"{len(chunk)} bytes")


@app.on_eom
def on_eom(ctx: EomContext[object, Seen]) -> None:
    seen = ctx.transaction
    print(Counter(seen.events))
    print("in order:", seen.numbers == sorted(seen.numbers), [event for event in seen.events if event != "header"])


if __name__ == "__main__":
    app.run(sys.argv[1])
