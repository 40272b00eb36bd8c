# SPDX-License-Identifier: GPL-3.0-or-later
"""What a registry of handlers implies: which stages are wanted, which never reply, which macros to ask for.

The engine hands the result to the shim, which answers negotiations by it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from milter import spool
from milter.app import WHOLE_MESSAGE, Handler, Milter
from milter.protocol import (
    MACRO_LISTS,
    Actions,
    MacroList,
    ProtocolOptions,
    Stage,
    known_macros,
    macro_request,
)

__all__ = ["Plan", "make_plan"]

_REPLYING_STAGES = tuple(Stage(number) for number in range(Stage.UNKNOWN.value + 1) if number != Stage.EOM.value)
_NO_REPLY = {stage: ProtocolOptions[f"NOREPLY_{stage.name}"] for stage in _REPLYING_STAGES}

# The library remembers the envelope and the client, so it wants to hear of them without handlers too.
# The macros of a recipient are gone with the next one, those of HELO with the HELO after STARTTLS.
_MACROS_GO_SOON = frozenset((Stage.HELO, Stage.RCPT))
_CONTENT = frozenset((Stage.HEADER, Stage.EOH, Stage.BODY))
_REMEMBERED = (Stage.CONNECT, Stage.HELO, Stage.MAIL, Stage.RCPT)


@dataclass(frozen=True)
class Plan:
    """The answer to a negotiation, before it is cut down to what the MTA offers."""

    handled: frozenset[Stage]
    remembered: frozenset[Stage]
    silent: frozenset[Stage]
    """Stages that never reply: nobody wants them, their handlers only observe, or another stage replies for them."""
    answered_later: frozenset[Stage]
    """Silent stages whose handlers may give a verdict: the next stage that replies gives it to the MTA."""
    deferred: frozenset[Stage]
    """Silent stages whose handlers may be called later, together with the next event that replies."""
    gathers: bool
    """Whole messages are wanted at their end."""
    spool_size: int
    spool_directory: str
    sees_refused_recipients: bool
    shows_leading_space: bool
    """Handlers want the space after a header's colon, which the library may ask for by itself."""
    actions: Actions
    requires: Actions
    options: ProtocolOptions
    declared_macros: dict[MacroList, tuple[str, ...]]
    """The names that decorators declare, by the list that brings them."""
    known_macros: tuple[str, ...]
    negotiates: bool
    followed: bool
    """A ledger wants to know how each message ends."""

    def requests(self, more: dict[MacroList, list[str]]) -> dict[MacroList, tuple[str, ...]]:
        """The lists to ask for: those declared, and `more` of one negotiation."""
        lists = [entry for entry in MacroList if entry in self.declared_macros or entry in more]
        return {
            entry: macro_request(entry, [*self.declared_macros.get(entry, ()), *more.get(entry, ())]) for entry in lists
        }


def make_plan(app: Milter[Any, Any], *, followed: bool = False) -> Plan:
    handled = frozenset(stage for stage in Stage if app.handlers[stage])
    observed = frozenset(
        stage for stage in _REPLYING_STAGES if all(handler.observes for handler in app.handlers[stage])
    )
    answered_later = _answered_later(app) - observed
    # The end of the header replies for its fields, with or without handlers of its own.
    silent = (observed - {Stage.EOH}) | answered_later if answered_later else observed
    remembered = frozenset(_REMEMBERED) | ({Stage.EOH} if answered_later else frozenset())
    gathers = any(handler.form is WHOLE_MESSAGE for handler in app.handlers[Stage.EOM])
    declared = _declared_macros(app.handlers)
    return Plan(
        handled=handled,
        remembered=remembered - handled,
        silent=silent,
        answered_later=answered_later,
        deferred=(handled & silent) - _MACROS_GO_SOON,
        gathers=gathers,
        spool_size=app.spool_size,
        spool_directory=spool.directory(app.spool_directory) if gathers else "",
        sees_refused_recipients=app.rejected_recipients and Stage.RCPT in handled,
        shows_leading_space=app.leading_space,
        actions=app.actions & ~Actions.REQUEST_MACROS,
        requires=app.requires,
        options=_options(app, handled, silent, gathers),
        declared_macros=declared,
        known_macros=known_macros(name for names in declared.values() for name in names),
        negotiates=Stage.NEGOTIATE in handled,
        followed=followed,
    )


def _answered_later(app: Milter[Any, Any]) -> frozenset[Stage]:
    """The client is told nothing of the content before its end, so one answer does for all header fields."""
    return frozenset((Stage.HEADER,) if app.header_replies == "together" else ())


def _declared_macros(handlers: dict[Stage, list[Handler]]) -> dict[MacroList, tuple[str, ...]]:
    declared: dict[MacroList, tuple[str, ...]] = {}
    for stage, entry in MACRO_LISTS.items():
        names = tuple(name for handler in handlers[stage] for name in handler.macros)
        if names:
            declared[entry] = declared.get(entry, ()) + names
    return declared


def _options(
    app: Milter[Any, Any], handled: frozenset[Stage], silent: frozenset[Stage], gathers: bool
) -> ProtocolOptions:
    options = _union(_NO_REPLY[stage] for stage in silent)
    options |= _declined(handled | _CONTENT if gathers else handled)
    if Stage.BODY in handled and Stage.BODY not in silent and not gathers:
        options |= ProtocolOptions.SKIP
    if app.leading_space or gathers:  # a message is to be exact, whatever handlers are shown
        options |= ProtocolOptions.LEADING_SPACE
    if app.rejected_recipients and Stage.RCPT in handled:
        options |= ProtocolOptions.REJECTED_RCPT
    return options


def _declined(handled: frozenset[Stage]) -> ProtocolOptions:
    """The stages that the MTA need not send.

    libmilter checks the order of commands by a table, from which a declined stage is skipped; two
    ways through the table are missing, and a command that arrives there is dropped without an
    answer, so the MTA waits until it gives up (engine.c, ``next_states``): from DATA over a declined
    end of header, when the message has no header; and from an unknown command to the header, when
    DATA is declined.
    """
    declined = ProtocolOptions.NONE
    if Stage.UNKNOWN not in handled:
        declined |= ProtocolOptions.NO_UNKNOWN
        if Stage.DATA not in handled:
            declined |= ProtocolOptions.NO_DATA
    if Stage.HEADER not in handled:
        declined |= ProtocolOptions.NO_HEADER
        if Stage.EOH not in handled:
            declined |= ProtocolOptions.NO_EOH
    if Stage.BODY not in handled:
        declined |= ProtocolOptions.NO_BODY
    return declined


def _union(options: Iterable[ProtocolOptions]) -> ProtocolOptions:
    result = ProtocolOptions.NONE
    for option in options:
        result |= option
    return result
