# SPDX-License-Identifier: GPL-3.0-or-later
"""The pytest plugin: the fixture ``milter_mta``, and failures that tell what the filter did.

pytest finds it by its entry point, in every run where the package is installed. So it is outside of the package, and
imports nothing of it before a test asks: whoever does not test filters pays for this file alone.

::

    def test_strangers_cannot_write_to_the_boss(milter_mta):
        mta = milter_mta(app)
        result = mta.send(recipients=["boss@internal.example"])
        assert result.rejected

When a test fails, the report has a section for each of the last messages it sent: the conversation stage by stage, the
changes, and what differs between the message as sent and as delivered.
"""

import sys
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from milter.testing import MTA, MTAFactory

_TOLD = 5  # messages of a failed test


@pytest.fixture
def milter_mta() -> "Iterator[MTAFactory]":
    """A function that makes an MTA with a filter: ``milter_mta(app)``; see ``milter.testing.MTA`` for its options.

    It lives as long as the test: the filter's on_start hooks run at once, on_stop when the test is over.
    """
    from milter.testing import MTA

    _watch()
    with ExitStack() as stack:

        def make(*arguments: Any, **options: Any) -> "MTA":
            return stack.enter_context(MTA(*arguments, **options))

        yield make


def pytest_runtest_setup() -> None:
    _watch()


def pytest_runtest_teardown() -> None:
    if (module := _module()) is not None:
        module.recent = None


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    outcome: Any = yield
    report = outcome.get_result()
    module = _module()
    if report.failed and call.when == "call" and module is not None and module.recent:
        for number, result in enumerate(module.recent, start=1):
            title = "filter under test" if len(module.recent) == 1 else f"filter under test, message {number}"
            report.sections.append((title, str(result)))


def pytest_assertrepr_compare(op: str, left: object, right: object) -> list[str] | None:
    """Two messages in bytes: the lines that differ."""
    if op != "==" or _module() is None or not (isinstance(left, bytes) and isinstance(right, bytes)):
        return None
    from milter.testing import story
    from milter.testing.result import MailBytes

    if not (isinstance(left, MailBytes) or isinstance(right, MailBytes)):
        return None
    return ["the messages differ:", *story.compare(left, right)]


def _module() -> Any:
    """milter.testing.mta, if somebody has imported it."""
    return sys.modules.get("milter.testing.mta")


def _watch() -> None:
    if (module := _module()) is not None:
        module.recent = deque(maxlen=_TOLD)
