# SPDX-License-Identifier: GPL-3.0-or-later
"""Refuse some recipients, mark what passes, and replace a body: the three things that filters do.

    python examples/guard.py inet:3000@localhost

- Mail for ``@internal.example`` is taken from authenticated clients only.
- Messages with the subject ``forbidden`` are refused.
- What passes gets a header field; a body that says only ``ping`` is answered ``pong``.
"""

import sys
from dataclasses import dataclass, field

from milter import Address, Context, EomContext, Milter, Params, Reply, Status


@dataclass
class Seen:
    body: bytearray = field(default_factory=bytearray)


app = Milter("guard", transaction=Seen)


@app.on_rcpt
def no_strangers(ctx: Context[object, Seen], recipient: Address, params: Params) -> Status | Reply:
    if not ctx.login and (recipient.matches("internal.example") or not recipient.complete):
        return Reply(550, "5.7.1", "internal addresses are not for you, we are 100% sure")
    return Status.CONTINUE


@app.on_header
def no_forbidden_subjects(ctx: Context[object, Seen], name: str, value: str) -> Status | Reply:
    if name.lower() == "subject" and value.strip() == "forbidden":
        return Reply(554, "5.7.1", "this subject is forbidden", "choose another one")
    return Status.CONTINUE


@app.on_body
def collect(ctx: Context[object, Seen], chunk: bytes) -> None:
    ctx.transaction.body += chunk


@app.on_eom
def mark(ctx: EomContext[object, Seen]) -> Status:
    ctx.add_header("X-Guard", "passed")
    if bytes(ctx.transaction.body).strip() == b"ping":
        ctx.replace_body(b"pong\r\n")
    return Status.CONTINUE


if __name__ == "__main__":
    app.run(sys.argv[1])
