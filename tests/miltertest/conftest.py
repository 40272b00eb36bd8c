# SPDX-License-Identifier: GPL-3.0-or-later
"""The fixture `play`, which plays a scenario: a filter in a process of its own, and miltertest as the MTA."""

import difflib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import pytest

import milter

from .wiretap import Wiretap

HERE = Path(__file__).parent
SCENARIOS = HERE / "scenarios"
PACKAGE = Path(milter.__file__).parent.parent
PATIENCE = 30.0  # seconds, for what takes a fraction of one


class Play(Protocol):
    def __call__(
        self, scenario: str, *arguments: str, filter_ends: int | None = None, within: Sequence[str] = ()
    ) -> None:
        """Play `scenario`, and compare what the filter prints and logs with what it should.

        Arguments:
            scenario: the name of a Lua script, and of the filter's.
            arguments: for the filter; the script finds the first one as ``case``, and there may be a
                file of expectations for it, NAME.CASE.log beside NAME.log.
            filter_ends: the exit status of a filter that ends by itself; None for one that serves until
                it is told to stop, and then ends with 0.
            within: a command that becomes the filter, given as its last arguments.
        """


def require_miltertest() -> None:
    """Skip the test where miltertest is not installed; under continuous integration, where it must be, fail."""
    if shutil.which("miltertest"):
        return
    if os.environ.get("CI"):
        pytest.fail("miltertest is not installed, and CI is set", pytrace=False)
    pytest.skip("miltertest is not installed")


@pytest.fixture
def play(tmp_path: Path) -> Play:
    require_miltertest()

    def play(scenario: str, *arguments: str, filter_ends: int | None = None, within: Sequence[str] = ()) -> None:
        case = arguments[0] if arguments else ""
        output = tmp_path / "stdout"
        log = tmp_path / "stderr"
        front, back = tmp_path / "front", tmp_path / "back"
        exit_status = None
        with (
            output.open("wb") as stdout,
            log.open("wb") as stderr,
            Wiretap(tmp_path, front, back),
            _start([*within, *_command(scenario)], arguments, back, stdout.fileno(), stderr.fileno()) as process,
        ):
            try:
                script = _run_script(scenario, case, tmp_path, front)
                if filter_ends is None:
                    process.send_signal(signal.SIGTERM)
                if script.returncode == 0:
                    exit_status = process.wait(PATIENCE)
            finally:
                process.kill()
        printed, logged = output.read_text(), log.read_text()
        told = f"\n{script.stdout}{script.stderr}\nthe filter printed:\n{printed}\nand logged:\n{logged}"
        assert (script.returncode, exit_status) == (0, filter_ends or 0), told
        _compare("printed", printed.splitlines(), _expected(scenario, case, "out"))
        _compare("logged", _ours(_without_frames(logged), scenario), _expected(scenario, case, "log"))

    return play


def _command(scenario: str) -> list[str]:
    return [sys.executable, "-X", "dev", "-P", str(SCENARIOS / f"{scenario}.py")]


def _start(
    command: list[str], arguments: tuple[str, ...], path: Path, stdout: int, stderr: int
) -> "subprocess.Popen[bytes]":
    """The socket listens before the filter runs: miltertest can connect at once, and waits for its first answer."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        number = listener.fileno()
        return subprocess.Popen(
            [*command, f"fd:{number}", *arguments],
            pass_fds=[number],
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            env={**os.environ, "PYTHONPATH": str(PACKAGE)},
        )


def _run_script(scenario: str, case: str, directory: Path, front: Path) -> "subprocess.CompletedProcess[str]":
    definitions = {
        "scenario": SCENARIOS / f"{scenario}.lua",
        "case": case,
        "socket": f"unix:{front}",
        "wire": directory / "wire",
    }
    return subprocess.run(
        ["miltertest", "-s", HERE / "prelude.lua", *(f"-D{name}={value}" for name, value in definitions.items())],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="backslashreplace",
        timeout=PATIENCE,
        check=False,
    )


def _expected(scenario: str, case: str, kind: str) -> list[str]:
    """The lines of a file of expectations without its comments; none, where there is no such file."""
    for path in (SCENARIOS / f"{scenario}.{case}.{kind}", SCENARIOS / f"{scenario}.{kind}"):
        if path.exists():
            text = path.read_text().replace("{case}", case).replace("{CASE}", case.upper())
            return [line for line in text.splitlines() if not line.startswith("# ")]
    return []


def _without_frames(log: str) -> list[str]:
    """A log without the middle of its tracebacks."""
    return [line for line in log.splitlines() if line and not line.startswith(" ")]


def _ours(lines: list[str], filter_name: str) -> list[str]:
    """A log without what libmilter itself says, which is here only where its system calls are redirected."""
    return [line for line in lines if not line.startswith(f"ERROR: {filter_name}: ")]


def _compare(verb: str, lines: list[str], expected: list[str]) -> None:
    """All lines count; ``*`` in an expected one stands for anything."""
    for number, line in enumerate(lines[: len(expected)]):
        pattern = re.escape(expected[number]).replace(r"\*", ".*")
        if re.fullmatch(pattern, line):
            expected[number] = line
    if lines != expected:
        differences = difflib.unified_diff(expected, lines, "expected", verb, lineterm="")
        pytest.fail(f"the filter {verb} something else:\n" + "\n".join(differences), pytrace=False)
