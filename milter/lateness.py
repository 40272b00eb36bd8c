# SPDX-License-Identifier: GPL-3.0-or-later
"""What the log is told of handlers that take so long that their MTA may give up: which ones, and how long it was.

An MTA that has waited long enough treats the filter as one that has failed, whatever the handler says later, and does
not tell it why. Without these lines nothing would name the handler.
"""

import contextlib
from time import monotonic

from milter.context import Call, Conversation
from milter.protocol import Stage
from milter.safe_log import SafeLog

__all__ = ["client_and_message", "tell_end", "tell_late"]

log = SafeLog("milter")

_CONTENT = frozenset((Stage.HEADER, Stage.EOH, Stage.BODY))


def tell_late(call: Call, began: float) -> None:
    """By the thread that watches, while handlers of this call run. It waits for nothing, and raises nothing."""
    handler = call.connection.handler
    queue_id = call.macro_at_once(b"i")
    if handler is None:  # so far the time went elsewhere
        return
    with contextlib.suppress(Exception):  # of somebody's filter of log records
        log.warning(
            "%s still runs, %.0f seconds after %s began (%s). %s",
            handler.name,
            monotonic() - began,
            call.stage.decorator,
            client_and_message(call.connection, queue_id),
            _limits(call.stage),
        )


def tell_end(call: Call, began: float) -> None:
    """By the thread that ran them, of a call that was late. Raises nothing."""
    with contextlib.suppress(Exception):
        log.warning(
            "%s took %.0f seconds (%s)%s",
            call.stage.decorator,
            monotonic() - began,
            client_and_message(call.connection, call.macro_at_once(b"i")),
            ", and the MTA did not wait: it has closed its connection" if call.mta_is_gone() else "",
        )


def _limits(stage: Stage) -> str:
    """How long MTAs wait, as they come."""
    if stage is Stage.EOM:
        return (
            "Sendmail waits 5 minutes for all of it (T=E:5m), Postfix 300 seconds for each sign of progress "
            "(milter_content_timeout)"
        )
    postfix = "300 (milter_content_timeout)" if stage in _CONTENT else "30 (milter_command_timeout)"
    return f"For an answer there, Sendmail waits 10 seconds (T=R:10s), and Postfix {postfix}"


def client_and_message(connection: Conversation, queue_id: bytes | None) -> str:
    """For a line of the log."""
    name = queue_id.decode("utf-8", "backslashreplace") if queue_id is not None else None
    return f"client {connection.hostname!a} [{connection.address}], queue id {name!a}"
