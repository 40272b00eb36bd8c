# SPDX-License-Identifier: GPL-3.0-or-later
"""Many connections at once, in all that Python does for them: nothing of one is seen by another, and all is counted.

Each client names what it sends by a tag of its own, and each handler compares what it is told with the tag. So a
message that gets anything of another one is refused, and the client sees that. Meanwhile other threads use contexts
that handlers have left behind. ``MILTER_STRESS_ROUNDS`` sets how many connections each client makes.

With the GIL threads change places as often as Python can; without it (a free-threaded Python) they run side by side.
"""

import os
import random
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import pytest

from milter import (
    ActionError,
    Address,
    Context,
    ContextError,
    EomContext,
    Message,
    Milter,
    Params,
    Reply,
    Status,
)
from milter.testing import AddHeader, Client, EndOfMessage, Verdict
from tests.conftest import Peer, Serve
from tests.test_metrics import messages, told

CLIENTS = 8
LATE_THREADS = 2
USES = 5
MESSAGES = 8
"""Of one connection."""
ROUNDS = int(os.environ.get("MILTER_STRESS_ROUNDS", "4"))
SPOOL_SIZE = 75_000
"""Bytes; half of a large message, so that it goes to a file, and is read from there."""


@pytest.fixture(autouse=True)
def restless() -> Iterator[None]:
    """With the GIL threads give way to each other often."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


# ---- The filter ------------------------------------------------------------------------------


@dataclass
class Session:
    messages: int = 0
    aborts: int = 0


@dataclass
class Transaction:
    seen: list[str] = field(default_factory=list)


class Left:
    """The contexts that handlers leave behind, for threads that use them late."""

    def __init__(self) -> None:
        self._contexts = SimpleQueue[Context[Any, Any] | None]()

    def leave(self, context: Context[Any, Any]) -> None:
        self._contexts.put(context)

    def end(self) -> None:
        """One of the threads that use them has nothing more to do."""
        self._contexts.put(None)

    def use(self) -> int:
        """The life of such a thread; how often it came too late. Else it is told the truth."""
        late = 0
        while context := self._contexts.get():
            for _ in range(USES):
                try:
                    sender = context.sender
                    assert sender is None or context.queue_id == f"Q{tag_of(sender)}"
                    if isinstance(context, EomContext):
                        context.signal_progress()
                except (ContextError, ActionError):
                    late += 1
        return late


def make_filter(left: Left) -> Milter[Session, Transaction]:
    """Handlers of each kind, that compare what they are told with the tag of their message."""
    app = Milter("threads", session=Session, transaction=Transaction, spool_size=SPOOL_SIZE, progress=0.001)

    @app.on_connect
    def connect(ctx: Context[Session, Transaction], hostname: str, address: object) -> None:
        ctx.session.messages = 0

    @app.on_mail(macros=["{auth_authen}"])
    def mail(ctx: Context[Session, Transaction], sender: Address, params: Params) -> Status | Reply:
        expect(ctx.transaction.seen == [])
        expect(ctx.macros["{auth_authen}"] == tag_of(sender))
        expect(ctx.session.messages + ctx.session.aborts == number_of(sender))
        ctx.transaction.seen.append("mail")
        left.leave(ctx)
        if sender.startswith("refused"):
            return Reply(550, "5.7.1", f"not {tag_of(sender)}")
        return Status.CONTINUE

    @app.on_rcpt
    def rcpt(ctx: Context[Session, Transaction], recipient: Address, params: Params) -> Status | Reply:
        expect(ctx.sender is not None and tag_of(ctx.sender) == tag_of(recipient))
        ctx.transaction.seen.append("rcpt")
        if recipient.startswith("stranger"):
            return Reply(451, "4.7.1", f"later, {tag_of(recipient)}")
        return Status.CONTINUE

    @app.on_data
    async def data(ctx: Context[Session, Transaction]) -> Status:
        expect([str(recipient) for recipient in ctx.recipients] == [f"bob@{the_tag(ctx)}"])
        ctx.transaction.seen.append("data")
        if the_kind(ctx) == "raising":
            raise KeyError(the_tag(ctx))
        return Status.CONTINUE

    @app.on_header
    def header(ctx: Context[Session, Transaction], name: str, value: str) -> None:
        expect(name != "X-Tag" or value == the_tag(ctx))
        ctx.transaction.seen.append(name)

    @app.on_body
    def body(ctx: Context[Session, Transaction], chunk: bytes) -> Status:
        expect(chunk.startswith(the_tag(ctx).encode()))
        return Status.CONTINUE

    @app.on_message
    def message(ctx: EomContext[Session, Transaction], message: Message) -> Status | None:
        tag = the_tag(ctx)
        expect(ctx.transaction.seen == ["mail", "rcpt", "rcpt", "data", "X-Tag", "Subject"])
        expect(message.headers["X-Tag"] == tag and message.body == b"".join(parts_of(the_kind(ctx), tag)))
        expect(message.email()["X-Tag"] == tag and ctx.queue_id == f"Q{tag}")
        left.leave(ctx)
        ctx.session.messages += 1
        if the_kind(ctx) == "dropped":
            return Status.DISCARD
        message.headers["X-Seen"] = tag
        message.recipients.add(f"archive@{tag}")
        if the_kind(ctx) == "large":
            message.body = message.body[: len(tag)]
        return None

    @app.on_eom
    async def end(ctx: EomContext[Session, Transaction]) -> Status:
        ctx.add_header("X-End", the_tag(ctx))
        return Status.CONTINUE

    @app.on_abort
    def abort(ctx: Context[Session, Transaction]) -> None:
        ctx.session.aborts += 1

    return app


def expect(true: bool) -> None:
    if not true:
        raise AssertionError("a handler was told of another message")


def tag_of(address: str) -> str:
    return address.partition("@")[2]


def number_of(address: str) -> int:
    """Which message of its connection this is."""
    return int(address.rpartition("-")[2])


def the_tag(ctx: Context[Any, Any]) -> str:
    assert ctx.sender is not None
    return tag_of(ctx.sender)


def the_kind(ctx: Context[Any, Any]) -> str:
    assert ctx.sender is not None
    return ctx.sender.partition("@")[0]


# ---- Its clients -----------------------------------------------------------------------------

KINDS = ("small", "large", "dropped", "raising", "aborted", "refused")
VERDICTS = {"small": "accept", "large": "accept", "dropped": "discard", "raising": "tempfail", "aborted": "abort"}
"""What the metrics and the access log must say of a message."""


def parts_of(kind: str, tag: str) -> list[bytes]:
    """The body, in pieces of which each begins with the tag."""
    return (
        [tag.encode() + b"\r\n" + b"x" * (SPOOL_SIZE // 2) + b"\r\n"] * 4
        if kind == "large"
        else [f"{tag}\r\n".encode()]
    )


def verdict_of(kind: str) -> str:
    return "reject" if kind == "refused" else VERDICTS[kind]


def send_many(peer: Peer, client_number: int) -> Counter[str]:
    """One client's life. How many messages of each kind it has sent, all of them answered as they should."""
    sent: Counter[str] = Counter()
    dice = random.Random(client_number)
    for connection in range(ROUNDS):
        client = peer.greeted()
        number = 0  # of the message, but for those that no handler counts
        for _ in range(MESSAGES):
            kind = dice.choice(KINDS)
            tag = f"{client_number}-{connection}-{number}"
            send(client, kind, tag)
            sent[kind] += 1
            number += kind in ("small", "large", "dropped", "aborted")
        client.quit()
        client.wait_for_close()
        client.close()
        peer.forget(client)
    return sent


def send(client: Client, kind: str, tag: str) -> None:
    client.macros(b"M", {"{auth_authen}": tag, "i": f"Q{tag}"})
    answer = client.mail(f"<{kind}@{tag}>")
    assert answer is not None
    if kind == "refused":
        assert (answer.code, answer.lines) == (550, (f"not {tag}",))
        return
    assert answer.verdict is Verdict.CONTINUE, tag
    assert_verdict(client.rcpt(f"<bob@{tag}>"), Verdict.CONTINUE)
    refusal = client.rcpt(f"<stranger@{tag}>")
    assert refusal is not None
    assert (refusal.code, refusal.lines) == (451, (f"later, {tag}",))
    if kind == "raising":
        assert_verdict(client.data(), Verdict.TEMPFAIL)
        return
    assert_verdict(client.data(), Verdict.CONTINUE)
    client.header("X-Tag", f" {tag}")
    client.header("Subject", " test")
    client.eoh()
    if kind == "aborted":
        client.abort()
        return
    for part in parts_of(kind, tag):
        assert_verdict(client.body(part), Verdict.CONTINUE)
    check_end(client.end_of_message(), kind, tag)


def assert_verdict(answer: Any, verdict: Verdict) -> None:
    assert answer is not None
    assert answer.verdict is verdict


def check_end(end: EndOfMessage, kind: str, tag: str) -> None:
    added = {event.name: event.value.strip() for event in end.changes if isinstance(event, AddHeader)}
    if kind == "dropped":
        assert end.answer.verdict is Verdict.DISCARD
        return
    assert end.answer.verdict is Verdict.CONTINUE, end
    assert added == {"X-End": tag, "X-Seen": tag}
    others = [event for event in end.changes if not isinstance(event, AddHeader)]
    assert all(tag in repr(event) for event in others)
    assert len(others) == (2 if kind == "large" else 1)


# ---- Together --------------------------------------------------------------------------------


def test_connections_side_by_side_keep_apart_and_all_are_counted(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    left = Left()
    peer = serve(make_filter(left), metrics="0", access_log=True)
    with ThreadPoolExecutor(CLIENTS + LATE_THREADS) as pool:
        late = [pool.submit(left.use) for _ in range(LATE_THREADS)]
        try:
            sent = sum(pool.map(lambda number: send_many(peer, number), range(CLIENTS)), Counter[str]())
        finally:
            for _ in late:
                left.end()
        assert sum(future.result() for future in late) > 0
    verdicts = Counter[str]()
    for kind, count in sent.items():
        verdicts[verdict_of(kind)] += count
    assert set(sent) == set(KINDS)
    assert messages(told(peer.server.metrics_address)) == verdicts
    records: list[Any] = [record.milter for record in caplog.records if record.name == "milter.access"]  # type: ignore[attr-defined]
    assert Counter(record["verdict"] for record in records) == verdicts
    assert all(tag_of(record["sender"]) == record["queue_id"].removeprefix("Q") for record in records)
    engine = peer.server.engine
    assert engine.watch.running == {}
    assert engine.ledger is not None
    assert engine.ledger._accounts == {}
