# SPDX-License-Identifier: GPL-3.0-or-later
"""The handlers of one filter, run over the events of its connections. Knows nothing of C.

The engine is called by the binding, with the log of a session: everything that happened since the last
call. For each event

1. the connection's :class:`Conversation <milter.context.Conversation>` takes note: client, HELO, sender,
   the beginning of a message;
2. a context is made, and the handlers of the stage run in the order of their registration, until one
   gives a verdict other than CONTINUE; what a handler raises becomes the answer that the filter's policy
   has for it;
3. the context expires, and the conversation takes note again: an accepted recipient, the message's end.

The answer to the last event goes back. An exception of the engine itself is the binding's business.

Threads: a connection's events come one at a time, each on any thread; so a Conversation needs no lock.
Different connections run side by side. An Engine's table of connections is changed by single dict
operations, which are atomic.
"""

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

from milter.app import Handler, Milter
from milter.context import Call, Context, Conversation, EomContext, NegotiateContext, Transaction, expire
from milter.envelope import Address, ClientAddress, InetAddress, UnixAddress
from milter.errors import HandlerError, MilterError
from milter.plan import make_plan
from milter.protocol import Actions, MacroList, ProtocolOptions, Stage
from milter.verdict import MEANINGFUL, Reply, Status, Verdict

log = logging.getLogger("milter")

Decision: TypeAlias = Status | Reply

_REFUSALS = (Status.REJECT, Status.TEMPFAIL)


class Answer(NamedTuple):
    """What the binding tells the shim."""

    decision: Decision
    owes: bool
    """A handler raised where no reply is possible: the next stage that replies must be asked."""
    tracks: bool
    """There is state of this message, which must be dropped at its end."""


class Negotiation:
    """The state of one negotiation; see :class:`milter.context.Negotiation`."""

    def __init__(self, offered_actions: int, offered_steps: int, actions: int, steps: int) -> None:
        options = ProtocolOptions(steps)
        self.offered_actions = Actions(offered_actions)
        self.offered_options = ProtocolOptions(offered_steps)
        self.actions = Actions(actions) & ~Actions.REQUEST_MACROS
        self.leading_space = ProtocolOptions.LEADING_SPACE in options
        self.rejected_recipients = ProtocolOptions.REJECTED_RCPT in options
        self.macros: dict[MacroList, list[str]] = {}

    def reduced(self, steps: int) -> int:
        """`steps` without those that a handler has taken away."""
        if not self.leading_space:
            steps &= ~ProtocolOptions.LEADING_SPACE
        if not self.rejected_recipients:
            steps &= ~ProtocolOptions.REJECTED_RCPT
        return steps


# ---- The log ---------------------------------------------------------------------------------


class _End:
    """The message was over before this, decided without Python (record X)."""


Event = tuple[Stage | type[_End], tuple[Any, ...]]


def read_log(text: str, chunk: bytes) -> Iterator[Event]:
    """The events of a log, as the stage and the arguments of its handlers."""
    fields = iter(text.split("\0"))
    for letter in fields:
        if letter in ("M", "R"):
            arguments = list(itertools.islice(fields, int(next(fields))))
            address = Address.from_arguments(arguments)
            yield (Stage.MAIL if letter == "M" else Stage.RCPT), (address, address.params)
        elif letter == "L":
            yield Stage.HEADER, (next(fields), next(fields))
        elif letter == "B":
            yield Stage.BODY, (chunk,)
        elif letter == "C":
            yield Stage.CONNECT, (next(fields), _client_address(next(fields), next(fields), next(fields)))
        elif letter == "H":
            yield Stage.HELO, (next(fields),)
        elif letter == "U":
            yield Stage.UNKNOWN, (next(fields),)
        elif letter in _BARE:
            yield _BARE[letter], ()
        elif letter:
            raise AssertionError(f"the shim wrote a record of the unknown kind {letter!r}")


_BARE: dict[str, Stage | type[_End]] = {
    "T": Stage.DATA,
    "N": Stage.EOH,
    "E": Stage.EOM,
    "A": Stage.ABORT,
    "Q": Stage.CLOSE,
    "X": _End,
}


def _client_address(family: str, port: str, host: str) -> ClientAddress:
    if family == "U":
        return None
    return UnixAddress(host) if family == "L" else InetAddress(host, int(port))


# ---- One filter ------------------------------------------------------------------------------


class _Connection(Conversation):
    """A conversation, and what the engine remembers of it besides."""

    __slots__ = ("connect_failure", "helo_failure", "message_failure", "skipped")

    def __init__(self, number: int, app: Milter[Any, Any]) -> None:
        super().__init__(number, app.new_session, app.new_transaction)
        self.connect_failure: Decision | None = None
        self.helo_failure: Decision | None = None
        self.message_failure: Decision | None = None
        self.skipped: set[Handler] = set()

    @property
    def failure(self) -> Decision | None:
        """What the MTA is still to be told, since a handler raised in a stage that does not reply."""
        return self.connect_failure or self.helo_failure or self.message_failure

    def end_message(self) -> None:
        self.transaction = None
        self.message_failure = None
        self.skipped.clear()


class Engine:
    """Runs the handlers of one filter. `on_shutdown` is told the failure that shall stop the filter."""

    def __init__(self, app: Milter[Any, Any], on_shutdown: Callable[[HandlerError], None]) -> None:
        self.app = app
        self.plan = make_plan(app)
        self._on_shutdown = on_shutdown
        self._handlers = {stage: tuple(handlers) for stage, handlers in app.handlers.items()}
        self._connections: dict[int, _Connection] = {}

    @property
    def connections(self) -> int:
        """How many connections have Python objects now; for tests of leaks."""
        return len(self._connections)

    # ---- Called by the binding

    def negotiate(self, call: Call, number: int, negotiation: Negotiation) -> bool:
        """Run the handlers of on_negotiate. False: refuse to work for this MTA."""
        missing = self.plan.requires & ~negotiation.offered_actions
        if missing:
            log.error("the MTA does not offer %r, which this filter requires: connection refused", missing)
            return False
        connection = self._connections.setdefault(number, _Connection(number, self.app))
        context = NegotiateContext(connection, negotiation)  # type: ignore[arg-type]
        try:
            for handler in self._handlers[Stage.NEGOTIATE]:
                self._checked(handler, handler.function(context), Stage.NEGOTIATE)
        except BaseException as failure:
            self._failed(handler, failure, Stage.NEGOTIATE, connection, call)
            return False
        finally:
            expire(context)
        return True

    def enter(self, call: Call, number: int, text: str, chunk: bytes) -> Answer:
        """Replay a log, and answer the event at its end."""
        connection = self._connections.get(number)
        if connection is None:
            connection = self._connections.setdefault(number, _Connection(number, self.app))
        if call.stage is Stage.CLOSE:
            del self._connections[number]
        decision: Decision = Status.CONTINUE
        for stage, arguments in read_log(text, chunk):
            if stage is _End:
                connection.end_message()
            elif isinstance(stage, Stage):
                decision = self._event(stage, arguments, connection, call)
        return _answer(decision, connection)

    # ---- Events

    def _event(self, stage: Stage, arguments: tuple[Any, ...], connection: _Connection, call: Call) -> Decision:
        self._begin(stage, arguments, connection)
        if stage in self.plan.silent or connection.failure is None or stage in (Stage.ABORT, Stage.CLOSE):
            decision = self._run(stage, arguments, connection, call)
        else:
            decision = _fitting(connection.failure, stage)
        if stage in self.plan.silent and decision is not Status.CONTINUE:
            self._owe(decision, stage, connection)
            decision = Status.CONTINUE
        self._end(stage, arguments, decision, connection, call)
        return decision

    def _begin(self, stage: Stage, arguments: tuple[Any, ...], connection: _Connection) -> None:
        """What an event means for the conversation, before its handlers run."""
        if stage is Stage.CONNECT:
            connection.hostname, connection.address = arguments
        elif stage is Stage.HELO:
            connection.end_message()
            connection.helo = arguments[0]
            connection.helo_failure = None
        elif stage is Stage.MAIL:
            connection.end_message()
            connection.transaction = Transaction(arguments[0])
        elif stage is Stage.CLOSE:
            connection.end_message()

    def _end(
        self,
        stage: Stage,
        arguments: tuple[Any, ...],
        decision: Decision,
        connection: _Connection,
        call: Call,
    ) -> None:
        """What an event means for the conversation, after its handlers have run."""
        status = _status(decision)
        transaction = connection.transaction
        accepted = stage is Stage.RCPT and status not in _REFUSALS and not self._refused_by_mta(call)
        if accepted and transaction is not None:
            transaction.recipients.append(arguments[0])
        if stage in (Stage.EOM, Stage.ABORT) or (stage in _DECIDING and _decides(stage, status)):
            connection.end_message()

    def _refused_by_mta(self, call: Call) -> bool:
        if ProtocolOptions.REJECTED_RCPT not in self.plan.options:
            return False
        return call.macro(b"{rcpt_mailer}") == b"error"

    def _owe(self, decision: Decision, stage: Stage, connection: _Connection) -> None:
        """A handler raised where no reply is possible: the next stage that replies tells the MTA."""
        if stage is Stage.CONNECT:
            connection.connect_failure = decision
        elif stage is Stage.HELO:
            connection.helo_failure = decision
        elif connection.transaction is not None:
            connection.message_failure = connection.message_failure or decision

    # ---- Handlers

    def _run(self, stage: Stage, arguments: tuple[Any, ...], connection: _Connection, call: Call) -> Decision:
        handlers = self._handlers[stage]
        if not handlers:
            return Status.CONTINUE
        make = EomContext if stage is Stage.EOM else Context
        context: Context[Any, Any] = make(connection, call)
        try:
            return self._first_decision(stage, handlers, context, arguments, connection, call)
        finally:
            expire(context)

    def _first_decision(
        self,
        stage: Stage,
        handlers: Sequence[Handler],
        context: Context[Any, Any],
        arguments: tuple[Any, ...],
        connection: _Connection,
        call: Call,
    ) -> Decision:
        transaction = connection.transaction
        for handler in handlers:
            if handler in connection.skipped:
                continue
            try:
                decision = self._checked(handler, handler.function(context, *arguments), stage)
                if transaction is not None and transaction.body_failure is not None:
                    raise transaction.body_failure
            except BaseException as failure:
                decision = self._failed(handler, failure, stage, connection, call)
                if stage in (Stage.ABORT, Stage.CLOSE):
                    continue
                if transaction is not None and decision is not Status.CONTINUE:
                    # Where it only observes, its message goes on, though it is lost: one traceback is enough.
                    connection.skipped.add(handler)
            if decision is Status.SKIP:
                connection.skipped.add(handler)
            elif decision is not Status.CONTINUE:
                return decision
        if stage is Stage.BODY and connection.skipped.issuperset(handlers):
            return Status.SKIP
        return Status.CONTINUE

    def _checked(self, handler: Handler, verdict: Verdict, stage: Stage) -> Decision:
        """The verdict, if it is one that means something here."""
        if verdict is None:
            return Status.CONTINUE
        if not isinstance(verdict, Status | Reply):
            raise TypeError(
                f"{handler.name} returned {verdict!r}; a handler returns a milter.Status, a milter.Reply or None"
            )
        if handler.observes:
            raise TypeError(f"{handler.name} is annotated '-> None' and returned {verdict!r}")
        if _status(verdict) not in MEANINGFUL[stage]:
            meaningful = ", ".join(status.name for status in Status if status in MEANINGFUL[stage])
            raise ValueError(
                f"{handler.name} returned {verdict!r}, which means nothing in {stage.decorator}; "
                f"what does: {meaningful}"
            )
        return verdict

    def _failed(
        self,
        handler: Handler,
        failure: BaseException,
        stage: Stage,
        connection: _Connection,
        call: Call,
    ) -> Decision:
        """A handler raised: tell the log, and give the answer that the filter's policy has for it."""
        policy = self.app.on_error
        decision = Status.TEMPFAIL if isinstance(policy, str) else policy
        transaction = connection.transaction
        if transaction is not None and transaction.body_failure is not None and _status(decision) not in _REFUSALS:
            decision = Status.TEMPFAIL  # no policy lets half a body pass
        decision = _fitting(decision, stage)
        log.error(
            "%s failed in %s (client %a [%s], queue id %a); %s",
            handler.name,
            stage.decorator,
            connection.hostname,
            connection.address,
            _queue_id(call),
            "no reply is possible there" if stage in _WITHOUT_REPLY else f"answer: {_on_one_line(decision)}",
            exc_info=failure,
        )
        if policy == "shutdown":
            error = HandlerError(f"{handler.name} failed in {stage.decorator}: {failure!r}")
            error.__cause__ = failure
            self._on_shutdown(error)
        return decision


_WITHOUT_REPLY = (Stage.NEGOTIATE, Stage.ABORT, Stage.CLOSE)
_DECIDING = (Stage.MAIL, Stage.RCPT, Stage.DATA, Stage.HEADER, Stage.EOH, Stage.BODY)


def _answer(decision: Decision, connection: _Connection) -> Answer:
    transaction = connection.transaction
    return Answer(
        decision,
        owes=connection.failure is not None,
        tracks=transaction is not None and transaction.state is not None,
    )


def _status(decision: Decision) -> Status:
    return decision.status if isinstance(decision, Reply) else decision


def _decides(stage: Stage, status: Status) -> bool:
    """Is the message over with this verdict? A refused recipient is not the message. See ends_message() in C."""
    if stage is Stage.RCPT:
        return status in (Status.ACCEPT, Status.DISCARD)
    return status not in (Status.CONTINUE, Status.SKIP)


def _fitting(decision: Decision, stage: Stage) -> Decision:
    """The policy's answer, where the stage has a meaning for it; else to go on, as ACCEPT of an unknown command."""
    return decision if _status(decision) in MEANINGFUL[stage] else Status.CONTINUE


def _on_one_line(decision: Decision) -> str:
    return str(decision).replace("\n", " / ")


def _queue_id(call: Call) -> str | None:
    try:
        value = call.macro(b"i")
    except MilterError:
        return None
    return value.decode("utf-8", "backslashreplace") if value is not None else None
