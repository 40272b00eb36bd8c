# SPDX-License-Identifier: GPL-3.0-or-later
"""The command ``milter check``: play the MTA, send a message to a milter, and show what comes of it.

It uses ``milter.testing`` for the protocol and for the rules of the MTAs, and prints; ``milter.cli``
calls `add_arguments` and `main`.

The exit code says what an SMTP client would be told: 0 for 2xx, 1 for 5xx, 75 for 4xx (sysexits.h,
EX_TEMPFAIL). A message that is discarded or quarantined counts as accepted, since the client
cannot tell; the output can. 2 means that there was no verdict: the milter could not be reached,
broke the protocol, or the message could not be read.
"""

import argparse
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from milter.errors import MilterError
from milter.printable import printable
from milter.testing.client import (
    Client,
    ClientAddress,
    Outcome,
    Session,
    StageAnswer,
    Transcript,
)
from milter.testing.delivery import Delivery, DeliveryModel, Envelope, Message, ModificationError, Postfix, Sendmail
from milter.testing.wire import (
    AddHeader,
    AddRecipient,
    Answer,
    Change,
    Command,
    InsertHeader,
    Quarantine,
    RemoveRecipient,
    ReplaceBody,
    ReplaceHeader,
    ReplaceSender,
    Verdict,
    WireError,
    decode_text,
)

ACCEPTED, REJECTED, FAILED, TEMPFAILED = 0, 1, 2, 75

_EXIT_CODES = {
    Outcome.ACCEPTED: ACCEPTED,
    Outcome.DISCARDED: ACCEPTED,
    Outcome.REJECTED: REJECTED,
    Outcome.TEMPFAILED: TEMPFAILED,
}

_MTAS: dict[str, type[DeliveryModel]] = {"postfix": Postfix, "sendmail": Sendmail}

SAMPLE_MESSAGE = b"""\
From: Ann <ann@client.example>
To: Bob <bob@mta.example>
Date: Thu, 01 Jan 2026 12:00:00 +0000
Message-ID: <sample@client.example>
Subject: A sample message
MIME-Version: 1.0
Content-Type: text/plain; charset=utf-8

Hello Bob,

this message was sent by "milter check".

Ann
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line of ``milter check``."""
    parser.description = (
        "Play the MTA: send a message to a running milter, the way Postfix does, and show what the milter "
        "answers at each stage and what would be delivered. Nothing is sent anywhere else."
    )
    parser.epilog = (
        "exit code: 0 accepted (also when discarded or quarantined: the client is told 250), "
        "1 rejected, 75 deferred, 2 no verdict (milter not reached, protocol broken, message not readable)"
    )
    parser.add_argument("socket", help="where the milter listens: inet:port@host, inet6:port@host, unix:path")
    parser.add_argument("message", nargs="?", help="a file with a message, - for standard input [a sample]")
    parser.add_argument(
        "--from",
        dest="sender",
        default="ann@client.example",
        metavar="ADDRESS",
        help="the envelope's sender, <> for none [%(default)s]",
    )
    parser.add_argument(
        "--to",
        dest="recipients",
        action="append",
        metavar="ADDRESS",
        help="a recipient; repeat for more [bob@mta.example]",
    )
    parser.add_argument(
        "--helo", default="client.example", metavar="NAME", help="what the client calls itself [%(default)s]"
    )
    parser.add_argument(
        "--client",
        type=parse_client,
        default="client.example[192.0.2.1]",
        metavar="NAME[ADDRESS]",
        help="who connects: an IP address, or a name with the address in brackets [%(default)s]",
    )
    parser.add_argument("--mta", choices=sorted(_MTAS), default="postfix", help="whose replies and delivery to show")
    parser.add_argument(
        "--timeout", type=_seconds, default=30.0, metavar="SECONDS", help="for each answer [%(default)g]"
    )


def main(args: argparse.Namespace) -> int:
    """Run ``milter check``; returns the exit code."""
    try:
        message = _read_message(args.message)
    except OSError as error:
        return _fail(f"the message cannot be read: {error}")
    try:
        client = Client.connect(args.socket, args.timeout)
    except MilterError as error:
        return _fail(str(error))
    with client:
        return _check(client, args, message)


def _check(client: Client, args: argparse.Namespace, message: Message) -> int:
    hostname, address = args.client
    session = Session(hostname, address, args.helo)
    envelope = Envelope.of(args.sender, *(args.recipients or ["bob@mta.example"]))
    try:
        transcript = client.send_message(envelope, message, session)
    except WireError as error:
        if client.transcript is not None:
            _print(_stage_lines(client.transcript))
        return _fail(f"no verdict from {args.socket}: {error}; look into the log of the milter")
    client.finish()
    trace = f"Received: from {session.helo} ({hostname} [{address.address}])\n\tby mta.example"
    return _report(transcript, _MTAS[args.mta](transcript.negotiated.steps, trace))


def parse_client(text: str) -> tuple[str, ClientAddress]:
    """The client's name and address from ``name[address]``, or from an address without a name.

    A client without a name has its address in brackets for one, as with Postfix and Sendmail.

    >>> parse_client("mail.client.example[192.0.2.8]")[0], parse_client("192.0.2.8")[0]
    ('mail.client.example', '[192.0.2.8]')
    """
    match = re.fullmatch(r"([^\[\]]*)\[([^\[\]]+)\]", text)
    name, address = (match[1], match[2]) if match else ("", text)
    try:
        return name or f"[{address}]", ClientAddress.of(address, 49152)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error}: write 192.0.2.8 or name[192.0.2.8]") from None


def _seconds(text: str) -> float:
    seconds = float(text)  # argparse words the ValueError
    if not 0 < seconds < 1e6:
        raise argparse.ArgumentTypeError(f"{text} is no time to wait: write a number of seconds above 0")
    return seconds


def _read_message(path: str | None) -> Message:
    if path is None:
        return Message.parse(SAMPLE_MESSAGE)
    return Message.parse(sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes())


# ---- what is shown


def _visible_line(text: str) -> str:
    """As `printable`, but a tab is a tab: headers are folded with it."""
    return "\t".join(printable(part) for part in text.split("\t"))


def _report(transcript: Transcript, mta: DeliveryModel) -> int:
    """Print everything; returns the exit code."""
    _print(_stage_lines(transcript))
    outcome = transcript.outcome or Outcome.ACCEPTED
    delivery: Delivery | None = None
    refusal: ModificationError | None = None
    if outcome is Outcome.ACCEPTED:
        try:
            delivery = transcript.delivery(mta)
        except ModificationError as error:
            refusal, outcome = error, Outcome.TEMPFAILED
    _print(["", f"verdict   {_verdict(transcript, outcome, delivery, refusal)}"])
    _print(_column("reply", _replies(transcript, mta, outcome, refusal)))
    _print(_column("changes", _changes(transcript)))
    if delivery is not None:
        _print(_delivery_lines(delivery))
    return _EXIT_CODES[outcome]


def _stage_lines(transcript: Transcript) -> Iterator[str]:
    for entry in transcript.stages:
        argument = printable(entry.argument)
        if len(argument) > 60:
            argument = argument[:57] + "..."
        yield f"{_stage_name(entry.stage):<9} {argument:<60} {_answer_text(transcript, entry)}"


def _stage_name(stage: Command) -> str:
    return "end" if stage is Command.END_OF_MESSAGE else stage.name.lower()


def _answer_text(transcript: Transcript, entry: StageAnswer) -> str:
    if entry.answer is not None:
        return printable(str(entry.answer))
    return "(not wanted)" if transcript.negotiated.declines(entry.stage) else "(no reply)"


def _verdict(
    transcript: Transcript, outcome: Outcome, delivery: Delivery | None, refusal: ModificationError | None
) -> str:
    if refusal is not None:
        return f"{outcome.value} by the MTA: {printable(str(refusal))}"
    if transcript.decision is None and outcome is not Outcome.ACCEPTED:
        return f"{outcome.value}: no recipient is left"
    decision = f" at {_stage_name(transcript.decision.stage)}" if transcript.decision else ""
    if delivery is not None and delivery.quarantine is not None:
        return f"{outcome.value}{decision}, but quarantined: {printable(delivery.quarantine)}"
    return f"{outcome.value}{decision}"


def _replies(
    transcript: Transcript, mta: DeliveryModel, outcome: Outcome, refusal: ModificationError | None
) -> Iterator[str]:
    """What the SMTP client is told, line by line: of refused recipients, and of the message."""
    for entry in transcript.of(Command.RCPT):
        if _refuses(entry) and entry is not transcript.decision:
            first, *more = _refusal(mta, entry)
            yield f"{first}   (to RCPT TO:{printable(entry.argument)})"
            yield from more
    if refusal is not None:
        yield refusal.reply
    elif outcome in (Outcome.ACCEPTED, Outcome.DISCARDED):
        yield "250 2.0.0 Ok"
    elif transcript.decision is not None:
        yield from _refusal(mta, transcript.decision)


def _refuses(entry: StageAnswer) -> bool:
    return entry.answer is not None and (entry.answer.rejects or entry.answer.tempfails)


def _refusal(mta: DeliveryModel, entry: StageAnswer) -> list[str]:
    answer = entry.answer or Answer(Verdict.CONTINUE)
    reply = mta.reply(entry.stage, answer, entry.argument.split(" ")[0])
    return [printable(line) for line in reply.split("\r\n")]


def _changes(transcript: Transcript) -> Iterator[str]:
    if transcript.end is None:
        return
    body: list[bytes] = []
    for change in transcript.end.changes:
        if isinstance(change, ReplaceBody):
            body.append(change.chunk)
        else:
            yield printable(_change_text(change))
    if body:
        yield f"replace the body: {sum(map(len, body))} bytes"
    if transcript.end.progress:
        yield f"(progress reported: {transcript.end.progress})"


def _change_text(change: Change) -> str:
    match change:
        case AddHeader(name, value):
            return f"add header {name}: {value}"
        case InsertHeader(index, name, value):
            return f"insert header at {index}, {name}: {value}"
        case ReplaceHeader(index, name, ""):
            return f"delete header {name}, number {index}"
        case ReplaceHeader(index, name, value):
            return f"replace header {name}, number {index}: {value}"
        case ReplaceSender(sender, params):
            return f"replace sender {sender} {params or ''}".rstrip()
        case AddRecipient(recipient, params):
            return f"add recipient {recipient} {params or ''}".rstrip()
        case RemoveRecipient(recipient):
            return f"remove recipient {recipient}"
        case Quarantine(reason):
            return f"quarantine: {reason}"
        case ReplaceBody(chunk):
            return f"replace the body: {len(chunk)} bytes"


def _delivery_lines(delivery: Delivery) -> Iterator[str]:
    yield ""
    if not delivery.envelope.recipients:
        yield "nothing is delivered: no recipient is left"
        return
    yield f"MAIL FROM:{printable(str(delivery.envelope.sender))}"
    for mailbox in delivery.envelope.recipients:
        yield f"RCPT TO:{printable(str(mailbox))}"
    yield ""
    for header in delivery.message.headers:
        for line in header.raw.split("\n"):
            yield _visible_line(line)
    yield ""
    for body_line in delivery.message.body.split(b"\r\n")[:-1]:
        yield _visible_line(decode_text(body_line))


def _column(title: str, lines: Iterable[str]) -> Iterator[str]:
    for number, line in enumerate(lines):
        yield f"{title if number == 0 else '':<9} {line}"


def _print(lines: Iterable[str]) -> None:
    """Print lines, also to a terminal whose encoding lacks their characters."""
    encoding = sys.stdout.encoding or "ascii"
    for line in lines:
        print(line.rstrip(" ").encode(encoding, "backslashreplace").decode(encoding))


def _fail(problem: str) -> int:
    print(f"milter check: {printable(problem)}", file=sys.stderr)
    return FAILED
