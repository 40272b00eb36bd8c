# SPDX-License-Identifier: GPL-3.0-or-later
"""Header fields answered together, and one by one: the client, the server's log and what arrives are the same.

But for one word: Sendmail's log names the step, ``action=eoh`` instead of ``action=header``.

Each scenario in which a filter has orders for header fields is played in both ways on each server.
"""

import re
from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.filter_process import running_filters

from .filter_pool import FilterPool
from .play import differences, play
from .postfix import Postfix, open_directory
from .scenario import Expected, Scenario, Script, all_scenarios
from .sendmail import Sendmail
from .server import MailServer

WAYS = ("", " +each")

# What a server logs of a verdict before it tells the client. Sendmail also names the step of the protocol.
_REFUSED = re.compile(r"milter-(?:reject|discard): .*|\b[Mm]ilter: data, .*|milter=\w+, (?!.*\bcontinue\b).*")
_STEP = re.compile(r"\baction=\w+, ")


def with_header_orders(server: str) -> list[Scenario]:
    return [each for each in all_scenarios() if server in each.servers and _orders_header(each.on(server))]


def _orders_header(script: Script) -> bool:
    orders = [order for each in script.filters for order in each.orders]
    deadly = any(word in order.text for order in orders for word in ("die()", "hang()"))
    return any(order.stage == "header" for order in orders) and not deadly


@pytest.fixture(scope="module")
def pool() -> Iterator[FilterPool]:
    with open_directory() as directory, running_filters(umask=0) as run_filter:
        yield FilterPool(directory, run_filter)


@pytest.mark.parametrize("scenario", with_header_orders("postfix"), ids=lambda each: each.name)
def test_on_postfix(scenario: Scenario, postfix: Postfix, pool: FilterPool) -> None:
    assert_same(scenario, postfix, pool)


@pytest.mark.parametrize("scenario", with_header_orders("sendmail"), ids=lambda each: each.name)
def test_on_sendmail(scenario: Scenario, sendmail: Sendmail, pool: FilterPool) -> None:
    assert_same(scenario, sendmail, pool)


def assert_same(scenario: Scenario, server: MailServer, pool: FilterPool) -> None:
    together, each = (logged(scenario, way, server, pool) for way in WAYS)
    assert together == each
    refused = [step for step in scenario.on(server.name).steps if isinstance(step, Expected) and step.code >= 400]
    assert together or not refused, "the log's words are found"


def logged(scenario: Scenario, way: str, server: MailServer, pool: FilterPool) -> list[str]:
    """Play it, and return what the server says of verdicts."""
    before = len(server.log())
    script = scenario.on(server.name)
    script = replace(script, filters=tuple(replace(f, command=f.command + way) for f in script.filters))
    sockets, filters = pool.prepare(script.filters)
    outcome = play(script, server, server.milter_service(sockets, **dict(script.settings)), filters)
    found = differences(scenario, script, outcome)
    assert not found, f"obey{way}\n" + "\n".join(found)
    return [_STEP.sub("", line) for line in _REFUSED.findall(server.log()[before:])]
