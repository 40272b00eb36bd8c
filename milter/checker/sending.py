# SPDX-License-Identifier: GPL-3.0-or-later
"""One message, sent to the filter over a connection of its own, and what comes of it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from milter.checker.arguments import Order
from milter.checker.mails import MailError, Source, as_received
from milter.errors import MilterError
from milter.testing.client import Client, Outcome, Session, StageAnswer, Transcript
from milter.testing.delivery import Delivery, Message, ModificationError, Postfix, Sendmail
from milter.testing.wire import (
    MACRO_STAGES,
    AddHeader,
    Answer,
    Change,
    Command,
    InsertHeader,
    Negotiated,
    ReplaceHeader,
    Steps,
    Verdict,
    WireError,
)

ACCEPTED, REJECTED, FAILED, INTERRUPTED, TEMPFAILED = 0, 1, 2, 130, 75

_EXIT_CODES = {
    Outcome.ACCEPTED: ACCEPTED,
    Outcome.DISCARDED: ACCEPTED,
    Outcome.REJECTED: REJECTED,
    Outcome.TEMPFAILED: TEMPFAILED,
    None: FAILED,
}
_FROM_GOOD_TO_BAD = (ACCEPTED, TEMPFAILED, REJECTED, FAILED, INTERRUPTED)

Rules: TypeAlias = Postfix | Sendmail


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a message, by the rules of an MTA.

    ``outcome`` is None when there is no verdict; then ``problem`` says why, and ``transcript`` has
    what was said before, if anything. ``delivery`` is there for what was accepted, with ``untouched``,
    which would be delivered without a filter. ``refusal`` is the MTA's own, because of the changes.
    """

    name: str
    outcome: Outcome | None
    problem: str | None = None
    transcript: Transcript | None = None
    rules: Rules = field(default_factory=Postfix)
    delivery: Delivery | None = None
    untouched: Delivery | None = None
    refusal: ModificationError | None = None

    @property
    def exit_code(self) -> int:
        """That of ``milter check`` for this message alone."""
        return _EXIT_CODES[self.outcome]

    @property
    def decided_at(self) -> Command | None:
        """The stage that decided, or None: nobody did, or all recipients were refused, or the MTA refuses it."""
        decision = self.transcript.decision if self.transcript else None
        return decision.stage if decision and not self.refusal else None

    @property
    def reply(self) -> list[str]:
        """What the client is told of the message, line by line; nothing if no recipient was left to send it to."""
        if self.refusal is not None:
            return [self.refusal.reply]
        if self.outcome in (Outcome.ACCEPTED, Outcome.DISCARDED):
            return ["250 2.0.0 Ok"]
        decision = self.transcript.decision if self.transcript else None
        return self._refusal(decision) if decision is not None else []

    @property
    def refused_recipients(self) -> list[tuple[str, list[str]]]:
        """Recipients that were refused, as in their command, and what the client is told of each."""
        if self.transcript is None:
            return []
        refused = [entry for entry in self.transcript.of(Command.RCPT) if _refuses(entry)]
        return [(entry.argument, self._refusal(entry)) for entry in refused if entry is not self.transcript.decision]

    @property
    def changes(self) -> list[Change]:
        """The changes the filter asked for, headers without the leading space that may have been negotiated."""
        if self.transcript is None or self.transcript.end is None:
            return []
        spaced = bool(self.transcript.negotiated.steps & Steps.LEADING_SPACE)
        return [_unspaced(change) if spaced else change for change in self.transcript.end.changes]

    @property
    def progress(self) -> int:
        """How often the filter asked for patience."""
        return self.transcript.end.progress if self.transcript and self.transcript.end else 0

    def _refusal(self, entry: StageAnswer) -> list[str]:
        answer = entry.answer or Answer(Verdict.CONTINUE)
        return self.rules.reply(entry.stage, answer, entry.argument.split(" ")[0]).split("\r\n")


def _refuses(entry: StageAnswer) -> bool:
    return entry.answer is not None and (entry.answer.rejects or entry.answer.tempfails)


def _unspaced(change: Change) -> Change:
    if isinstance(change, AddHeader | InsertHeader | ReplaceHeader):
        return replace(change, value=change.value.removeprefix(" "))
    return change


def worst(exit_codes: Iterable[int]) -> int:
    """The exit code for several messages.

    >>> worst([0, 75, 1, 0])
    1
    """
    return max(exit_codes, key=_FROM_GOOD_TO_BAD.index, default=ACCEPTED)


def check(order: Order, source: Source) -> Result:
    """Read a message and send it. Whatever is wrong is told in the result."""
    try:
        message = as_received(source.read(), order.rules)
    except MailError as error:
        return Result(source.name, None, str(error))
    return check_message(order, source.name, message)


def check_message(order: Order, name: str, message: Message) -> Result:
    """Send a message that was read."""
    try:
        client = Client.connect(order.socket, order.timeout)
    except MilterError as error:
        return Result(name, None, str(error))
    with client:
        try:
            offer = order.offer
            negotiated = client.negotiate(offer.version, offer.actions, offer.steps)
            transcript = client.send_message(order.envelope, message, session_for(order, negotiated))
        except WireError as error:
            problem = f"no verdict from {order.socket}: {error}; look into the log of the filter"
            return Result(name, None, problem, client.transcript)
        client.finish()
    return _judge(name, transcript, order)


def session_for(order: Order, negotiated: Negotiated) -> Session:
    """The session, with the macros that no list names among those of CONNECT, so that none is lost."""
    lists = [
        negotiated.macros.get(number, "").strip() or order.session.unasked.get(stage, "")
        for number, stage in MACRO_STAGES.items()
    ]
    named = {name for names in lists for name in names.split()}
    homeless = {name: value for name, value in order.loose_macros.items() if name not in named}
    at_connect = {**homeless, **order.session.stage_macros.get(Command.CONNECT, {})}
    macros: Mapping[Command, Mapping[str, str]] = {**order.session.stage_macros, Command.CONNECT: at_connect}
    return replace(order.session, stage_macros=macros)


def _judge(name: str, transcript: Transcript, order: Order) -> Result:
    session = order.session
    trace = f"Received: from {session.helo} ({session.hostname} [{session.address.address}])\n\tby mta.example"
    rules = order.rules(transcript.negotiated.steps, trace)
    result = Result(name, transcript.outcome, transcript=transcript, rules=rules)
    if transcript.outcome is not Outcome.ACCEPTED:
        return result
    untouched = rules.deliver(transcript.envelope, transcript.message)
    try:
        return replace(result, delivery=transcript.delivery(rules), untouched=untouched)
    except ModificationError as refusal:
        return replace(result, outcome=Outcome.TEMPFAILED, refusal=refusal)
