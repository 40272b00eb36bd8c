# SPDX-License-Identifier: GPL-3.0-or-later
"""Results of ``milter check``, told to programs: JSON, whose keys ``docs/check.md`` explains and which stay.

ASCII only. A byte that is no UTF-8 appears as a lone surrogate, U+DC80 to U+DCFF, as Python's ``surrogateescape``
reads it; so nothing is lost.
"""

import json
import re
from dataclasses import asdict
from enum import Flag
from typing import Any, TypeAlias

from milter.checker.load import Figures
from milter.checker.sending import Result
from milter.checker.text import diff_lines, stage_name
from milter.testing.client import Transcript
from milter.testing.delivery import Delivery, Mailbox
from milter.testing.wire import Change, ReplaceBody, decode_text

Document: TypeAlias = dict[str, Any]


def line(document: Document) -> str:
    """A document as it is printed."""
    return json.dumps(document)


def of_result(result: Result) -> Document:
    """A message and what became of it. Each key is always there."""
    transcript = result.transcript
    return {
        "kind": "message",
        "message": result.name,
        "verdict": result.outcome.value if result.outcome else None,
        "decided_at": stage_name(result.decided_at) if result.decided_at else None,
        "reply": result.reply,
        "refused_recipients": [{"recipient": name, "reply": reply} for name, reply in result.refused_recipients],
        "quarantine": result.delivery.quarantine if result.delivery else None,
        "error": result.problem or (str(result.refusal) if result.refusal else None),
        "exit_code": result.exit_code,
        "negotiated": _negotiated(transcript) if transcript else None,
        "stages": _stages(transcript) if transcript else [],
        "changes": [_change(change) for change in result.changes],
        "progress": result.progress,
        "delivered": _delivered(result.delivery) if result.delivery else None,
        "diff": [text for text in diff_lines(result) if text not in ("", "nothing would change")],
    }


def of_figures(figures: Figures) -> Document:
    """What was measured."""
    return {
        "kind": "load",
        "messages": figures.count,
        "connections": figures.connections,
        "seconds": figures.seconds,
        "messages_per_second": figures.rate,
        "latency_ms": {name: seconds * 1000 for name, seconds in figures.latencies.items()},
        "verdicts": dict(sorted(figures.verdicts.items())),
        "errors": dict(figures.problems),
        "interrupted": figures.interrupted,
        "exit_code": figures.exit_code,
    }


def _negotiated(transcript: Transcript) -> Document:
    negotiated = transcript.negotiated
    return {
        "version": negotiated.version,
        "actions": _names(negotiated.actions),
        "steps": _names(negotiated.steps),
    }


def _names(flags: Flag) -> list[str]:
    return [(flag.name or "").lower() for flag in flags]


def _stages(transcript: Transcript) -> list[Document]:
    return [
        {
            "stage": stage_name(entry.stage),
            "argument": entry.argument,
            "sent": not transcript.negotiated.declines(entry.stage),
            "answer": str(entry.answer) if entry.answer else None,
        }
        for entry in transcript.stages
    ]


def _change(change: Change) -> Document:
    action = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(change).__name__).lower()
    if isinstance(change, ReplaceBody):
        return {"action": action, "chunk": decode_text(change.chunk)}
    return {"action": action, **asdict(change)}


def _delivered(delivery: Delivery) -> Document:
    return {
        "sender": _mailbox(delivery.envelope.sender),
        "recipients": [_mailbox(mailbox) for mailbox in delivery.envelope.recipients],
        "headers": [[header.name, header.value] for header in delivery.message.headers],
        "body": decode_text(delivery.message.body),
    }


def _mailbox(mailbox: Mailbox) -> Document:
    return {"address": mailbox.address, "params": list(mailbox.params)}
