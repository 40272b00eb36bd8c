# SPDX-License-Identifier: GPL-3.0-or-later
"""Fixtures: a Postfix and a Sendmail for the session, their sinks, and a directory for the sockets of filters."""

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.filter_process import RunFilter, running_filters

from . import postfix as postfix_module
from . import sendmail as sendmail_module
from .postfix import Postfix, open_directory
from .sendmail import Sendmail
from .server import MailServer
from .sink import Sink

_CRASH = re.compile(r"^.*\b(?:panic|fatal): .*$", re.MULTILINE)


def require_postfix() -> None:
    _require(postfix_module.missing())


def require_sendmail() -> None:
    _require(sendmail_module.missing())


def _require(reason: str | None) -> None:
    """Skip the test where a server cannot run; under continuous integration, where it must run, fail."""
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
    with clean(postfix_of_session):
        yield postfix_of_session


@pytest.fixture(scope="session")
def sendmail_of_session() -> Iterator[Sendmail]:
    """The instance that all tests share; use `sendmail`."""
    require_sendmail()
    with open_directory("milter-mta-") as directory, Sink() as sink, Sendmail(directory, sink) as sendmail:
        yield sendmail


@pytest.fixture
def sendmail(sendmail_of_session: Sendmail) -> Iterator[Sendmail]:
    """A Sendmail with an empty queue and an empty sink, otherwise as `postfix`."""
    with clean(sendmail_of_session):
        yield sendmail_of_session


@contextlib.contextmanager
def clean(server: MailServer) -> Iterator[None]:
    """Leave the server as it was found; show what it logged meanwhile, and fail when it crashed."""
    before = len(server.log())
    try:
        yield
    finally:
        if server.is_running:
            server.deliveries()
            server.discard_queue()
    assert_no_crash(server, before)


def assert_no_crash(server: MailServer, before: int) -> None:
    """Show what the server has logged since its log was so long, and fail when it tells of a crash."""
    logged = server.log()[before:]
    sys.stdout.write(logged)
    assert not _CRASH.findall(logged), f"{server.name} crashed"


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
