# SPDX-License-Identifier: GPL-3.0-or-later
"""The scenarios of `scenarios/`, each on Postfix, on Sendmail, and on the models of both in `milter.testing`."""

import contextlib
import sys
from collections.abc import Iterator

import pytest

from tests.filter_process import running_filters

from .conftest import assert_no_crash, clean
from .filter_pool import FilterPool
from .model import is_modelled, model_differences
from .play import differences, play
from .postfix import Postfix, open_directory
from .scenario import Scenario, all_scenarios
from .sendmail import Sendmail
from .server import MailServer


def scenarios_for(server: str) -> list[Scenario]:
    """In an order that starts servers and filters anew as seldom as possible."""
    found = [scenario for scenario in all_scenarios() if server in scenario.servers]
    return sorted(found, key=lambda each: (each.on(server).settings, [f.command for f in each.on(server).filters]))


def on(server: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("scenario", scenarios_for(server), ids=lambda each: each.name)


def on_model(server: str) -> pytest.MarkDecorator:
    modelled = [scenario for scenario in scenarios_for(server) if is_modelled(scenario.on(server))]
    return pytest.mark.parametrize("scenario", modelled, ids=lambda each: each.name)


@pytest.fixture(scope="module")
def pool() -> Iterator[FilterPool]:
    # So that user `postfix` may write to the sockets.
    with open_directory() as directory, running_filters(umask=0) as run_filter:
        yield FilterPool(directory, run_filter)


@on("postfix")
def test_on_postfix(scenario: Scenario, postfix_of_session: Postfix, pool: FilterPool) -> None:
    check(scenario, postfix_of_session, pool)


@on("sendmail")
def test_on_sendmail(scenario: Scenario, sendmail_of_session: Sendmail, pool: FilterPool) -> None:
    check(scenario, sendmail_of_session, pool)


def check(scenario: Scenario, server: MailServer, pool: FilterPool) -> None:
    with cleaned_after_failure(server):
        script = scenario.on(server.name)
        sockets, filters = pool.prepare(script.filters)
        try:
            outcome = play(script, server, server.milter_service(sockets, **dict(script.settings)), filters)
        finally:
            pool.retire(script.filters)
        if outcome.held:
            server.discard_queue()
        found = differences(scenario, script, outcome)
        assert not found, "\n" + "\n".join(found)


@contextlib.contextmanager
def cleaned_after_failure(server: MailServer) -> Iterator[None]:
    """The fixtures `postfix` and `sendmail` clean up after each test, which takes as long as a scenario does."""
    before = len(server.log())
    try:
        yield
    except BaseException:
        sys.stdout.write(server.log()[before:])
        with clean(server):
            raise
    assert_no_crash(server, before)


@on_model("postfix")
def test_on_the_model_of_postfix(scenario: Scenario, pool: FilterPool) -> None:
    check_model(scenario, "postfix", pool)


@on_model("sendmail")
def test_on_the_model_of_sendmail(scenario: Scenario, pool: FilterPool) -> None:
    check_model(scenario, "sendmail", pool)


def check_model(scenario: Scenario, server: str, pool: FilterPool) -> None:
    script = scenario.on(server)
    (socket,), _ = pool.prepare(script.filters)
    found = model_differences(script, server, socket)
    assert not found, f"\n{scenario.path}\n" + "\n".join(found)
