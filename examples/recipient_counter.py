# SPDX-License-Identifier: GPL-3.0-or-later
"""Count the recipients of each message, and tell in a header field how many there were.

    python examples/recipient_counter.py inet:3000@localhost

State of one's own: ``ctx.transaction`` is a new Counter for each message, ``ctx.session`` a new
Totals for each SMTP session; both are thrown away by the library.
"""

import sys
from dataclasses import dataclass

from milter import Address, Context, EomContext, Milter, Params, Status


@dataclass
class Counter:
    recipients: int = 0


@dataclass
class Totals:
    messages: int = 0


app = Milter("recipient_counter", session=Totals, transaction=Counter)


@app.on_rcpt
def count(ctx: Context[Totals, Counter], recipient: Address, params: Params) -> Status:
    ctx.transaction.recipients += 1
    return Status.CONTINUE


@app.on_eom
def tell(ctx: EomContext[Totals, Counter]) -> Status:
    ctx.session.messages += 1
    ctx.add_header("X-Recipient-Count", str(ctx.transaction.recipients))
    print(f"message {ctx.session.messages} of {ctx.hostname}: {ctx.transaction.recipients} recipients", flush=True)
    return Status.CONTINUE


if __name__ == "__main__":
    app.run(sys.argv[1])
