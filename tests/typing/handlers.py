# SPDX-License-Identifier: GPL-3.0-or-later
"""Right and wrong handlers; read by mypy, never run. A comment says which error a line must have."""

from dataclasses import dataclass
from typing import reveal_type

from milter import (
    Address,
    ClientAddress,
    Context,
    EomContext,
    InetAddress,
    Milter,
    NegotiateContext,
    Params,
    Reply,
    Status,
)


@dataclass
class Session:
    count: int = 0


@dataclass
class Transaction:
    names: str = ""


plain = Milter("plain")
typed = Milter("typed", session=Session, transaction=Transaction)
with_session = Milter("with_session", session=Session, on_error=Status.REJECT)

reveal_type(plain)  # error: Revealed type is "milter.app.Milter[Any, Any]"
reveal_type(typed)  # error: Milter[tests.typing.handlers.Session, tests.typing.handlers.Transaction]
reveal_type(with_session)  # error: Milter[tests.typing.handlers.Session, Any]


# ---- Right


@plain.on_negotiate
def negotiate(ctx: NegotiateContext) -> None: ...


@plain.on_connect
def connect(ctx: Context, hostname: str, address: ClientAddress) -> Status:
    return Status.REJECT if isinstance(address, InetAddress) and address.ip.is_private else Status.CONTINUE


@plain.on_mail
def mail(ctx: Context, sender: Address, params: Params) -> Reply:
    return Reply(550, "5.7.1", f"{sender} {params.get('SIZE')}")


@plain.on_rcpt(macros=["{auth_authen}"])
def rcpt(ctx: Context, recipient: str, params: Params) -> Status | Reply | None:
    return None


@plain.on_body
def body(ctx: Context, chunk: bytes) -> None: ...


@typed.on_eom
def eom(ctx: EomContext[Session, Transaction]) -> Status:
    ctx.session.count += 1
    ctx.add_header("X-Count", ctx.transaction.names)
    return Status.CONTINUE


@typed.on_data
def bare(ctx: Context) -> Status:
    return Status.CONTINUE


@plain.on_start
def start() -> None: ...


@plain.on_helo
async def later(ctx: Context, name: str) -> Status | Reply | None:
    return None


@plain.on_close
async def observes_later(ctx: Context) -> None: ...


@plain.on_stop
async def stop() -> None: ...


# ---- Wrong


@plain.on_helo  # error: Argument 1 to "__call__" of "Register" has incompatible type
def too_few(ctx: Context) -> Status:
    return Status.CONTINUE


@plain.on_helo  # error: Argument 1 to "__call__" of "Register" has incompatible type
def wrong_argument(ctx: Context, name: bytes) -> Status:
    return Status.CONTINUE


@plain.on_helo  # error: Argument 1 to "__call__" of "Register" has incompatible type
def wrong_result(ctx: Context, name: str) -> int:
    return 4


@plain.on_helo  # error: Argument 1 to "__call__" of "Register" has incompatible type
async def wrong_result_later(ctx: Context, name: str) -> int:
    return 4


@plain.on_negotiate  # error: Argument 1 to "__call__" of "Register" has incompatible type
async def negotiates_later(ctx: NegotiateContext) -> None: ...


@plain.on_abort  # error: Argument 1 to "__call__" of "Register" has incompatible type
def replies_to_abort(ctx: Context) -> Status:
    return Status.REJECT


@plain.on_mail  # error: Argument 1 to "__call__" of "Register" has incompatible type
def acts_too_early(ctx: EomContext, sender: Address, params: Params) -> Status:
    return Status.CONTINUE


@typed.on_data  # error: Argument 1 to "__call__" of "Register" has incompatible type
def wrong_state(ctx: Context[Transaction, Session]) -> Status:
    return Status.CONTINUE


@plain.on_rcpt(macros=["i"])  # error: has incompatible type
def wrong_with_options(ctx: Context, recipient: str) -> Status:
    return Status.CONTINUE


@plain.on_data
def misspells(ctx: Context) -> Status:
    ctx.add_header("A", "b")  # error: "Context[Any, Any]" has no attribute "add_header"
    return Status.CONTINU  # error: "type[Status]" has no attribute "CONTINU"


plain.run("inet:3000@localhost", wokers=2)  # error: Unexpected keyword argument "wokers"
plain.run("inet:3000@localhost", timeout="soon")  # error: has incompatible type "str"
Milter("wrong", on_error="explode")  # error: No overload variant
