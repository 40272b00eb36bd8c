# SPDX-License-Identifier: GPL-3.0-or-later
"""Whole filters, played by miltertest."""

import pytest

from .conftest import SCENARIOS, Play

REPLYING_STAGES = ("connect", "helo", "mail", "rcpt", "unknown", "data", "header", "eoh", "body", "eom")

HANDLERS = {
    "nothing": [],
    "eom": ["eom"],
    "abort and close": ["abort:None", "close:None"],
    "every stage": [*REPLYING_STAGES],
    "every stage, unannotated": [f"{stage}:?" for stage in REPLYING_STAGES],
    "every stage, observers": [f"{stage}:None" for stage in REPLYING_STAGES],
    "rcpt": ["rcpt"],
    "rcpt, observer and not": ["rcpt:None", "rcpt"],
    "body": ["body"],
    "body, observer": ["body:None"],
    "data": ["data"],
    "eoh": ["eoh"],
    "header": ["header"],
    "unknown": ["unknown"],
}

WITH_ARGUMENTS = {
    "callback_panic",
    "drain",
    "negotiation",
    "on_error",
    "raising",
    "raising_observers",
    "replies",
    "shutdown_observer",
    "verdicts",
}
PLAIN = sorted(path.stem for path in SCENARIOS.glob("*.lua") if path.stem not in WITH_ARGUMENTS)


@pytest.mark.parametrize("scenario", PLAIN)
def test_scenario(play: Play, scenario: str) -> None:
    play(scenario)


@pytest.mark.parametrize("handlers", HANDLERS)
def test_negotiation(play: Play, handlers: str) -> None:
    play("negotiation", handlers, *HANDLERS[handlers])


@pytest.mark.parametrize("stage", REPLYING_STAGES)
def test_verdicts(play: Play, stage: str) -> None:
    play("verdicts", stage)


@pytest.mark.parametrize("stage", REPLYING_STAGES)
def test_replies(play: Play, stage: str) -> None:
    play("replies", stage)


@pytest.mark.parametrize("stage", REPLYING_STAGES)
def test_raising(play: Play, stage: str) -> None:
    play("raising", stage)


@pytest.mark.parametrize("stage", REPLYING_STAGES)
def test_raising_observers(play: Play, stage: str) -> None:
    play("raising_observers", stage)


@pytest.mark.parametrize("policy", ["tempfail", "reject", "accept", "continue", "reply"])
def test_on_error(play: Play, policy: str) -> None:
    play("on_error", policy)


def test_callback_panic(play: Play) -> None:
    """A filter with ``on_error="shutdown"`` whose handler raises: run() raises HandlerError."""
    play("callback_panic", filter_ends=1)


def test_shutdown_observer(play: Play) -> None:
    play("shutdown_observer", filter_ends=3)


def test_drain(play: Play) -> None:
    play("drain", filter_ends=0)


def test_each_filter_has_its_script() -> None:
    filters = {path.stem for path in SCENARIOS.glob("*.py")} - {"__init__"}
    assert filters == {path.stem for path in SCENARIOS.glob("*.lua")}
