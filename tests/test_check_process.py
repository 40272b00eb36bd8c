# SPDX-License-Identifier: GPL-3.0-or-later
"""``milter check`` as a process: Ctrl-C, a terminal, a reader that has seen enough."""

import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from milter.checker.bar import Bar, bar_text
from tests.filter_process import PATIENCE, FilterProcess, RunFilter, running_filters

COMMAND = [sys.executable, "-m", "milter", "check"]


@pytest.fixture
def run_filter() -> Iterator[RunFilter]:
    with running_filters() as run:
        yield run


def interrupted(process: FilterProcess, *arguments: str) -> tuple[int, str]:
    """Ctrl-C once the filter, filters/slow.py, has the second message; exit code and output."""
    command = subprocess.Popen(
        [*COMMAND, process.socket, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    process.say("go on")
    process.stdout.wait_for_count("at the end of a message", 2)
    os.killpg(command.pid, signal.SIGINT)  # as a terminal does: to all of its processes
    output, errors = command.communicate(timeout=PATIENCE)
    process.end_input()
    assert errors == ""
    return command.returncode, output


def test_ctrl_c_shows_what_was_found_so_far(run_filter: RunFilter, tmp_path: Path) -> None:
    slow = run_filter("tests/filters/slow.py", f"unix:{tmp_path}/s")
    for name in ("a.eml", "b.eml", "c.eml"):
        (tmp_path / name).write_bytes(b"Subject: test\n\n")
    code, output = interrupted(slow, str(tmp_path), "--brief")
    assert (code, output) == (130, f"accepted  {tmp_path}/a.eml\n1 messages: accepted 1\n")


def test_ctrl_c_shows_what_was_measured_so_far(run_filter: RunFilter, tmp_path: Path) -> None:
    slow = run_filter("tests/filters/slow.py", f"unix:{tmp_path}/s")
    code, output = interrupted(slow, "--repeat", "1000")
    assert code == 130
    assert output.startswith("messages  1 of 1000 in ")
    assert output.endswith("verdicts  accepted 1\n")


def test_ctrl_c_ends_those_who_send_at_once(run_filter: RunFilter, tmp_path: Path) -> None:
    slow = run_filter("tests/filters/slow.py", f"unix:{tmp_path}/s")
    code, output = interrupted(slow, "--repeat", "1000", "--connections", "2")
    assert code == 130
    assert re.match(r"messages  [01] of 1000 in ", output)


def test_an_interrupted_measurement_says_so_to_programs(run_filter: RunFilter, tmp_path: Path) -> None:
    slow = run_filter("tests/filters/slow.py", f"unix:{tmp_path}/s")
    code, output = interrupted(slow, "--repeat", "1000", "--json")
    document = json.loads(output)
    assert (code, document["exit_code"], document["interrupted"], document["messages"]) == (130, 130, True, 1)


def on_terminal(*arguments: str) -> tuple[str, str]:
    """Run the command with standard error on a terminal; standard output, and what the terminal got."""
    try:
        here, there = pty.openpty()
    except OSError as error:
        pytest.skip(f"no terminal is to be had: {error}")
    with subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=there, text=True) as command:
        os.close(there)
        output, _ = command.communicate(timeout=PATIENCE)
    shown = b""
    try:
        while data := os.read(here, 65536):
            shown += data
    except OSError:  # how Linux tells the end of a terminal
        pass
    os.close(here)
    return output, shown.decode()


def test_a_long_run_shows_a_bar_on_a_terminal_and_removes_it(run_filter: RunFilter) -> None:
    guard = run_filter("examples/guard.py", "inet:0@127.0.0.1")
    output, shown = on_terminal(guard.socket, "--repeat", "20")
    assert output.endswith("verdicts  accepted 20\n")
    assert "1/20" in shown
    assert "20/20" in shown
    assert shown.endswith("\r\x1b[K")


def test_without_a_terminal_there_is_no_bar(run_filter: RunFilter) -> None:
    guard = run_filter("examples/guard.py", "inet:0@127.0.0.1")
    command = subprocess.run([*COMMAND, guard.socket, "--repeat", "2"], capture_output=True, check=True)
    assert command.stderr == b""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_bar_is_drawn_at_once_then_ten_times_a_second_and_at_the_end() -> None:
    terminal, times = Terminal(), iter([0.0, 0.01, 0.05, 0.2, 0.21, 0.22])
    bar = Bar(terminal, lambda: next(times))
    for done in range(1, 6):
        bar.show(done, 5)
    assert re.findall(r"\d/5", terminal.getvalue()) == ["1/5", "3/5", "5/5"]


def test_a_bar_without_time_knows_no_rate() -> None:
    assert bar_text(1, 2, 0.0) == "[" + "#" * 15 + "." * 15 + "] 1/2"


def test_a_reader_that_has_seen_enough_is_no_error(run_filter: RunFilter) -> None:
    guard = run_filter("examples/guard.py", "inet:0@127.0.0.1")
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as output:
        command = subprocess.run(
            [*COMMAND, guard.socket], stdout=output, stderr=subprocess.PIPE, check=False, timeout=PATIENCE
        )
    assert (command.returncode, command.stderr) == (141, b"")
