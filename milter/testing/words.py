# SPDX-License-Identifier: GPL-3.0-or-later
"""Answers and changes of a filter in words, for people who test one or check one."""

from milter.printable import printable
from milter.testing.client import StageAnswer, Transcript
from milter.testing.wire import (
    AddHeader,
    AddRecipient,
    Change,
    InsertHeader,
    Quarantine,
    RemoveRecipient,
    ReplaceBody,
    ReplaceHeader,
    ReplaceSender,
)


def answer_text(transcript: Transcript, entry: StageAnswer) -> str:
    """What the filter answered at a stage, or why it did not."""
    if entry.answer is not None:
        return printable(str(entry.answer))
    return "(not wanted)" if transcript.negotiated.declines(entry.stage) else "(no reply)"


def change_text(change: Change) -> str:
    """A change in a line; the text that strangers or the filter wrote is escaped."""
    return printable(_words(change))


def _words(change: Change) -> str:
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
