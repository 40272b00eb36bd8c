# SPDX-License-Identifier: GPL-3.0-or-later
"""The handlers of one filter, run over the events of its connections. Knows nothing of C.

The engine is called by the binding, with the log of a session: everything that happened since the last
call. For each event

1. the connection's :class:`Conversation <milter.context.Conversation>` takes note: client, HELO, sender,
   the beginning of a message;
2. a context is made, and the handlers of the stage run in the order of their registration, until one
   gives a verdict other than CONTINUE; what a handler raises becomes the answer that the filter's policy
   has for it; a coroutine is waited for, see :mod:`milter.loop`;
3. the context expires, and the conversation takes note again: an accepted recipient, the message's end.

At the end of a message, handlers of on_message get all of it; what they edited is left with the call, to be sent
before the verdict. The answer to the last event goes back. An exception of the engine itself is the binding's business.

Threads: a connection's events come one at a time, each on any thread, and each sees what the one before has
written; so a Conversation needs no lock. Different connections run side by side, without the GIL even at the same
moment. What they share: the Engine, its plan and its steps, which nobody changes once it was made; the ledger and
the table of progress, see there; and the table of connections, which is changed by single operations of a dict,
which are atomic. There the entry of a connection is touched by its own events, and by :meth:`Engine.forget` when
there will be none any more.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from time import monotonic
from typing import Any, NamedTuple, TypeAlias

from milter import children
from milter.addresses import Address
from milter.app import WHOLE_MESSAGE, Handler, Milter
from milter.context import (
    NO_VARIABLES,
    Call,
    Context,
    Conversation,
    EomContext,
    NegotiateContext,
    Scope,
    Transaction,
    expire,
)
from milter.coroutines import MtaGone, NoEventLoop, refuse_awaitable
from milter.edits import Change, Numbering, changes, needed
from milter.errors import ActionError, HandlerError, MilterError
from milter.lateness import client_and_message, tell_end, tell_late
from milter.ledger import Ledger
from milter.message import Message, freeze
from milter.plan import Plan, make_plan
from milter.protocol import Actions, MacroList, ProtocolOptions, Stage, known_actions, known_options
from milter.safe_log import SafeLog
from milter.spool import Spool
from milter.verdict import MEANINGFUL, Reply, Status, Verdict
from milter.watch import Watch

log = SafeLog("milter")

Decision: TypeAlias = Status | Reply

# Names of this module, since to look up a member of an enum takes ten times as long.
CONTINUE = Status.CONTINUE
_SKIP = Status.SKIP
_RCPT, _BODY, _EOM, _ABORT, _CLOSE = Stage.RCPT, Stage.BODY, Stage.EOM, Stage.ABORT, Stage.CLOSE

_REFUSALS = (Status.REJECT, Status.TEMPFAIL)


class Answer(NamedTuple):
    """What the binding tells the shim."""

    decision: Decision
    owes: bool
    """A handler raised where no reply is possible: the next stage that replies must be asked."""
    tracks: bool
    """There is state of this message, which must be dropped at its end."""
    holds: bool
    """The same for the session."""


class Negotiation:
    """The state of one negotiation; see :class:`milter.context.Negotiation`."""

    def __init__(self, plan: Plan, offered_actions: int, offered_steps: int, actions: int, steps: int) -> None:
        options = known_options(steps)
        self._shows_leading_space = plan.shows_leading_space and ProtocolOptions.LEADING_SPACE in options
        self.offered_actions = known_actions(offered_actions)
        self.offered_options = known_options(offered_steps)
        self.actions = Actions(actions) & ~Actions.REQUEST_MACROS
        self.leading_space = self._shows_leading_space
        self.rejected_recipients = ProtocolOptions.REJECTED_RCPT in options
        self.macros: dict[MacroList, list[str]] = {}

    def reduced(self, steps: int) -> int:
        """`steps` without those that a handler has taken away."""
        if self._shows_leading_space and not self.leading_space:
            steps &= ~ProtocolOptions.LEADING_SPACE
        if not self.rejected_recipients:
            steps &= ~ProtocolOptions.REJECTED_RCPT
        return steps


# ---- One filter ------------------------------------------------------------------------------


class _Connection(Conversation):
    """A conversation, and what the engine remembers of it besides."""

    __slots__ = ("_connect_failure", "_helo_failure", "failure", "skipped")

    def __init__(self, number: int, app: Milter[Any, Any]) -> None:
        super().__init__(number, app.new_session, app.new_transaction)
        self._connect_failure: Decision | None = None
        self._helo_failure: Decision | None = None
        self.failure: Decision | None = None
        """What the MTA is still to be told, since a handler raised, or gave its verdict, in a stage that does not
        reply."""
        self.skipped: set[Handler] = set()

    def owe(self, decision: Decision, stage: Stage) -> None:
        """No reply is possible where a handler decided this: the next stage that replies tells the MTA."""
        if stage is Stage.CONNECT:
            self._connect_failure = decision
        elif stage is Stage.HELO:
            self._helo_failure = decision
        elif self.transaction is None:
            return
        self.failure = self._connect_failure or self._helo_failure or self.failure or decision

    def end_message(self) -> None:
        self.transaction = None
        self.failure = self._connect_failure or self._helo_failure
        if self.skipped:
            self.skipped.clear()

    def begin_session(self, helo: str) -> None:
        """HELO, the first one or another: what was before it is over."""
        self._helo_failure = None
        self.end_message()
        self.helo = helo


class _Step(NamedTuple):
    """A stage, as one filter has it."""

    stage: Stage
    handlers: tuple[Handler, ...]
    silent: bool
    """What its handlers answer is kept for the next stage that replies."""
    answered_later: bool
    """The same, and their verdicts are no failures: the first one is the last."""


_Fields: TypeAlias = Iterator[str]
_Reader: TypeAlias = Callable[[_Step, _Fields, _Connection, Call], Decision]


class Engine:
    """Runs the handlers of one filter.

    Arguments:
        loop: runs coroutines.
        on_shutdown: is told the failure that shall stop the filter.
        ledger: takes notes, if somebody wants to know.
        on_failure: is told each exception of a handler, for tests of the filter.
    """

    def __init__(
        self,
        app: Milter[Any, Any],
        loop: NoEventLoop,
        on_shutdown: Callable[[HandlerError], None],
        ledger: Ledger | None = None,
        on_failure: Callable[[Handler, BaseException], None] | None = None,
    ) -> None:
        self.app = app
        self.ledger = ledger
        self.plan = make_plan(app, followed=ledger is not None)
        self._loop = loop
        self._on_shutdown = on_shutdown
        self._on_failure = on_failure
        self.watch = Watch(app.progress, tell_late)
        self._running = self.watch.running
        self._variables = loop.variables
        self._gathers = self.plan.gathers
        self._spool = Spool(self.plan.spool_directory)
        self._leading_space = self.plan.shows_leading_space
        self._sees_refused = self.plan.sees_refused_recipients
        self._connections: dict[int, _Connection] = {}
        self._generation = children.generation
        self._steps = {stage: self._step(stage) for stage in Stage}
        readers: dict[str, tuple[_Reader, Stage]] = {
            "C": (self._connect, Stage.CONNECT),
            "H": (self._helo, Stage.HELO),
            "M": (self._mail, Stage.MAIL),
            "R": (self._rcpt, Stage.RCPT),
            "T": (self._bare, Stage.DATA),
            "L": (self._header, Stage.HEADER),
            "N": (self._bare, Stage.EOH),
            "B": (self._body, Stage.BODY),
            "E": (self._end_of_message, Stage.EOM),
            "U": (self._unknown, Stage.UNKNOWN),
            "A": (self._abort, Stage.ABORT),
            "Q": (self._close, Stage.CLOSE),
            "X": (self._over, Stage.ABORT),
        }
        self._records = {letter: (reader, self._steps[stage]) for letter, (reader, stage) in readers.items()}
        if ledger is not None:
            self._records = ledger.noting(self._records, leading_space=self._leading_space)

    def _step(self, stage: Stage) -> _Step:
        silent = stage in self.plan.silent or stage in _WITHOUT_REPLY
        return _Step(stage, tuple(self.app.handlers[stage]), silent, stage in self.plan.answered_later)

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
        connection = self._connection(number)
        context = NegotiateContext(connection, negotiation)  # type: ignore[arg-type]
        try:
            connection.begin(connection, self._variables)
            for handler in self._steps[Stage.NEGOTIATE].handlers:
                self._checked(handler, connection.variables.run(handler.function, context), Stage.NEGOTIATE)
        except BaseException as failure:
            self._failed(handler, failure, Stage.NEGOTIATE, connection, call)
            return False
        finally:
            expire(context)
        return True

    def forget(self, numbers: Iterable[int]) -> None:
        """These connections are gone, and nobody waits to be told."""
        for number in numbers:
            connection = self._connections.pop(number, None)
            if self.ledger is not None and connection is not None:
                self.ledger.left(connection)

    def close(self) -> None:
        """No event comes any more. A message that is still under way the shim fails."""
        if self.ledger is not None:
            for connection in self._connections.copy().values():
                self.ledger.left(connection)

    def enter(self, call: Call, number: int, text: str) -> Answer:
        """Replay a log, and answer the event at its end."""
        connection = self._connections.get(number) or self._connection(number)
        if call.stage is _CLOSE:
            del self._connections[number]
        decision: Decision = CONTINUE
        fields = iter(text.split("\0"))
        call.connection = connection
        self._running[call] = began = monotonic()
        try:
            for letter in fields:
                if letter:  # the text behind the last NUL is empty
                    reader, step = self._records[letter]
                    decision = reader(step, fields, connection, call)
        finally:
            del self._running[call]
            if call.late:
                tell_end(call, began)
        return _answer(decision, connection)

    def _connection(self, number: int) -> _Connection:
        return self._connections.setdefault(number, _Connection(number, self.app))

    # ---- The records of a log: what each means for the conversation, and for its handlers

    def _connect(self, step: _Step, fields: _Fields, connection: _Connection, call: Call) -> Decision:
        connection.hostname = next(fields)
        connection.client = (next(fields), next(fields), next(fields))
        if not step.handlers and connection.failure is None:
            return CONTINUE
        return self._event(step, (connection.hostname, connection.address), connection, call)

    def _helo(self, step: _Step, fields: _Fields, connection: _Connection, call: Call) -> Decision:
        name = next(fields)
        connection.begin_session(name)
        if not step.handlers and connection.failure is None:
            return CONTINUE
        return self._event(step, (name,), connection, call)

    def _mail(self, step: _Step, fields: _Fields, connection: _Connection, call: Call) -> Decision:
        sender = _address(fields)
        connection.end_message()
        connection.transaction = Transaction(sender)
        if not step.handlers and connection.failure is None:
            return CONTINUE
        return self._event(step, (sender, sender.params), connection, call)

    def _rcpt(self, step: _Step, fields: _Fields, connection: _Connection, call: Call) -> Decision:
        recipient = _address(fields)
        transaction = connection.transaction  # the verdict may end it
        decision: Decision = CONTINUE
        if step.handlers:
            decision = self._event(step, (recipient, recipient.params), connection, call)
        if transaction is None or (decision is not CONTINUE and _status(decision) in _REFUSALS):
            return decision
        if not (self._sees_refused and call.macro(b"{rcpt_mailer}") == b"error"):
            transaction.recipients.append(recipient)
        return decision

    def _bare(self, step: _Step, fields: _Fields, connection: _Connection, call: Call) -> Decision:
        return self._event(step, (), connection, call)

    def _header(self, step: _Step, fields: _Fields, connection: _Connection, call: Call) -> Decision:
        return self._event(step, (next(fields), next(fields)), connection, call)

    def _body(self, step: _Step, fields: _Fields, connection: _Connection, call: Call) -> Decision:
        return self._event(step, (call.next_chunk(int(next(fields))),), connection, call)

    def _end_of_message(self, step: _Step, fields: _Fields, connection: _Connection, call: Call) -> Decision:
        decision = self._event(step, (), connection, call)
        connection.end_message()
        return decision

    def _unknown(self, step: _Step, fields: _Fields, connection: _Connection, call: Call) -> Decision:
        return self._event(step, (next(fields),), connection, call)

    def _abort(self, step: _Step, fields: _Fields, connection: _Connection, call: Call) -> Decision:
        self._event(step, (), connection, call)
        connection.end_message()
        return CONTINUE

    def _close(self, step: _Step, fields: _Fields, connection: _Connection, call: Call) -> Decision:
        connection.end_message()
        return self._event(step, (), connection, call)

    def _over(self, step: _Step, fields: _Fields, connection: _Connection, call: Call) -> Decision:
        """The message was over before this, decided without Python."""
        connection.end_message()
        return CONTINUE

    # ---- Events

    def _event(self, step: _Step, arguments: tuple[Any, ...], connection: _Connection, call: Call) -> Decision:
        decision: Decision = CONTINUE
        if connection.transaction is None and step.stage in _WITHIN_A_MESSAGE:
            # Its end was decided here, and failed on the way; the shim goes on, and fails it at the end.
            return decision if step.silent else Status.TEMPFAIL
        owed = connection.failure
        if owed is not None and not step.silent:
            decision = _fitting(owed, step.stage)
        elif step.handlers and (owed is None or not step.answered_later):
            decision = self._run(step, arguments, connection, call)
        if decision is CONTINUE:
            return decision
        if step.silent:
            connection.owe(decision, step.stage)
            return CONTINUE
        if step.stage in _DECIDING and _decides(step.stage, _status(decision)):
            connection.end_message()
        return decision

    # ---- Handlers

    def _run(self, step: _Step, arguments: tuple[Any, ...], connection: _Connection, call: Call) -> Decision:
        if step.stage is _EOM:
            return self._run_at_end(step.handlers, connection, call)
        context: Context[Any, Any] = Context(connection, call)
        try:
            return self._first_decision(step.stage, step.handlers, context, arguments, connection, call)
        finally:
            expire(context)

    def _run_at_end(self, handlers: Sequence[Handler], connection: _Connection, call: Call) -> Decision:
        """The handlers of the end of a message, which may change it, and those that want all of it."""
        transaction = connection.transaction
        assert transaction is not None, "the end of a message without a message"
        if self._gathers and not call.content.error:
            transaction.message = self._message(transaction, call)
            if call.content.spooled:
                self._spool.worked()
        context: EomContext[Any, Any] = EomContext(connection, call)
        try:
            decision = self._first_decision(Stage.EOM, handlers, context, (), connection, call)
            if transaction.message is not None and _status(decision) in _ACCEPTING and not transaction.spoilt:
                decision = self._send_edits(decision, transaction.message, handlers, connection, call)
            return decision
        finally:
            expire(context)
            if transaction.message is not None:
                freeze(transaction.message)

    def _message(self, transaction: Transaction, call: Call) -> Message:
        return Message(
            call.content,
            transaction.sender,
            transaction.recipients,
            wire_space=call.leading_space,
            leading_space=self._leading_space,
        )

    def _send_edits(
        self,
        decision: Decision,
        message: Message,
        handlers: Sequence[Handler],
        connection: _Connection,
        call: Call,
    ) -> Decision:
        try:
            edits = changes(message, lambda: _numbering(call))
            if edits:
                _require_granted(edits, call)
                _require_one_body(edits, connection)
                call.leave_changes(edits)
        except BaseException as failure:
            editor = next(handler for handler in reversed(handlers) if handler.form is WHOLE_MESSAGE)
            return self._failed(editor, failure, Stage.EOM, connection, call)
        return decision

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
        scope = transaction or connection
        if scope.variables is NO_VARIABLES:
            connection.begin(scope, self._variables)
        for handler in handlers:
            if connection.skipped and handler in connection.skipped:
                continue
            connection.handler = handler
            try:
                given = (_whole(transaction, call, self._spool),) if handler.form is WHOLE_MESSAGE else arguments
                verdict = scope.variables.run(handler.function, context, *given)
                if handler.asynchronous:
                    verdict = self._awaited(handler, verdict, stage, scope, call)
                decision = self._checked(handler, verdict, stage)
                if transaction is not None and transaction.body_failure is not None:
                    raise transaction.body_failure
            except MtaGone as gone:
                decision = scope.variables.run(self._left_alone, gone, stage, connection, call)
            except BaseException as failure:
                decision = scope.variables.run(self._failed, handler, failure, stage, connection, call)
                if stage in (_ABORT, _CLOSE):
                    continue
                if transaction is not None and stage is _EOM:
                    transaction.spoilt = True
                if transaction is not None and stage in self.plan.silent and decision is not CONTINUE:
                    # Its message goes on, though it is lost: one traceback is enough. Elsewhere the message is
                    # decided, or only a recipient is refused, and the handler must be asked about the next one.
                    connection.skipped.add(handler)
            if decision is _SKIP:
                connection.skipped.add(handler)
            elif decision is not CONTINUE:
                return decision
        if stage is _BODY and connection.skipped.issuperset(handlers):
            return Status.SKIP
        return CONTINUE

    def _awaited(self, handler: Handler, answer: Any, stage: Stage, scope: Scope, call: Call) -> Any:
        """What the coroutine gives. It is cancelled when the MTA is gone, if the MTA was waiting for that."""
        step = self._steps[stage]
        waited_for = not step.silent or step.answered_later
        return self._loop.answer(answer, handler.name, scope, call.mta_is_gone if waited_for else _never)

    def _checked(self, handler: Handler, verdict: Verdict, stage: Stage) -> Decision:
        """The verdict, if it is one that means something here. A child that the handler has forked ends."""
        if children.generation != self._generation:
            children.end(None)
        if verdict is None or (verdict is CONTINUE and not handler.observes):
            return CONTINUE
        if not isinstance(verdict, Status | Reply):
            refuse_awaitable(verdict, handler.name)
            raise TypeError(
                f"{handler.name} returned {verdict!r}; a handler returns a milter.Status, a milter.Reply or None"
            )
        if handler.observes:
            raise TypeError(f"{handler.name} is annotated '-> None' and returned {verdict!r}")
        if _status(verdict) not in MEANINGFUL[stage]:
            meaningful = ", ".join(status.name for status in Status if status in MEANINGFUL[stage])
            raise ValueError(
                f"{handler.name} returned {verdict!r}, which means nothing in {handler.form.decorator}; "
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
        children.end_if_forked(self._generation, failure)
        policy = self.app.on_error
        decision = Status.TEMPFAIL if isinstance(policy, str) else policy
        transaction = connection.transaction
        if transaction is not None and transaction.body_failure is not None and _status(decision) not in _REFUSALS:
            decision = Status.TEMPFAIL  # no policy lets half a body pass
        decision = _fitting(decision, stage)
        log.error(
            "%s failed in %s (client %a [%s], queue id %a); %s",
            handler.name,
            handler.form.decorator,
            connection.hostname,
            connection.address,
            _queue_id(call),
            "no reply is possible there" if stage in _WITHOUT_REPLY else f"answer: {_on_one_line(decision)}",
            exc_info=failure,
        )
        if self.ledger is not None:
            self.ledger.raised(handler.name, stage, connection)
        if self._on_failure is not None:
            self._on_failure(handler, failure)
        if policy == "shutdown":
            error = HandlerError(f"{handler.name} failed in {handler.form.decorator}: {failure!r}")
            error.__cause__ = failure
            self._on_shutdown(error)
        return decision

    def _left_alone(self, gone: MtaGone, stage: Stage, connection: _Connection, call: Call) -> Decision:
        """The MTA is gone, and reads no answer. Nothing failed, unless the handler raised on its way out."""
        failure = gone.__cause__ if isinstance(gone.__cause__, Exception) else None
        about = client_and_message(connection, call.macro_at_once(b"i"))
        log.info("%s, in %s (%s)", gone, stage.decorator, about, exc_info=failure)
        return _fitting(Status.TEMPFAIL, stage)


def _never() -> bool:
    return False


_ACCEPTING = (CONTINUE, Status.ACCEPT)
_WITHOUT_REPLY = (Stage.NEGOTIATE, Stage.ABORT, Stage.CLOSE)
_WITHIN_A_MESSAGE = frozenset((Stage.RCPT, Stage.DATA, Stage.HEADER, Stage.EOH, Stage.BODY, Stage.EOM))
_DECIDING = (Stage.MAIL, Stage.RCPT, Stage.DATA, Stage.HEADER, Stage.EOH, Stage.BODY)


GO_ON = Answer(CONTINUE, owes=False, tracks=False, holds=False)
"""What most answers are."""


def _answer(decision: Decision, connection: _Connection) -> Answer:
    transaction = connection.transaction
    if (
        decision is CONTINUE
        and (transaction is None or transaction.state is None)
        and connection.failure is None
        and connection.state is None
    ):
        return GO_ON
    return Answer(
        decision,
        owes=connection.failure is not None,
        tracks=transaction is not None and transaction.state is not None,
        holds=connection.state is not None,
    )


def _address(fields: _Fields) -> Address:
    return Address.from_arguments(list(itertools.islice(fields, int(next(fields)))))


def _status(decision: Decision) -> Status:
    return decision.status if isinstance(decision, Reply) else decision


def _decides(stage: Stage, status: Status) -> bool:
    """Is the message over with this verdict? A refused recipient is not the message. See ends_message() in C."""
    if stage is _RCPT:
        return status in (Status.ACCEPT, Status.DISCARD)
    return status not in (CONTINUE, Status.SKIP)


def _fitting(decision: Decision, stage: Stage) -> Decision:
    """The policy's answer, where the stage has a meaning for it; else to go on, as ACCEPT of an unknown command."""
    return decision if _status(decision) in MEANINGFUL[stage] else CONTINUE


def _whole(transaction: Transaction | None, call: Call, spool: Spool) -> Message:
    assert transaction is not None, "the end of a message without a message"
    if transaction.message is None:
        raise spool.failed(call.content.error)
    return transaction.message


def _require_granted(edits: Sequence[Change], call: Call) -> None:
    missing = needed(edits) & ~call.granted_actions
    if missing:
        raise ActionError(
            f"the edits of the message were not sent: they need {Actions(missing)!r}, which the MTA did not grant "
            "(or Milter(actions=…) did not ask for it)"
        )


def _require_one_body(edits: Sequence[Change], connection: _Connection) -> None:
    transaction = connection.transaction
    if transaction is not None and transaction.body_replaced and any(change.letter == "b" for change in edits):
        raise ActionError(
            "the body was replaced through the context, and then edited in the message: the MTA would append one to "
            "the other. Use message.body alone"
        )


def _numbering(call: Call) -> Numbering:
    """How this MTA counts header fields. Postfix says who it is unasked (MILTER_README, macro v)."""
    version = call.macro(b"v")
    return Numbering.of(None if version is None else version.decode("utf-8", "surrogateescape"))


def _on_one_line(decision: Decision) -> str:
    return str(decision).replace("\n", " / ")


def _queue_id(call: Call) -> str | None:
    try:
        value = call.macro(b"i")
    except MilterError:
        return None
    return value.decode("utf-8", "backslashreplace") if value is not None else None
