# SPDX-License-Identifier: GPL-3.0-or-later
"""Fixtures: a Postfix for the session, its sink, and a directory where it can reach a filter's socket."""

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.filter_process import RunFilter, running_filters

from .postfix import Postfix, missing, open_directory
from .sink import Sink

_CRASH = re.compile(r"^.*\b(?:panic|fatal): .*$", re.MULTILINE)


def require_postfix() -> None:
    """Skip the test where Postfix cannot run; under continuous integration, where it must run, fail."""
    reason = missing()
    if reason and os.environ.get("CI"):
        pytest.fail(f"{reason}, and CI is set", pytrace=False)
    if reason:
        pytest.skip(reason)


@pytest.fixture(scope="session")
def postfix_of_session() -> Iterator[Postfix]:
    """The instance that all tests share; use `postfix`."""
    require_postfix()
    with open_directory("milter-mta-") as directory, Sink() as sink, Postfix(directory, sink) as postfix:
        yield postfix


@pytest.fixture
def postfix(postfix_of_session: Postfix) -> Iterator[Postfix]:
    """A Postfix with an empty queue and an empty sink; a failing test shows what it logged meanwhile.

    A test also fails when one of Postfix's processes panicked or gave up.
    """
    before = len(postfix_of_session.log())
    yield postfix_of_session
    if postfix_of_session.is_running:
        postfix_of_session.deliveries()
        postfix_of_session.discard_queue()
    logged = postfix_of_session.log()[before:]
    sys.stdout.write(logged)
    assert not _CRASH.findall(logged), "Postfix crashed"


@pytest.fixture
def sink(postfix: Postfix) -> Sink:
    """Where this test's messages arrive."""
    return postfix.sink


@pytest.fixture
def socket_dir() -> Iterator[Path]:
    """A directory for the sockets of filters, open to user `postfix`, with a short path.

    The socket itself must be writable for that user too: that is up to the filter.
    """
    with open_directory() as directory:
        yield directory


@pytest.fixture
def run_filter(socket_dir: Path) -> Iterator[RunFilter]:
    """Start filters as a user does: `run_filter("examples/guard.py", socket_spec)`; returns when it listens.

    Those that the test leaves running are stopped after it, and must end well.
    """
    # So that user `postfix` may write to their Unix sockets.
    with running_filters(umask=0) as run:
        yield run


@pytest.fixture(params=["inet", "unix"])
def socket_spec(request: pytest.FixtureRequest, socket_dir: Path) -> str:
    """Where a filter shall listen; the test runs once for each kind of socket."""
    return "inet:0@127.0.0.1" if request.param == "inet" else f"unix:{socket_dir}/filter"
