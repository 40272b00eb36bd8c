# SPDX-License-Identifier: GPL-3.0-or-later
"""Whole filters, played by miltertest."""

import os
import shutil
import subprocess
from pathlib import Path

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
    "message": ["message"],
    "message, observer": ["message:None"],
    "message, and others that reply": ["message", "header", "body"],
}

# A small file system of the filter's own, which is gone with it. Its arguments: where, and the filter's command.
MOUNTING = 'mount -t tmpfs -o size=128k milter "$0" && exec "$@"'

WITH_ARGUMENTS = {
    "callback_panic",
    "drain",
    "full_disk",
    "negotiation",
    "on_error",
    "raising",
    "raising_after_edits",
    "raising_observers",
    "replies",
    "shutdown_observer",
    "spool",
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


@pytest.mark.parametrize("policy", ["tempfail", "reject", "accept", "continue", "reply"])
def test_raising_after_edits(play: Play, policy: str) -> None:
    play("raising_after_edits", policy)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="open files are told in /proc")
@pytest.mark.parametrize("spool_size", ["0", "1000", "100000"])
def test_spool(play: Play, spool_size: str) -> None:
    play("spool", spool_size)


@pytest.mark.parametrize("case", ["limit", "gone"])
def test_full_disk(play: Play, tmp_path: Path, case: str) -> None:
    (tmp_path / "spool").mkdir()
    play("full_disk", case, str(tmp_path / "spool"))


def test_full_file_system(play: Play, tmp_path: Path) -> None:
    (tmp_path / "spool").mkdir()
    spool = str(tmp_path / "spool")
    play("full_disk", "tmpfs", spool, within=[*mounting(spool), spool])


def mounting(directory: str) -> list[str]:
    """The beginning of a command that mounts a small file system for another; skips the test where none can."""
    namespace = ["--mount"] if os.geteuid() == 0 else ["--mount", "--map-root-user"]
    command = ["unshare", *namespace, "sh", "-c", MOUNTING]
    if shutil.which("unshare") is None:
        pytest.skip("no file system can be mounted here: there is no command 'unshare'")
    probe = subprocess.run([*command, directory, "true"], capture_output=True, text=True, check=False)
    if probe.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {probe.stderr.strip()}")
    return command


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
