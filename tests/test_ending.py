# SPDX-License-Identifier: GPL-3.0-or-later
"""The end of a filter's process: its threads, executors and functions of ``atexit``."""

import signal
from pathlib import Path

import pytest

from tests.launched import BOTH, Program

FINISHING = """
import atexit, os, sys, threading
from concurrent.futures import ThreadPoolExecutor
from milter import Milter

app = Milter("finishing")
stopped = threading.Event()
pool = ThreadPoolExecutor(1)
atexit.register(lambda: print("at exit"))

def finish(text):
    stopped.wait()
    for _ in range(3):
        os.sched_yield()
    sys.stdout.write(text + "\\n")  # at once; print may be interrupted before the end of the line

@app.on_start
def start():
    pool.submit(finish, "executor")
    threading.Thread(target=finish, args=("thread",)).start()

@app.on_stop
def stop():
    stopped.set()
"""

ENDLESS = """
import threading
from milter import Milter

app = Milter("endless")

@app.on_start
def start():
    threading.Thread(target=threading.Event().wait, name="never done").start()
"""


@pytest.mark.parametrize("by", BOTH)
def test_threads_and_executors_finish(tmp_path: Path, by: str) -> None:
    with Program(by, FINISHING, tmp_path) as process:
        assert process.socket
        process.stop()
    assert sorted(process.stdout.lines) == ["at exit", "executor", "thread"]
    assert process.stdout.lines[-1] == "at exit"


def test_a_thread_that_never_ends_is_left_when_the_grace_is_over(tmp_path: Path) -> None:
    with Program("milter run", ENDLESS, tmp_path, "--grace", "0") as process:
        assert process.socket
        process.signal(signal.SIGTERM)
        assert process.wait() == 70
    assert any("the process ends without waiting for threads: never done" in line for line in process.log.lines)


def test_a_second_signal_leaves_it_sooner(tmp_path: Path) -> None:
    with Program("milter run", ENDLESS, tmp_path, "--grace", "3600") as process:
        assert process.socket
        process.signal(signal.SIGTERM)
        process.log.wait_for("waiting up to 3600 seconds for the end of threads: never done")
        process.signal(signal.SIGTERM)
        process.log.wait_for("the process ends without waiting for threads: never done")
        assert process.wait() == 70


def test_a_program_of_its_own_says_what_it_waits_for(tmp_path: Path) -> None:
    with Program("app.run", ENDLESS, tmp_path) as process:
        assert process.socket
        process.signal(signal.SIGTERM)
        process.log.wait_for("the filter has stopped; threads that still run: never done")
        process.signal(signal.SIGTERM)
        assert process.wait() == -signal.SIGTERM
