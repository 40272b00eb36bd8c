# SPDX-License-Identifier: GPL-3.0-or-later
"""A `Result` told to people: its conversation stage by stage, its changes, and a diff of the message.

Everything is printable: what strangers or filters say is escaped.
"""

import difflib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from milter.printable import printable
from milter.testing.client import Transcript
from milter.testing.delivery import Envelope, Message
from milter.testing.wire import Command, decode_text
from milter.testing.words import answer_text, change_text

if TYPE_CHECKING:
    from milter.testing.result import Result

# Bytes of a body of which single lines are compared; difflib takes its time.
_COMPARED = 256 * 1024

_ARGUMENT = 48


def stage_name(stage: Command) -> str:
    """A stage by the name of its decorator: ``rcpt``, ``eom``."""
    return "eom" if stage is Command.END_OF_MESSAGE else stage.name.lower()


def summary(result: "Result") -> str:
    """One line: ``rejected at rcpt: 550 5.7.1 not for you``."""
    verdict = next(word for word in ("accepted", "rejected", "deferred", "discarded") if getattr(result, word))
    parts = [f"{verdict} at {result.stage}" if result.stage is not None else verdict]
    if result.quarantine is not None:
        parts.append(f", but quarantined ({printable(result.quarantine)})")
    if result.refused and result.accepted:
        parts.append(f", {len(result.refused)} of {_recipients(result.transcript)} recipients refused")
    parts.append(f": {printable(result.reply.replace(chr(10), ' / '))}")
    if result.errors:
        parts.append(f" (raised: {', '.join(printable(repr(error)) for error in result.errors)})")
    return "".join(parts)


def tell(result: "Result") -> Iterator[str]:
    """All of it, line by line."""
    yield summary(result)
    yield ""
    yield from stages(result.transcript)
    changes = list(map(change_text, result.actions))
    if changes:
        yield ""
        yield "changes that the filter asked for:"
        yield from (f"  {line}" for line in changes)
    if result.accepted:
        yield ""
        yield from diff(result) or ["nothing was changed"]


def stages(transcript: Transcript) -> Iterator[str]:
    """Each stage, its argument, and the answer."""
    for entry in transcript.stages:
        argument = printable(entry.argument)
        if len(argument) > _ARGUMENT:
            argument = argument[: _ARGUMENT - 3] + "..."
        yield f"  {stage_name(entry.stage):<8} {argument:<{_ARGUMENT}} {answer_text(transcript, entry)}"


def diff(result: "Result") -> list[str]:
    """The differences between the message as sent and as delivered."""
    delivery = result.delivery
    before, after = result.transcript.message, result.delivered
    if before.body != after.body and max(len(before.body), len(after.body)) > _COMPARED:
        left, right = f"(a body of {len(before.body)} bytes)", f"(another body, of {len(after.body)} bytes)"
        old, new = [*_head(result.transcript.envelope, before), left], [*_head(delivery.envelope, after), right]
    else:
        old = [*_head(result.transcript.envelope, before), *_body(before.body)]
        new = [*_head(delivery.envelope, after), *_body(after.body)]
    return list(difflib.unified_diff(old, new, "as sent", "as delivered", lineterm=""))


def compare(left: bytes, right: bytes) -> list[str]:
    """The differences between two messages in bytes."""
    return list(difflib.unified_diff(_lines(left), _lines(right), "left", "right", lineterm=""))


def _head(envelope: Envelope, message: Message) -> Iterator[str]:
    yield f"MAIL FROM:{printable(str(envelope.sender))}"
    for mailbox in envelope.recipients:
        yield f"RCPT TO:{printable(str(mailbox))}"
    yield ""
    for header in message.headers:
        yield from map(_line, header.raw.split("\n"))
    yield ""


def _body(body: bytes) -> Iterable[str]:
    # Of one body twice, nothing is shown but what is near a change of the headers.
    return _lines(body) if len(body) <= _COMPARED else [f"(a body of {len(body)} bytes)"]


def _lines(data: bytes) -> list[str]:
    return [_line(decode_text(line)) for line in data.removesuffix(b"\r\n").split(b"\r\n")]


def _line(text: str) -> str:
    """As `printable`, but a tab is a tab: headers are folded with it."""
    return "\t".join(printable(part) for part in text.split("\t"))


def _recipients(transcript: Transcript) -> int:
    return len(transcript.envelope.recipients)
