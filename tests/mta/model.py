# SPDX-License-Identifier: GPL-3.0-or-later
"""Plays a scenario on a model of `milter.testing`: its client sends the messages to the real filter.

The models know whole messages. A scenario with anything else (RSET, TLS, a second filter, settings of a server)
is not for them; `is_modelled` tells.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from milter.testing import (
    Answer,
    Client,
    ClientAddress,
    Command,
    Delivery,
    DeliveryModel,
    Envelope,
    Mailbox,
    Message,
    ModificationError,
    Outcome,
    Postfix,
    Sendmail,
    Session,
    Transcript,
)

from .play import PASSED_ON, mail_differences, marked
from .scenario import NOBODY, Expected, Mail, Script, Sent, mailbox
from .server import DOMAIN

MODELS: dict[str, type[DeliveryModel]] = {"postfix": Postfix, "sendmail": Sendmail}

# Who the client says it is, by the macro v.
_VERSIONS = {"postfix": "Postfix 3.7.11", "sendmail": "8.17.1.9"}
_TRACE = f"Received: from client.test\n\tby {DOMAIN}"
_COMMAND = re.compile(rb"(EHLO|MAIL FROM:(?=<)|RCPT TO:(?=<)|DATA)[^\r]*\r\n")
_PATH = re.compile(r"[^<]*<([^>]*)>(.*)")
_CONTENT = (Command.HEADER, Command.EOH, Command.BODY, Command.END_OF_MESSAGE)


@dataclass
class Transaction:
    """A message of the client, and the replies that are due."""

    mail: tuple[Mailbox, Expected]
    rcpts: list[tuple[Mailbox, Expected]] = field(default_factory=list)
    data: Expected | None = None
    end: Expected | None = None
    content: bytes = b""


def is_modelled(script: Script) -> bool:
    """Whether the models know all that happens in the scenario."""
    plain = len(script.filters) == 1 and script.filters[0].command != NOBODY and not script.settings
    deadly = any(word in order.text for each in script.filters for order in each.orders for word in ("die()", "hang()"))
    return plain and not deadly and not (script.submitted or script.unmodelled) and _transactions(script) is not None


def model_differences(script: Script, server: str, socket: str) -> list[str]:
    """What differs between the model and what is written, each with its line."""
    transactions = _transactions(script)
    assert transactions is not None
    found: list[tuple[int, str]] = []
    deliveries: list[Delivery] = []
    client = Client.connect(socket)
    for transaction in transactions:
        transcript = _send(client, server, transaction)
        mta = MODELS[server](client.negotiated.steps, _TRACE)
        found += _reply_differences(mta, transaction, transcript)
        if transcript.outcome is Outcome.ACCEPTED:
            try:
                deliveries.append(transcript.delivery(mta))
            except ModificationError as error:
                found += _expect(transaction.end, error.reply)
    client.finish()
    arrived = [delivery for delivery in deliveries if delivery.envelope.recipients]
    delivered = [_mail(delivery) for delivery in arrived if delivery.quarantine is None]
    held = [_mail(delivery) for delivery in arrived if delivery.quarantine is not None]
    found += mail_differences("delivered", script.delivered, delivered)
    found += mail_differences("held", script.held, held)
    return [f"line {number}: {problem}" for number, problem in found]


# ---- from a dialogue to messages


def _transactions(script: Script) -> list[Transaction] | None:
    """The messages of the dialogue; None where it holds anything else."""
    found: list[Transaction] = []
    steps = list(script.steps)
    content: bytes | None = None
    for place, step in enumerate(steps):
        if isinstance(step, Expected):
            continue
        if not isinstance(step, Sent):
            return None
        due = steps[place + 1] if place + 1 < len(steps) else None
        if content is not None:
            content += step.raw
            if step.raw == b".\r\n" and isinstance(due, Expected):
                found[-1].content, found[-1].end = _undotted(content), due
                content = None
            continue
        if step.raw == b"RSET\r\n" and _is_refused(found):
            continue  # the client of the models ends each message by itself
        match = _COMMAND.fullmatch(step.raw)
        if match is None or not isinstance(due, Expected):
            return None
        if match[1] == b"MAIL FROM:":
            found.append(Transaction((_mailbox(step.raw), due)))
        elif match[1] == b"RCPT TO:":
            found[-1].rcpts.append((_mailbox(step.raw), due))
        elif match[1] == b"DATA":
            found[-1].data = due
            content = b"" if due.code == 354 else None
    complete = all(transaction.rcpts or transaction.mail[1].code >= 400 for transaction in found)
    return found if found and complete else None


def _is_refused(transactions: list[Transaction]) -> bool:
    """Whether the last message has ended before its content, and only then."""
    if not transactions:
        return False
    last = transactions[-1]
    return last.mail[1].code >= 400 or (last.data is not None and last.data.code != 354)


def _mailbox(command: bytes) -> Mailbox:
    match = _PATH.fullmatch(command.decode("utf-8", "surrogateescape").strip("\r\n"))
    assert match is not None, command
    return Mailbox(match[1], tuple(match[2].split()))


def _undotted(content: bytes) -> bytes:
    return re.sub(rb"(?m)^\.", b"", content.removesuffix(b".\r\n"))


def _send(client: Client, server: str, transaction: Transaction) -> Transcript:
    # The client of the models wants a recipient even where the sender is refused.
    recipients = tuple(recipient for recipient, _ in transaction.rcpts) or (Mailbox("bob@sink.test"),)
    envelope = Envelope(transaction.mail[0], recipients)
    address = ClientAddress.of("127.0.0.1", 49152)
    session = Session("[127.0.0.1]", address, "client.test", {"v": _VERSIONS[server]})
    return client.send_message(envelope, Message.parse(transaction.content), session)


# ---- what differs


def _reply_differences(
    mta: DeliveryModel, transaction: Transaction, transcript: Transcript
) -> Iterator[tuple[int, str]]:
    """The replies up to the one that ends the message; what comes then is the server's own business."""
    decision = transcript.decision
    sender, due = transaction.mail
    if decision is not None and decision.stage in (Command.CONNECT, Command.HELO, Command.MAIL):
        refusal = _refusal(mta, decision.stage, decision.answer, sender)
        yield from _expect(due, refusal)
        if refusal != "250":
            return
    else:
        yield from _expect(due, "250")
    answers = transcript.of(Command.RCPT)
    for place, (recipient, due) in enumerate(transaction.rcpts):
        answer = answers[place].answer if place < len(answers) else None
        yield from _expect(due, _refusal(mta, Command.RCPT, answer, recipient))
    if decision is None and transcript.outcome in (Outcome.REJECTED, Outcome.TEMPFAILED):
        return
    at_data = decision is not None and decision.stage is Command.DATA
    reply = _refusal(mta, Command.DATA, decision.answer if decision and at_data else None)
    yield from _expect(transaction.data, "354" if reply == "250" else reply)
    if decision is not None and decision.stage in _CONTENT:
        yield from _expect(transaction.end, _refusal(mta, decision.stage, decision.answer))
    elif reply == "250":
        yield from _expect(transaction.end, "250")


def _refusal(mta: DeliveryModel, stage: Command, answer: Answer | None, address: Mailbox | None = None) -> str:
    """What the client is told because of the answer; `250` where that is no refusal."""
    if answer is None or not (answer.rejects or answer.tempfails):
        return "250"
    return mta.reply(stage, answer, address.path if address else "")


def _expect(due: Expected | None, reply: str) -> Iterator[tuple[int, str]]:
    """Without a text, only the code is known to the model."""
    if due is None:
        yield 0, f"the model would be told {reply}, and the dialogue has no reply there"
        return
    lines = reply.split("\r\n")
    code = int(lines[0][:3])
    texts = tuple(line[4:] for line in lines)
    if code != due.code or (due.lines is not None and any(texts) and texts != due.lines):
        yield due.number, f"the model says {reply!r}, and not {due}"


def _mail(delivery: Delivery) -> Mail:
    recipients = sorted(mailbox(each.address, _passed_on(each)) for each in delivery.envelope.recipients)
    sender = delivery.envelope.sender
    content = marked(delivery.message.as_bytes())
    return Mail(0, mailbox(sender.address, _passed_on(sender)), tuple(recipients), content, delivery.quarantine or "")


def _passed_on(address: Mailbox) -> list[str]:
    return [param for param in address.params if param.partition("=")[0].upper() in PASSED_ON]
