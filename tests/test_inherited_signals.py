# SPDX-License-Identifier: GPL-3.0-or-later
"""Signals that a parent ignored or blocked, signals that mean nothing, and those that come at a bad moment."""

import os
import signal
from pathlib import Path

import pytest

from milter.testing import Verdict
from tests.launched import BOTH, Program
from tests.test_outlets import verdict
from tests.test_supervisor import children

FILTER = """
import os, subprocess, sys
from milter import Context, Milter, Status

app = Milter("signalled")

@app.on_helo
def start_another(ctx: Context, name: str) -> Status:
    code = subprocess.run([sys.executable, "-c", "raise SystemExit(3)"]).returncode
    return Status.CONTINUE if code == 3 else Status.REJECT
"""

QUIET = FILTER.replace("code = ", "code = 3 #")


@pytest.mark.parametrize("by", BOTH)
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_a_signal_that_was_ignored_does_not_end_it(tmp_path: Path, by: str, number: signal.Signals) -> None:
    """As under nohup, and in the background of a shell."""
    ignore = f"signal.signal({int(number)}, signal.SIG_IGN)"
    with Program(by, QUIET, tmp_path, before=ignore) as process:
        assert verdict(process.socket) is Verdict.CONTINUE
        process.signal(number)
        for count in (1, 2, 3):  # a filter that was told to end would not get so far
            process.signal(signal.SIGUSR1)
            process.log.wait_for_count("SIGUSR1 means nothing", count)
            assert verdict(process.path) is Verdict.CONTINUE
        process.stop()


def test_a_supervisor_under_nohup_still_reloads(tmp_path: Path) -> None:
    with Program("milter run", QUIET, tmp_path, before="signal.signal(signal.SIGHUP, signal.SIG_IGN)") as process:
        assert process.socket
        process.signal(signal.SIGHUP)
        process.log.wait_for("was loaded again")
        process.stop()


@pytest.mark.parametrize("by", BOTH)
def test_a_signal_that_was_blocked_is_heard(tmp_path: Path, by: str) -> None:
    block = "signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())"
    with Program(by, QUIET, tmp_path, before=block) as process:
        assert verdict(process.socket) is Verdict.CONTINUE
        process.stop()


@pytest.mark.parametrize("by", BOTH)
def test_a_signal_that_waited_blocked_ends_it_after_the_start(tmp_path: Path, by: str) -> None:
    pending = "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM]); os.kill(os.getpid(), signal.SIGTERM)"
    with Program(by, QUIET, tmp_path, before=pending) as process:
        assert process.wait() == 0


@pytest.mark.parametrize("by", BOTH)
def test_the_exit_codes_of_what_handlers_start_are_not_lost(tmp_path: Path, by: str) -> None:
    ignore = "signal.signal(signal.SIGCHLD, signal.SIG_IGN)"
    with Program(by, FILTER, tmp_path, before=ignore) as process:
        assert verdict(process.socket) is Verdict.CONTINUE
        process.stop()


@pytest.mark.parametrize("by", BOTH)
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_that_means_nothing_is_told(tmp_path: Path, by: str, number: signal.Signals) -> None:
    with Program(by, QUIET, tmp_path) as process:
        assert verdict(process.socket) is Verdict.CONTINUE
        process.signal(number)
        process.log.wait_for(f"{number.name} means nothing to a filter, and is ignored")
        assert verdict(process.socket) is Verdict.CONTINUE
        process.stop()


def test_a_worker_gets_it_too(tmp_path: Path) -> None:
    with Program("milter run", QUIET, tmp_path) as process:
        assert verdict(process.socket) is Verdict.CONTINUE
        (worker,) = children(process.pid)
        os.kill(worker, signal.SIGUSR1)
        process.log.wait_for("SIGUSR1 means nothing to a filter, and is ignored")
        process.stop()


@pytest.mark.parametrize("by", BOTH)
def test_a_handler_of_the_program_s_own_keeps_its_signal(tmp_path: Path, by: str) -> None:
    text = QUIET + "import signal\nsignal.signal(signal.SIGUSR1, lambda *_: os.write(1, b'mine\\n'))\n"
    with Program(by, text, tmp_path) as process:
        assert process.socket
        pid = process.pid if by == "app.run" else children(process.pid)[0]
        os.kill(pid, signal.SIGUSR1)
        process.stdout.wait_for("mine")
        process.stop()


@pytest.mark.parametrize("by", BOTH)
def test_stopped_and_continued_it_serves(tmp_path: Path, by: str) -> None:
    with Program(by, QUIET, tmp_path) as process:
        assert verdict(process.socket) is Verdict.CONTINUE
        process.signal(signal.SIGSTOP)  # not SIGTSTP, which means nothing to a group without a terminal
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
        process.signal(signal.SIGCONT)
        assert verdict(process.socket) is Verdict.CONTINUE
        process.stop()


@pytest.mark.parametrize("options", [[], ["--metrics", "127.0.0.1:0"]])
def test_ctrl_c_on_a_terminal_ends_all_its_processes_well(tmp_path: Path, options: list[str]) -> None:
    """The terminal sends it to the whole group."""
    with Program("milter run", QUIET, tmp_path, "--workers", "2", *options, before="os.setpgid(0, 0)") as process:
        assert verdict(process.socket) is Verdict.CONTINUE
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait() == 0
    assert not any(word in process.stderr.text for word in ("Traceback", "ERROR", "CRITICAL"))
