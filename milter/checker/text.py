# SPDX-License-Identifier: GPL-3.0-or-later
"""Results of ``milter check``, told to people."""

from collections import Counter
from collections.abc import Iterable, Iterator

from milter.checker.diff import lines_of, unified, visible
from milter.checker.sending import Result
from milter.printable import printable
from milter.testing.client import Outcome, Transcript
from milter.testing.delivery import Delivery
from milter.testing.wire import Command, ReplaceBody, encode_text
from milter.testing.words import answer_text, change_text


def stage_name(stage: Command) -> str:
    """The name of a stage in the output, and in options."""
    return "end" if stage is Command.END_OF_MESSAGE else stage.name.lower()


def verdict_word(result: Result) -> str:
    """The verdict, or ``failed`` where there is none."""
    return result.outcome.value if result.outcome else "failed"


def result_lines(result: Result) -> Iterator[str]:
    """All of a result but what is delivered."""
    if result.transcript is None:
        return
    yield from _stage_lines(result.transcript)
    if result.outcome is None:
        return
    yield ""
    yield f"verdict   {_verdict(result)}"
    yield from _column("reply", _replies(result))
    yield from _column("changes", _changes(result))


def brief_lines(result: Result) -> Iterator[str]:
    """A result in a line."""
    verdict = verdict_word(result)
    reply = printable(" / ".join(result.reply)) if result.outcome in (Outcome.REJECTED, Outcome.TEMPFAILED) else ""
    yield f"{verdict:<9} {printable(result.name)}" + (f": {reply}" if reply else "")


def diff_lines(result: Result) -> Iterator[str]:
    """What the filter would change, envelope and message, as unified diffs."""
    before, after = result.untouched, result.delivery
    if before is None or after is None:
        return
    lines = [
        *unified(_envelope_lines(before), _envelope_lines(after), "envelope"),
        *unified(lines_of(before.message), lines_of(after.message), "message"),
    ]
    yield ""
    yield from lines or ["nothing would change"]


def delivery_lines(result: Result) -> Iterator[str]:
    """All of what is delivered."""
    delivery = result.delivery
    if delivery is None:
        return
    yield ""
    if not delivery.envelope.recipients:
        yield "nothing is delivered: no recipient is left"
        return
    yield from map(visible, _envelope_lines(delivery))
    yield ""
    yield from map(visible, lines_of(delivery.message))


def summary_lines(verdicts: Counter[str]) -> Iterator[str]:
    """How many messages had which verdict."""
    counts = ", ".join(f"{verdict} {count}" for verdict, count in sorted(verdicts.items()))
    yield f"{verdicts.total()} messages: {counts}" if counts else "no message was sent"


def _stage_lines(transcript: Transcript) -> Iterator[str]:
    for entry in transcript.stages:
        argument = printable(entry.argument)
        if len(argument) > 60:
            argument = argument[:57] + "..."
        yield f"{stage_name(entry.stage):<9} {argument:<60} {answer_text(transcript, entry)}".rstrip()


def _verdict(result: Result) -> str:
    assert result.outcome is not None
    word = result.outcome.value
    if result.refusal is not None:
        return f"{word} by the MTA: {printable(str(result.refusal))}"
    if result.decided_at is None and result.outcome is not Outcome.ACCEPTED:
        return f"{word}: no recipient is left"
    decision = f" at {stage_name(result.decided_at)}" if result.decided_at else ""
    if result.delivery is not None and result.delivery.quarantine is not None:
        return f"{word}{decision}, but quarantined: {printable(result.delivery.quarantine)}"
    return f"{word}{decision}"


def _replies(result: Result) -> Iterator[str]:
    """What the SMTP client is told, line by line: of refused recipients, and of the message."""
    for argument, (first, *more) in result.refused_recipients:
        yield f"{printable(first)}   (to RCPT TO:{printable(argument)})"
        yield from map(printable, more)
    yield from map(printable, result.reply)


def _changes(result: Result) -> Iterator[str]:
    body: list[bytes] = []
    for change in result.changes:
        if isinstance(change, ReplaceBody):
            body.append(change.chunk)
        else:
            yield change_text(change)
    if body:
        yield f"replace the body: {sum(map(len, body))} bytes"
    if result.progress:
        yield f"(progress reported: {result.progress})"


def _envelope_lines(delivery: Delivery) -> list[bytes]:
    sender, recipients = delivery.envelope.sender, delivery.envelope.recipients
    return [encode_text(line) for line in (f"MAIL FROM:{sender}", *(f"RCPT TO:{mailbox}" for mailbox in recipients))]


def _column(title: str, lines: Iterable[str]) -> Iterator[str]:
    for number, line in enumerate(lines):
        yield f"{title if number == 0 else '':<9} {line}"
