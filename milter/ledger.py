# SPDX-License-Identifier: GPL-3.0-or-later
"""What is noted of a message while it is under way, and the record made of it at its end.

A :class:`Ledger` is kept only when the access log or the metrics are wanted. It reads over the engine's
shoulder: :meth:`Ledger.noting` puts a note-taker before each of the engine's readers. A filter without it
pays nothing.

The life of an :class:`Account`

1. It is opened at MAIL, before the handlers of MAIL run.
2. Each event of the message notes in it: how long its handlers took, a refused recipient, the size.
3. It is closed when the engine's conversation has no transaction any more: the message was decided, or
   given up. Its record goes to the access log, its verdict to the metrics.

The invariant: one record for each account. For that the plan makes the shim tell the end and the abort of
each message, and an account that is left when its connection is gone is closed then.

A record says what the filter decided. The verdict may still be lost on its way to the MTA, as when the MTA
hangs up; the MTA then does what its configuration says of a filter that fails.

Threads: a connection's events come one at a time, so an account needs no lock; the tables are changed by single
operations of a dict, which are atomic, and each entry by the events of its own connection. Logging and metrics have
locks of their own.
"""

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice, starmap
from mmap import mmap
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, cast

from milter import access
from milter.addresses import Address
from milter.context import Call, Conversation, Scope, Transaction
from milter.envelope import InetAddress
from milter.errors import MilterError
from milter.protocol import Stage
from milter.safe_log import SafeLog
from milter.verdict import Reply, Status

if TYPE_CHECKING:
    from milter.metrics import Collector

__all__ = ["Ledger", "open_books"]

log = SafeLog("milter")

_Decision: TypeAlias = Status | Reply
_Reader: TypeAlias = Callable[[Any, Iterator[str], Any, Call], _Decision]
_Fields: TypeAlias = Iterator[str]

# Names of this module, since to look up a member of an enum takes ten times as long.
_CONTINUE, _SKIP = Status.CONTINUE, Status.SKIP
_EOM = Stage.EOM
_REFUSALS = (Status.REJECT, Status.TEMPFAIL)
_GIVEN_UP = (Stage.ABORT, Stage.HELO, Stage.CONNECT, Stage.CLOSE)

_LISTED_AT_MOST = 100  # recipients in a record, and refused ones
_ABORT, _TEMPFAIL = "abort", "tempfail"
_VERDICTS = {
    Status.CONTINUE: "accept",
    Status.ACCEPT: "accept",
    Status.REJECT: "reject",
    Status.TEMPFAIL: _TEMPFAIL,
    Status.DISCARD: "discard",
}

_REPLACE_BODY = "replace_body"

# By the methods of the context: the functions of a call, and the letters of the edits of a message.
_ACTIONS = {
    "add_header": "add_header",
    "insert_header": "insert_header",
    "change_header": "replace_header",
    "change_sender": "replace_sender",
    "add_recipient": "add_recipient",
    "remove_recipient": "remove_recipient",
    "send_body": _REPLACE_BODY,
    "quarantine": "quarantine",
}
_EDITS = {
    "h": "add_header",
    "i": "insert_header",
    "m": "replace_header",
    "e": "replace_sender",
    "+": "add_recipient",
    "2": "add_recipient",
    "-": "remove_recipient",
    "b": _REPLACE_BODY,
}


def open_books(access_log: bool, metrics: "Collector | None") -> "Ledger | None":
    """The ledger that an engine is to keep; None: nobody wants to know."""
    if not access_log and metrics is None:
        return None
    if access_log and access.log.logger.level == logging.NOTSET:
        access.log.logger.setLevel(logging.INFO)  # who asks for it wants to see it, whatever else is shown
    return Ledger(access.write if access_log else None, metrics)


@dataclass(slots=True)
class _Account:
    """What is noted of one message."""

    sender: Address
    began: int
    transaction: Transaction | None = None
    handlers: int = 0
    """Nanoseconds that handlers took."""
    refused: list[tuple[Address, _Decision]] = field(default_factory=list)
    """The first ones: there may be any number."""
    refusals: int = 0
    """How many there were."""
    refusal: _Decision | None = None
    """The last one, of those that let the client try again if there are any."""
    raised: dict[str, None] = field(default_factory=dict)
    """The names of handlers, each once."""
    actions: Counter[str] = field(default_factory=Counter)
    shown: int = 0
    """Bytes of the message that its handlers were shown."""
    cut: bool = False
    """Handlers wanted no more of the body."""
    crashed: bool = False
    """The library itself failed on the way: whatever handlers say, the shim answers a temporary failure."""

    def refuse(self, recipient: Address, decision: _Decision) -> None:
        self.refusals += 1
        if len(self.refused) < _LISTED_AT_MOST:
            self.refused.append((recipient, decision))
        if _status(decision) is Status.TEMPFAIL or self.refusal is None or _status(self.refusal) is Status.REJECT:
            self.refusal = decision


class _Step(Protocol):
    @property
    def stage(self) -> Stage: ...
    @property
    def handlers(self) -> Sequence[Any]: ...


class Ledger:
    """The accounts of the messages that are under way in one engine.

    Arguments:
        write: takes the record of a message, or of a refused connection.
        metrics: what is counted.
    """

    def __init__(self, write: Callable[[dict[str, Any]], None] | None, metrics: "Collector | None") -> None:
        self._write = write
        self.metrics = metrics
        self._metrics_failed = False
        self._accounts: dict[int, _Account] = {}
        # Handlers that raised outside a message: its refusal, or that of its messages, comes of it.
        self._raised: dict[int, dict[str, None]] = {}
        self._shows_header = self._shows_body = self._shows_leading_space = False

    @property
    def open_connections(self) -> mmap | None:
        """Where the shim shall count them, for the metrics."""
        return self.metrics.connections if self.metrics is not None else None

    def noting(
        self, readers: Mapping[str, tuple[_Reader, Any]], *, leading_space: bool
    ) -> dict[str, tuple[_Reader, Any]]:
        """By the engine: its readers of records and their steps, by the records' letters; with notes taken."""
        self._shows_header = bool(readers["L"][1].handlers)
        self._shows_body = bool(readers["B"][1].handlers)
        self._shows_leading_space = leading_space
        notes: dict[str, Callable[..., _Decision]] = {
            "C": self._client,
            "H": self._client,
            "M": self._mail,
            "R": self._rcpt,
            "L": self._header,
            "B": self._body,
            "E": self._end_of_message,
            "Q": self._close,
            "X": self._over,
        }
        return {
            letter: (partial(notes.get(letter, self._event), reader), step)
            for letter, (reader, step) in readers.items()
        }

    def raised(self, handler: str, stage: Stage, connection: Conversation) -> None:
        """By the engine: a handler raised."""
        account = self._accounts.get(connection.id)
        raised = account.raised if account is not None else self._raised.setdefault(connection.id, {})
        raised[handler] = None
        if self.metrics is not None:
            self._count(self.metrics.raised, stage)

    def left(self, connection: Conversation) -> None:
        """By the engine: nobody listens to this connection any more, whatever becomes of its message."""
        account = self._accounts.pop(connection.id, None)
        self._raised.pop(connection.id, None)
        if account is not None:
            self._settle(account, connection, _TEMPFAIL)

    # ---- The records of a log, see milter.engine

    def _event(self, reader: _Reader, step: _Step, fields: _Fields, connection: Conversation, call: Call) -> _Decision:
        account = self._accounts.get(connection.id)
        began = _now()
        try:
            decision = reader(step, fields, connection, call)
        except BaseException:
            if account is not None:
                account.crashed = True
            raise
        if step.handlers:
            self._took(step.stage, _now() - began, account)
        if account is not None and connection.transaction is None:
            self._end(account, step.stage, decision, connection, call)
        return decision

    def _client(self, reader: _Reader, step: _Step, fields: _Fields, connection: Conversation, call: Call) -> _Decision:
        began = _now()
        decision = self._event(reader, step, fields, connection, call)
        if _status(decision) in _REFUSALS:
            self._refuse(decision, step.stage, _now() - began, connection, call)
        return decision

    def _mail(self, reader: _Reader, step: _Step, fields: _Fields, connection: Conversation, call: Call) -> _Decision:
        sender, again = _address(fields)
        account = self._accounts[connection.id] = _Account(sender, call.message_began)
        account.raised.update(self._raised.get(connection.id, {}))
        decision = self._event(reader, step, again, connection, call)
        account.transaction = connection.transaction
        return decision

    def _rcpt(self, reader: _Reader, step: _Step, fields: _Fields, connection: Conversation, call: Call) -> _Decision:
        recipient, again = _address(fields)
        account = self._accounts.get(connection.id)
        decision = self._event(reader, step, again, connection, call)
        if account is not None and _status(decision) in _REFUSALS:
            account.refuse(recipient, decision)
            if self.metrics is not None:
                self.metrics.refused_recipient(_VERDICTS[_status(decision)])
        return decision

    def _header(self, reader: _Reader, step: _Step, fields: _Fields, connection: Conversation, call: Call) -> _Decision:
        name, value = next(fields), next(fields)
        account = self._accounts.get(connection.id)
        if account is not None:
            colon = ":" if self._shows_leading_space and call.leading_space else ": "
            account.shown += _bytes_of_field(f"{name}{colon}{value}\n")
        return self._event(reader, step, iter((name, value)), connection, call)

    def _body(self, reader: _Reader, step: _Step, fields: _Fields, connection: Conversation, call: Call) -> _Decision:
        size = next(fields)
        account = self._accounts.get(connection.id)
        decision = self._event(reader, step, iter((size,)), connection, call)
        if account is not None:
            account.shown += int(size)
            account.cut = account.cut or decision is _SKIP
        return decision

    def _end_of_message(
        self, reader: _Reader, step: _Step, fields: _Fields, connection: Conversation, call: Call
    ) -> _Decision:
        account = self._accounts.get(connection.id)
        if account is not None:
            call = cast(Call, _Watched(call, account.actions))
        return self._event(reader, step, fields, connection, call)

    def _over(self, reader: _Reader, step: _Step, fields: _Fields, connection: Conversation, call: Call) -> _Decision:
        """The shim decided the message without Python, because something failed."""
        decision = reader(step, fields, connection, call)
        account = self._accounts.pop(connection.id, None)
        if account is not None:
            self._settle(account, connection, _TEMPFAIL)
        return decision

    def _close(self, reader: _Reader, step: _Step, fields: _Fields, connection: Conversation, call: Call) -> _Decision:
        decision = self._event(reader, step, fields, connection, call)
        self.left(connection)
        return decision

    # ---- The end of an account

    def _took(self, stage: Stage, nanoseconds: int, account: _Account | None) -> None:
        if account is not None:
            account.handlers += nanoseconds
        if self.metrics is not None:
            self._count(self.metrics.took, stage, nanoseconds / 1e9)

    def _end(self, account: _Account, stage: Stage, decision: _Decision, connection: Conversation, call: Call) -> None:
        del self._accounts[connection.id]
        if account.crashed:
            self._settle(account, connection, _TEMPFAIL, stage, None, call)
        elif stage in _GIVEN_UP and (refusal := _refusal_of_all(account)) is not None:
            self._settle(account, connection, _VERDICTS[_status(refusal)], Stage.RCPT, refusal, call)
        elif stage in _GIVEN_UP:
            self._settle(account, connection, _ABORT, stage, None, call)
        else:
            self._settle(account, connection, _VERDICTS[_status(decision)], stage, decision, call)

    def _settle(
        self,
        account: _Account,
        connection: Conversation,
        verdict: str,
        stage: Stage | None = None,
        decision: _Decision | None = None,
        call: Call | None = None,
    ) -> None:
        if self.metrics is not None:
            self._count(self.metrics.decided, verdict)
        if self._write is None:
            return
        recipients = account.transaction.recipients if account.transaction is not None else []
        self._enter(
            _record(
                connection,
                verdict,
                stage,
                decision,
                queue_id=_queue_id(call),
                sender=str(account.sender),
                recipients=_listed("recipients", map(str, recipients[:_LISTED_AT_MOST]), len(recipients)),
                refused=_listed("refused", starmap(_refusal, account.refused), account.refusals),
                failed=list(account.raised),
                actions=dict(account.actions),
                size=self._size(account) if stage is _EOM else None,
                handlers=account.handlers,
                total=_now() - account.began,
            ),
            account.transaction or connection,
        )

    def _refuse(
        self, decision: _Decision, stage: Stage, nanoseconds: int, connection: Conversation, call: Call
    ) -> None:
        """The connection, before there was a message."""
        verdict = _VERDICTS[_status(decision)]
        if self.metrics is not None:
            self._count(self.metrics.refused, verdict)
        if self._write is not None:
            failed = self._raised.get(connection.id, ())
            record = _record(connection, verdict, stage, decision, failed=failed, handlers=nanoseconds)
            self._enter(record, connection)

    def _size(self, account: _Account) -> int | None:
        message = account.transaction.message if account.transaction is not None else None
        if message is not None:
            with contextlib.suppress(OSError, MilterError):  # its file cannot be read: the handlers know, too
                return message.size
            return None
        if not self._shows_body or account.cut:
            return None
        return account.shown + (len("\r\n") if self._shows_header else 0)

    def _count(self, note: Callable[..., None], *arguments: Any) -> None:
        """Figures that fail fail no message. Told once: it may be so with each message."""
        try:
            note(*arguments)
        except Exception:
            if not self._metrics_failed:
                self._metrics_failed = True
                log.exception("the metrics failed, and are wrong from now on; mail is served as before")

    def _enter(self, record: dict[str, Any], scope: Scope) -> None:
        """With the context variables that handlers have set. A log that fails fails no message."""
        assert self._write is not None
        try:
            scope.variables.copy().run(self._write, record)
        except Exception:
            log.exception("the access log failed")


class _Watched:
    """A call whose actions are noted, once they were sent."""

    __slots__ = ("_actions", "_call")

    def __init__(self, call: Call, actions: Counter[str]) -> None:
        self._call = call
        self._actions = actions

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._call, name)
        return partial(self._send, attribute, _ACTIONS[name]) if name in _ACTIONS else attribute

    def leave_changes(self, changes: Sequence[tuple[str, tuple[bytes, ...]]]) -> None:
        cast(Any, self._call).leave_changes(changes)
        for letter, _ in changes:
            self._note(_EDITS[letter])

    def _send(self, send: Callable[..., None], action: str, *arguments: Any) -> None:
        send(*arguments)
        self._note(action)

    def _note(self, action: str) -> None:
        self._actions[action] += 1
        if action == _REPLACE_BODY:  # in however many parts
            self._actions[action] = 1


def _refusal_of_all(account: _Account) -> _Decision | None:
    """What the filter has told a client all of whose recipients it refused, and who then had nothing to send.

    Where some may be tried again, so may the message.
    """
    if account.transaction is None or account.transaction.recipients:
        return None
    return account.refusal


def _now() -> int:
    """Nanoseconds of the clock by which the shim tells when a message began."""
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC)


def _record(
    connection: Conversation,
    verdict: str,
    stage: Stage | None,
    decision: _Decision | None,
    *,
    handlers: int,
    total: int | None = None,
    queue_id: str | None = None,
    sender: str | None = None,
    recipients: Mapping[str, Any] | None = None,
    refused: Mapping[str, Any] | None = None,
    failed: Iterable[str] = (),
    actions: Mapping[str, int] | None = None,
    size: int | None = None,
) -> dict[str, Any]:
    """What goes to the access log, see :mod:`milter.access`; without a sender it is of a connection."""
    return {
        "queue_id": queue_id,
        **_client(connection),
        "sender": sender,
        **(recipients or {"recipients": []}),
        **(refused or {"refused": []}),
        "verdict": verdict,
        "stage": stage.name.lower() if stage is not None else None,
        **_reply(decision),
        "failed": list(failed),
        "actions": dict(actions or {}),
        "size": size,
        "handlers_ms": _milliseconds(handlers),
        "total_ms": _milliseconds(total) if total is not None else None,
        "connection": connection.id,
    }


def _listed(name: str, entries: Iterable[Any], count: int) -> dict[str, Any]:
    """The first ones, and how many more there are: a client can name any number."""
    listed = list(entries)
    more = {f"more_{name}": count - len(listed)} if count > len(listed) else {}
    return {name: listed, **more}


def _milliseconds(nanoseconds: int) -> float:
    return round(nanoseconds / 1e6, 3)


def _status(decision: _Decision) -> Status:
    return decision.status if isinstance(decision, Reply) else decision


def _address(fields: _Fields) -> tuple[Address, _Fields]:
    """The address that the next record begins with, and the fields once more."""
    count = next(fields)
    arguments = list(islice(fields, int(count)))
    return Address.from_arguments(arguments), iter((count, *arguments))


def _bytes_of_field(text: str) -> int:
    """On the wire, where each line ends with CRLF."""
    return len(text.replace("\r\n", "\n").replace("\n", "\r\n").encode("utf-8", "surrogateescape"))


def _queue_id(call: Call | None) -> str | None:
    value = call.macro(b"i") if call is not None else None
    return value.decode("utf-8", "surrogateescape") if value is not None else None


def _client(connection: Conversation) -> dict[str, Any]:
    address = connection.address
    if isinstance(address, InetAddress):
        return {"client": connection.hostname, "address": address.host, "port": address.port}
    return {"client": connection.hostname, "address": str(address) if address is not None else None, "port": None}


def _reply(decision: _Decision | None) -> dict[str, Any]:
    """What the client is told; with a bare verdict the MTA has a text of its own."""
    if not isinstance(decision, Reply):
        return {"code": None, "enhanced": None, "text": None}
    return {"code": decision.code, "enhanced": decision.enhanced, "text": "\n".join(decision.lines)}


def _refusal(recipient: Address, decision: _Decision) -> dict[str, Any]:
    return {"recipient": str(recipient), "verdict": _VERDICTS[_status(decision)], **_reply(decision)}
