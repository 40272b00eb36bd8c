# SPDX-License-Identifier: GPL-3.0-or-later
"""What became of a message: `Result`, what a test makes its assertions about.

A `Result` joins three things: what the filter said (the `Transcript`), what the MTA makes of it by its rules
(a `DeliveryModel`), and, of a filter in this process, what its handlers raised.
"""

import email
import email.policy
from collections.abc import Iterator, Mapping
from dataclasses import replace
from email.message import EmailMessage
from typing import Any

from milter.testing import story
from milter.testing.client import Outcome, StageAnswer, Transcript
from milter.testing.delivery import Delivery, DeliveryModel, Header, Message, ModificationError
from milter.testing.wire import AddHeader, Change, Command, InsertHeader, ReplaceHeader, Steps
from milter.verdict import Status

__all__ = ["DeliveredHeaders", "MailBytes", "NotDeliveredError", "Result"]

_VERDICTS = {
    Outcome.ACCEPTED: Status.ACCEPT,
    Outcome.REJECTED: Status.REJECT,
    Outcome.TEMPFAILED: Status.TEMPFAIL,
    Outcome.DISCARDED: Status.DISCARD,
}


class NotDeliveredError(AssertionError):
    """A test asked for what was delivered, and nothing was."""


class MailBytes(bytes):
    """A message in bytes, of which pytest shows the lines that differ."""


class DeliveredHeaders(Mapping[str, str]):
    """The header fields of a delivered message: names in any case; of a repeated one `get_all` has all.

    Values are what follows the colon and one space; folds are LF and white space.
    """

    def __init__(self, fields: tuple[Header, ...]) -> None:
        self._fields = fields

    def __getitem__(self, name: str) -> str:
        """The first value of this name."""
        for value in self.get_all(name):
            return value
        raise KeyError(f"{name} (there are: {', '.join(self) or 'none'})")

    def get_all(self, name: str) -> list[str]:
        """All values of this name, in order; none: an empty list."""
        return [field.value for field in self._fields if field.name.lower() == name.lower()]

    def fields(self) -> list[tuple[str, str]]:
        """All names and values, in order."""
        return [(field.name, field.value) for field in self._fields]

    def __iter__(self) -> Iterator[str]:
        """The names, in order, each once, as the first field of it is spelled."""
        names: dict[str, str] = {}
        for field in self._fields:
            names.setdefault(field.name.lower(), field.name)
        return iter(names.values())

    def __len__(self) -> int:
        """The number of names."""
        return len(list(iter(self)))

    def __repr__(self) -> str:
        return f"DeliveredHeaders({self.fields()!r})"


class Result:
    """What became of a message.

    The ``repr`` is one line; ``str``, or ``print``, tells all of it: the conversation stage by stage, the changes,
    and what differs between the message as sent and as delivered. So does pytest when the test fails.
    """

    def __init__(
        self, transcript: Transcript, model: DeliveryModel, errors: tuple[BaseException, ...], transaction: Any
    ) -> None:
        self.transcript = transcript
        """Everything the filter said, for whoever needs more than what is here."""
        self.mta = model
        """The rules by which `reply` and `message` were made."""
        self.errors = errors
        """The exceptions that handlers raised; always empty for a filter in another process."""
        self.transaction = transaction
        """What ``ctx.transaction`` was; None if no handler looked at it, or in another process."""
        self._delivery: Delivery | None = None
        self._refusal: ModificationError | None = None
        if transcript.outcome is Outcome.ACCEPTED:
            try:
                self._delivery = transcript.delivery(model)
            except ModificationError as refusal:
                self._refusal = refusal

    # -- the verdict

    @property
    def verdict(self) -> Status:
        """``ACCEPT``, ``REJECT``, ``TEMPFAIL`` or ``DISCARD``: what became of the message as a whole.

        A recipient who is refused is not the message, unless it is the last one: see `refused`.
        """
        if self._refusal is not None:
            return Status.TEMPFAIL
        return _VERDICTS[self.transcript.outcome or Outcome.TEMPFAILED]

    @property
    def accepted(self) -> bool:
        """The message was taken, to be delivered, or held if it is `quarantined`."""
        return self.verdict is Status.ACCEPT

    @property
    def rejected(self) -> bool:
        """Refused for good, with a reply of 5xx."""
        return self.verdict is Status.REJECT

    @property
    def deferred(self) -> bool:
        """Refused for now, with a reply of 4xx: the client shall try again."""
        return self.verdict is Status.TEMPFAIL

    @property
    def discarded(self) -> bool:
        """The client was told that the message was taken, and it was thrown away."""
        return self.verdict is Status.DISCARD

    @property
    def quarantined(self) -> bool:
        """The message was taken, and is held instead of delivered."""
        return self.quarantine is not None

    @property
    def quarantine(self) -> str | None:
        """Why it is held; None if it is not."""
        return self._delivery.quarantine if self._delivery is not None else None

    @property
    def stage(self) -> str | None:
        """The stage that decided, ``rcpt`` also if it refused all recipients; None if the filter never did."""
        decision = self._decision
        return None if decision is None else story.stage_name(decision.stage)

    @property
    def _decision(self) -> StageAnswer | None:
        if self.transcript.decision is not None or self._refusal is not None or self.accepted:
            return self.transcript.decision
        refusals = [entry for entry in self.transcript.of(Command.RCPT) if _refuses(entry)]
        return next(entry for entry in reversed(refusals) if entry.answer and entry.answer.tempfails is self.deferred)

    # -- what the SMTP client is told

    @property
    def reply(self) -> str:
        """The SMTP reply that tells the client what became of its message; lines are separated by LF.

        That is the reply to the stage that decided, or to the end of the message; if all recipients were
        refused, the one to the last of them (who was refused for now, if there is such a one).
        """
        if self._refusal is not None:
            return self._refusal.reply
        if self.verdict in (Status.ACCEPT, Status.DISCARD):
            return self.mta.accepted.format(self.queue_id)
        decision = self._decision
        assert decision is not None, "a message that nobody refused was refused"
        return self._reply_to(decision)

    @property
    def code(self) -> int:
        """The code of `reply`, say 250 or 550."""
        return int(self.reply[:3])

    @property
    def refused(self) -> dict[str, str]:
        """The recipients who were refused, and the reply to each."""
        refused = [entry for entry in self.transcript.of(Command.RCPT) if _refuses(entry)]
        return {entry.argument.partition(">")[0].removeprefix("<"): self._reply_to(entry) for entry in refused}

    @property
    def queue_id(self) -> str:
        """The MTA's name of the message; empty if it came to none."""
        return self.transcript.queue_id

    def _reply_to(self, entry: StageAnswer) -> str:
        assert entry.answer is not None, "a stage without an answer refuses nobody"
        return self.mta.reply(entry.stage, entry.answer, entry.argument.split(" ")[0]).replace("\r\n", "\n")

    # -- what the filter said

    @property
    def answers(self) -> tuple[StageAnswer, ...]:
        """Each stage with its argument and the filter's answer; None where it was not asked, or does not reply."""
        return tuple(self.transcript.stages)

    @property
    def actions(self) -> tuple[Change, ...]:
        """The changes that the filter asked for, in order, whether or not the message was accepted.

        Values of header fields are as handlers have them, also where the space after the colon goes over the wire.
        """
        changes = self.transcript.end.changes if self.transcript.end is not None else ()
        if not self.transcript.negotiated.steps & Steps.LEADING_SPACE:
            return changes
        return tuple(_without_space(change) for change in changes)

    # -- what is delivered

    @property
    def delivery(self) -> Delivery:
        """All that goes on to the next hop, the MTA's own Received field included.

        This, and all that is below, raises `NotDeliveredError` (an ``AssertionError``) if nothing is delivered.
        """
        if self._delivery is None:
            raise NotDeliveredError(f"nothing was delivered: {story.summary(self)}")
        return self._delivery

    @property
    def sender(self) -> str:
        """The envelope's sender, without brackets."""
        return self.delivery.envelope.sender.address

    @property
    def recipients(self) -> list[str]:
        """The envelope's recipients, without brackets. Nobody, if nothing is delivered."""
        if self._delivery is None:
            return []
        return [mailbox.address for mailbox in self._delivery.envelope.recipients]

    @property
    def delivered(self) -> Message:
        """The message, without the MTA's own Received field."""
        return self.delivery.without_trace()

    @property
    def message(self) -> bytes:
        """The message in bytes, lines ended by CRLF, without the MTA's own Received field."""
        return MailBytes(self.delivered.as_bytes())

    @property
    def headers(self) -> DeliveredHeaders:
        """Its header fields, without the MTA's own Received."""
        return DeliveredHeaders(self.delivered.headers)

    @property
    def body(self) -> bytes:
        """Its body, lines ended by CRLF."""
        return self.delivered.body

    def email(self) -> EmailMessage:
        """The message, parsed by Python's ``email`` package."""
        return email.message_from_bytes(self.message, policy=email.policy.default)

    @property
    def sent(self) -> bytes:
        """The message as it was sent, before the filter changed it."""
        return MailBytes(self.transcript.message.as_bytes())

    # -- for people

    def diff(self) -> str:
        """What the filter changed of envelope and message, as a unified diff; empty if nothing."""
        return "\n".join(story.diff(self))

    def __str__(self) -> str:
        return "\n".join(story.tell(self))

    def __repr__(self) -> str:
        return f"<Result: {story.summary(self)}>"


def _without_space(change: Change) -> Change:
    if isinstance(change, AddHeader | InsertHeader | ReplaceHeader):
        return replace(change, value=change.value.removeprefix(" "))
    return change


def _refuses(entry: StageAnswer) -> bool:
    return entry.answer is not None and (entry.answer.rejects or entry.answer.tempfails)
