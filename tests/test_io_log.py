# SPDX-License-Identifier: GPL-3.0-or-later
"""What libmilter says reaches Python's logging, where its system calls are redirected."""

import logging
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from milter.libmilter import libmilter
from milter.log_pipe import LogPipe
from milter.testing.wire import Packet
from tests.filter_process import running_filters
from tests.test_io import Connection

TOO_OLD = Packet(b"O", b"\0\0\0\1" + b"\0\0\1\xff" + b"\0\x1f\xff\xff")
redirected = pytest.mark.skipif(not libmilter.redirected, reason="libmilter's system calls are not redirected here")

LEVELS = {
    0: "CRITICAL",
    1: "CRITICAL",
    2: "CRITICAL",
    3: "ERROR",
    4: "WARNING",
    5: "INFO",
    6: "INFO",
    7: "DEBUG",
    8 * 2 + 3: "ERROR",  # with the facility mail
}


class Slow(logging.Handler):
    """Handles a record only when it may."""

    def __init__(self) -> None:
        super().__init__()
        self.may = threading.Event()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.may.wait()
        self.lines.append(record.getMessage())


@pytest.mark.parametrize("priority", LEVELS)
def test_a_line_has_the_level_of_its_priority(priority: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="milter.libmilter")
    pipe = LogPipe()
    os.write(pipe.writer, f"<{priority}>filter: 100% <wrong>\n".encode())
    pipe.drain()
    assert [(record.name, record.levelname, record.getMessage()) for record in caplog.records] == [
        ("milter.libmilter", LEVELS[priority], "filter: 100% <wrong>")
    ]


def test_a_worker_of_libmilter_that_comes_after_its_end_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="milter.libmilter")
    pipe = LogPipe()
    os.write(pipe.writer, b"<3>TASKMGR_LOCK error\n<3>TASKMGR_UNLOCK error\n<3>another error\n")
    pipe.drain()
    assert [record.levelname for record in caplog.records] == ["DEBUG", "DEBUG", "ERROR"]


def test_lines_that_come_in_pieces_are_whole_and_no_byte_is_an_error(caplog: pytest.LogCaptureFixture) -> None:
    pipe = LogPipe()
    for piece in (b"<3>o", b"ne\n<3>", b"\xff\n"):
        os.write(pipe.writer, piece)
    pipe.drain()
    assert caplog.messages == ["one", "\\xff"]


def test_draining_waits_for_all_lines_also_when_the_pipe_is_full() -> None:
    slow, log = Slow(), logging.getLogger("milter.libmilter")
    log.addHandler(slow)
    try:
        pipe, written = LogPipe(), 0
        while _fits(pipe.writer, f"<3>{written}\n".encode()):
            written += 1
        drainer = threading.Thread(target=pipe.drain)
        drainer.start()
        slow.may.set()
        drainer.join()
        assert slow.lines == [str(number) for number in range(written)]
    finally:
        log.removeHandler(slow)


def _fits(descriptor: int, line: bytes) -> bool:
    try:
        return os.write(descriptor, line) > 0
    except BlockingIOError:
        return False


@redirected
def test_a_programs_log_has_what_libmilter_says_until_the_end(tmp_path: Path) -> None:
    with running_filters() as run:
        process = run("tests/filters/recorder.py", f"unix:{tmp_path}/s", "replying")
        for _ in range(100):
            client = Connection(process.socket)
            client.send(TOO_OLD.encode())
            client.hear_end()
            client.close()
        process.signal(signal.SIGTERM)
        assert process.wait() == 0
    lines = process.stderr.lines
    assert len(lines) == 100
    assert all("recorder: st_optionneg" in line and "protocol version too old 1 < 2" in line for line in lines)


FORKS = """
import os, sys
from milter import Milter
from milter._shim import lib
app = Milter("forks")
with app.start(sys.argv[1]):
    child = os.fork()
    if child == 0:
        os._exit(lib.milter_io_log_to(-1) + 1)
    assert os.waitpid(child, 0)[1] == 0, "the child has no pipe"
    assert lib.milter_io_log_to(-1) >= 0, "its parent has"
"""


@redirected
def test_a_forked_child_does_not_write_to_a_pipe_that_it_does_not_read(tmp_path: Path) -> None:
    program = [sys.executable, "-c", FORKS, f"unix:{tmp_path}/s"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    result = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
