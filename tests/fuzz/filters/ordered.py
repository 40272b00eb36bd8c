# SPDX-License-Identifier: GPL-3.0-or-later
"""A filter that uses every feature, and whose verdicts the mail itself orders, so that a client can predict them.

    python tests/fuzz/filters/ordered.py SOCKET replying|coroutines|observing

An order is a text like ``=rcpt.reject=``, at the stage that it names: in the name of the client, of HELO, in the
address and parameters, the header field, the piece of the body, the unknown command. Those of DATA, of the end of
the header and of the end of the message stand in the sender's address, the last also in header and body.

The end adds a field ``X-Digest`` of all that was seen of the message. What is logged and was not ordered is told on
standard output, as a line that begins with UNEXPECTED.
"""

import asyncio
import contextlib
import functools
import inspect
import logging
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

from milter import (
    ActionError,
    Actions,
    Address,
    ClientAddress,
    Context,
    EomContext,
    Message,
    Milter,
    NegotiateContext,
    Params,
    Reply,
    Stage,
    Status,
)


class Ordered(Exception):
    """What a handler raises on order."""


@dataclass
class Seen:
    """Of one message."""

    fields: list[tuple[str, str]] = field(default_factory=list)
    body: bytes = b""


@dataclass
class Client:
    """State of one session."""

    events: int = 0


KIND = sys.argv[2]
app: Milter[Client, Seen] = Milter(
    "ordered",
    session=Client,
    transaction=Seen,
    spool_size=2000,
    header_replies="each" if KIND == "coroutines" else "together",
    progress=0.002 if KIND == "coroutines" else 30.0,
)

_ORDER = re.compile(r"=(\w+)\.(\w+)=", re.ASCII)
_VERDICTS: dict[str, Status | Reply] = {
    "continue": Status.CONTINUE,
    "accept": Status.ACCEPT,
    "reject": Status.REJECT,
    "tempfail": Status.TEMPFAIL,
    "discard": Status.DISCARD,
    "skip": Status.SKIP,
    "reply4": Reply(451, "4.7.1", "not 100% sure"),
    "reply5": Reply(550, None, *("no" * 400 for _ in range(32))),
}


def order(stage: str, *texts: str) -> str:
    """The first order for this stage, or nothing."""
    for text in texts:
        for found in _ORDER.finditer(text):
            if found[1] == stage:
                return found[2]
    return ""


def verdict(stage: str, *texts: str) -> Status | Reply | None:
    given = order(stage, *texts)
    if given == "raise":
        raise Ordered(stage)
    return _VERDICTS.get(given)


def look(ctx: Context[Client, Seen]) -> None:
    """At everything there is."""
    ctx.session.events += 1
    _ = (ctx.id, ctx.hostname, ctx.address, ctx.helo, ctx.sender, ctx.recipients, dict(ctx.macros), ctx.queue_id)
    _ = (ctx.actions, ctx.options)


# ---- The stages: what each is told, and does ---------------------------------------------------


def on_connect(ctx: Context[Client, Seen], hostname: str, address: ClientAddress) -> Status | Reply | None:
    look(ctx)
    return verdict("connect", hostname)


def on_helo(ctx: Context[Client, Seen], name: str) -> Status | Reply | None:
    look(ctx)
    return verdict("helo", name)


def on_mail(ctx: Context[Client, Seen], sender: Address, params: Params) -> Status | Reply | None:
    look(ctx)
    ctx.transaction.fields = []
    return verdict("mail", sender.raw, *params.raw)


def on_rcpt(ctx: Context[Client, Seen], recipient: Address, params: Params) -> Status | Reply | None:
    look(ctx)
    return verdict("rcpt", recipient.raw, *params.raw)


def on_data(ctx: Context[Client, Seen]) -> Status | Reply | None:
    look(ctx)
    return verdict("data", sender_of(ctx))


def on_header(ctx: Context[Client, Seen], name: str, value: str) -> Status | Reply | None:
    ctx.transaction.fields.append((name, value))
    return verdict("header", name, value)


def on_eoh(ctx: Context[Client, Seen]) -> Status | Reply | None:
    look(ctx)
    return verdict("eoh", sender_of(ctx))


def on_body(ctx: Context[Client, Seen], chunk: bytes) -> Status | Reply | None:
    ctx.transaction.body += chunk
    return verdict("body", text(chunk))


def on_unknown(ctx: Context[Client, Seen], command: str) -> Status | Reply | None:
    look(ctx)
    return verdict("unknown", command)


def on_abort(ctx: Context[Client, Seen]) -> None:
    look(ctx)


def on_close(ctx: Context[Client, Seen]) -> None:
    look(ctx)


def on_negotiate(ctx: NegotiateContext) -> None:
    _ = (ctx.offered_actions, ctx.offered_options, repr(ctx.actions), repr(ctx.offered_options))
    ctx.request_macros(Stage.CONNECT, ["{client_ptr}"])


def on_message(ctx: EomContext[Client, Seen], message: Message) -> Status | Reply | None:
    look(ctx)
    raw = [(text(name), text(value)) for name, value in message.headers.raw]
    _ = (message.email().keys(), message.size, repr(message))
    with message.open() as file:
        if file.read() != message.as_bytes():
            unexpected("the file of a message differs from its bytes")
    return at_the_end(ctx, raw, message.body, message)


def on_eom(ctx: EomContext[Client, Seen]) -> Status | Reply | None:
    return at_the_end(ctx, ctx.transaction.fields, ctx.transaction.body, None)


# ---- The end of a message ------------------------------------------------------------------------


def at_the_end(
    ctx: EomContext[Client, Seen], fields: list[tuple[str, str]], body: bytes, message: Message | None
) -> Status | Reply | None:
    given = order("eom", sender_of(ctx), *(part for entry in fields for part in entry), text(body))
    answer = verdict("eom", f"=eom.{given}=")
    if given == "act":
        act(ctx)
    elif given == "half":
        ctx.replace_body(half_a_body())
    elif given == "edit" and message is not None:
        edit(message)
    if Actions.ADD_HEADER in ctx.actions:
        mark(ctx, message, digest(ctx, fields, body))
    if given == "progress":
        for _ in range(3):
            ctx.signal_progress()
    return answer


def digest(ctx: EomContext[Client, Seen], fields: list[tuple[str, str]], body: bytes) -> str:
    envelope = [sender_of(ctx), *(recipient.raw for recipient in ctx.recipients)]
    parts = [*map(data, envelope), *(data(part) for entry in fields for part in entry), body]
    return sha256(b"".join(b"%d:%b" % (len(part), part) for part in parts)).hexdigest()


def mark(ctx: EomContext[Client, Seen], message: Message | None, value: str) -> None:
    if message is not None:
        message.headers.add("X-Digest", value)
    else:
        ctx.add_header("X-Digest", value)


def act(ctx: EomContext[Client, Seen]) -> None:
    """Each action there is. Where one was not granted, this raises."""
    ctx.replace_sender("<new@filter.example>")
    ctx.replace_sender("new@filter.example", "RET=HDRS")
    ctx.add_recipient("added@filter.example")
    ctx.add_recipient("added2@filter.example", "NOTIFY=NEVER")
    for recipient in ctx.recipients:
        with contextlib.suppress(ValueError):  # of a form that no MTA lets through
            ctx.remove_recipient(recipient)
    ctx.insert_header(1, "X-Inserted", "folded\n\tvalue")
    ctx.replace_header("Subject", 1, None)
    ctx.quarantine("on order")
    ctx.append_body_chunk(b"new\r\n" * 20000)
    ctx.append_body_chunk(b"")


def edit(message: Message) -> None:
    """Each edit there is. Where one needs an action that was not granted, the message is refused."""
    message.headers["Subject"] = "edited"
    message.headers.insert(0, "X-Top", "inserted")
    if "X-Remove" in message.headers:
        del message.headers["X-Remove"]
    message.sender = "new@filter.example"
    message.recipients.add("added@filter.example")
    message.body = b"edited\r\n"


def half_a_body() -> Iterator[bytes]:
    yield b"half"
    raise Ordered("half a body")


def sender_of(ctx: Context[Client, Seen]) -> str:
    return ctx.sender.raw if ctx.sender is not None else ""


def data(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


# ---- The log: what nobody has ordered is told ------------------------------------------------------

_OF_A_BROKEN_MTA = re.compile(
    r"ordered: st_optionneg\[\d+\]: (len too short|protocol version too old|xxfi_negotiate returned|.*does not fulfill)"
    r"|ordered: connect\[\d+\]: (wrong len|inet_aton failed|mi_inet_pton failed|path too long|unknown family)"
    r"|ordered[:,] mi_rd_cmd: read returned -1: Connection reset by peer"
)
_ORDERED = ("means nothing in", "is annotated '-> None' and returned")


def unexpected(what: str) -> None:
    sys.stdout.write("".join(f"UNEXPECTED {line}\n" for line in what.splitlines()))
    sys.stdout.flush()


class Watch(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        failure = record.exc_info[1] if record.exc_info else None
        if failure is not None and not was_ordered(failure):
            unexpected("".join([record.getMessage(), "\n", *traceback.format_exception(failure)]))
        elif record.name == "milter.access":
            line = record.getMessage()
            if not (line.isascii() and line.isprintable() and re.fullmatch(r'(\w+=([^" ]|"([^"\\]|\\.)*")* ?)+', line)):
                unexpected(f"a line of the access log: {line!r}")
        elif record.name == "milter.libmilter":
            if not _OF_A_BROKEN_MTA.match(record.getMessage()):
                unexpected(record.getMessage())
        elif record.levelno >= logging.WARNING and failure is None:
            unexpected(record.getMessage())


def was_ordered(failure: BaseException) -> bool:
    return isinstance(failure, Ordered | ActionError) or any(known in str(failure) for known in _ORDERED)


@app.on_start
def watch() -> None:
    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
    root.addHandler(Watch())


# ---- The three kinds -------------------------------------------------------------------------------


def waiting(handler: Callable[..., Any]) -> Callable[..., Any]:
    """The same as a coroutine, which others overtake."""

    @functools.wraps(handler)
    async def wait(ctx: Any, *arguments: Any) -> Any:
        await asyncio.sleep(0)
        if isinstance(ctx, EomContext) and ctx.id % 4 == 0:
            await asyncio.sleep(0.005)  # the library shows progress meanwhile
        return handler(ctx, *arguments)

    return wait


def observing(handler: Callable[..., Any]) -> Callable[..., Any]:
    """The same with the promise never to reply. It breaks it when it is ordered to give a verdict."""

    @functools.wraps(handler)
    def observe(*arguments: Any) -> Any:
        return handler(*arguments)

    observe.__signature__ = inspect.signature(handler).replace(return_annotation=None)  # type: ignore[attr-defined]
    return observe


def register() -> None:
    form: Callable[[Callable[..., Any]], Callable[..., Any]] = {
        "replying": lambda handler: handler,
        "coroutines": waiting,
        "observing": observing,
    }[KIND]
    for handler in (on_connect, on_helo, on_mail, on_rcpt, on_data, on_header, on_eoh, on_body):
        getattr(app, handler.__name__)(form(handler))
    always = (lambda handler: handler) if KIND == "observing" else form
    app.on_unknown(always(on_unknown))
    app.on_abort(always(on_abort))
    app.on_close(always(on_close))
    if KIND == "observing":
        app.on_eom(on_eom)
    else:
        app.on_message(always(on_message))
    if KIND == "replying":
        app.on_negotiate(on_negotiate)


register()

if __name__ == "__main__":
    app.run(sys.argv[1], access_log=True)
