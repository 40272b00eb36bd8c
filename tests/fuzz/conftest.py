# SPDX-License-Identifier: GPL-3.0-or-later
"""The filters under fire: each kind, as it is built here and with sanitizers."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuzz.model import Kind
from tests.fuzz.sanitized import Sanitized, Unavailable, built
from tests.fuzz.target import Target

PLAIN, SANITIZED = "plain", "sanitized"


@pytest.fixture(scope="session")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Sanitized:
    try:
        return built(tmp_path_factory.mktemp("sanitized"))
    except Unavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture(params=[PLAIN, SANITIZED])
def build(request: pytest.FixtureRequest) -> Sanitized | None:
    """None: as it is."""
    if request.param == PLAIN:
        return None
    found: Sanitized = request.getfixturevalue("sanitized")
    return found


@pytest.fixture(params=Kind, ids=lambda kind: kind.value)
def target(request: pytest.FixtureRequest, build: Sanitized | None, tmp_path: Path) -> Iterator[Target]:
    target = Target(tmp_path, request.param, build)
    with target.process:
        yield target
