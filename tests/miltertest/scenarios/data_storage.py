# SPDX-License-Identifier: GPL-3.0-or-later
"""A filter that carries data from stage to stage, of the session and of each message."""

import sys
from dataclasses import dataclass, field

from milter import Address, ClientAddress, Context, EomContext, Milter, Params, Status


@dataclass
class Visit:
    client: str = ""
    messages: int = 0


@dataclass
class Mail:
    sizes: list[int] = field(default_factory=list)
    recipients: list[str] = field(default_factory=list)


app = Milter("data_storage", session=Visit, transaction=Mail)


@app.on_connect
def remember_client(ctx: Context[Visit, Mail], hostname: str, address: ClientAddress) -> Status:
    ctx.session.client = hostname
    return Status.CONTINUE


@app.on_mail
def begin(ctx: Context[Visit, Mail], sender: Address, params: Params) -> Status:
    ctx.session.messages += 1
    return Status.CONTINUE


@app.on_rcpt
def collect(ctx: Context[Visit, Mail], recipient: Address, params: Params) -> Status:
    ctx.transaction.recipients.append(recipient)
    return Status.REJECT if recipient.local == "nobody" else Status.CONTINUE


@app.on_body
def measure(ctx: Context[Visit, Mail], chunk: bytes) -> None:
    ctx.transaction.sizes.append(len(chunk))


@app.on_eom
def tell(ctx: EomContext[Visit, Mail]) -> None:
    print(ctx.session, ctx.transaction)


@app.on_abort
def given_up(ctx: Context[Visit, Mail]) -> None:
    print("given up:", ctx.session, ctx.transaction)


@app.on_close
def leave(ctx: Context[Visit, Mail]) -> None:
    print("good bye,", ctx.session)


if __name__ == "__main__":
    app.run(sys.argv[1])
