# SPDX-License-Identifier: GPL-3.0-or-later
"""A log that fails: whatever raises there, mail gets the verdict that it gets otherwise."""

import logging
import sys
from pathlib import Path
from typing import Any, cast

import pytest

from milter import Milter, safe_log
from milter.safe_log import SafeLog
from milter.testing import Verdict
from tests.conftest import Serve, send_message
from tests.launched import Program
from tests.test_outlets import verdict
from tests.test_supervisor import until_ready

BREAK = {
    "a handler": """
class Broken(logging.Handler):
    def emit(self, record):
        raise OSError(28, "No space left on device")
logging.getLogger().addHandler(Broken())
""",
    "a filter of a handler": """
def broken(record):
    raise LookupError("no request here")
for handler in logging.getLogger().handlers or [logging.StreamHandler()]:
    logging.getLogger().addHandler(handler)
    handler.addFilter(broken)
""",
    "a filter of the library's logger": """
def broken(record):
    raise LookupError("no request here")
for name in ("milter", "milter.access"):
    logging.getLogger(name).addFilter(broken)
""",
    "a file that cannot be opened again": """
import logging.handlers, os, shutil
os.mkdir("gone")
logging.getLogger().addHandler(logging.handlers.WatchedFileHandler("gone/log"))
shutil.rmtree("gone")
""",
    "a formatter": """
class Broken(logging.Formatter):
    def format(self, record):
        return record.request
handler = logging.StreamHandler()
handler.setFormatter(Broken())
logging.getLogger().addHandler(handler)
""",
    "a record": """
def broken(*arguments, **more):
    raise TypeError("no record")
logging.setLogRecordFactory(broken)
""",
    "no level": "logging.disable(logging.CRITICAL)",
}

FILTER = """
import logging
from milter import Context, Milter, Status

app = Milter("logging")

@app.on_helo
def fail(ctx: Context, name: str) -> None:
    if name == "fails.example":
        raise RuntimeError("of the handler's own")
%s
"""


@pytest.mark.parametrize("broken", BREAK)
def test_mail_goes_on_without_a_log(tmp_path: Path, broken: str) -> None:
    with until_ready(tmp_path) as environment:
        process = Program("milter run", FILTER % BREAK[broken], tmp_path, "--access-log", environment=environment)
    with process:
        assert [verdict(process.path) for _ in range(3)] == [Verdict.CONTINUE] * 3
        assert verdict(process.path, "fails.example") is Verdict.TEMPFAIL
        assert verdict(process.path) is Verdict.CONTINUE
        process.stop()
    told = process.stderr.text.count("milter: the log failed, and lines of it are missing.")
    assert told == (0 if broken in ("a formatter", "no level") else 1)  # a formatter's failure logging itself tells


def test_a_configuration_of_its_own_leaves_the_library_s_log(tmp_path: Path) -> None:
    text = """
import logging.config
logging.config.dictConfig({
    "version": 1,
    "handlers": {"mine": {"class": "logging.StreamHandler"}},
    "root": {"level": "INFO", "handlers": ["mine"]},
})
"""
    with Program("milter run", FILTER % text, tmp_path, "--access-log") as process:
        assert verdict(process.socket, "fails.example") is Verdict.TEMPFAIL
        process.stop()
    assert "fail failed in on_helo" in process.stderr.text
    assert "verdict=tempfail" in process.stderr.text


def test_metrics_that_fail_fail_no_message(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    peer = serve(Milter("counted"), metrics="127.0.0.1:0")
    ledger = peer.server.engine.ledger
    assert ledger is not None

    class Broken:
        def raised(self, *arguments: object) -> None:
            raise OSError("no space left")

        took = decided = refused = raised

    ledger.metrics = cast(Any, Broken())
    for _ in range(2):
        assert send_message(peer.greeted()).answer.verdict is Verdict.CONTINUE
    assert caplog.text.count("the metrics failed") == 1


def test_the_line_that_logs_is_named(caplog: pytest.LogCaptureFixture) -> None:
    log = SafeLog("milter.test")
    log.warning("one")
    try:
        raise ValueError("x")
    except ValueError:
        log.exception("two")
    here = [(record.filename, record.funcName) for record in caplog.records]
    assert here == [("test_safe_log.py", "test_the_line_that_logs_is_named")] * 2


def test_standard_error_that_fails_as_well_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    log = SafeLog("milter.test")

    class Closed:
        def write(self, text: str) -> int:
            raise ValueError("closed")

    def broken(record: logging.LogRecord) -> bool:
        raise AssertionError("a filter of the test's")

    monkeypatch.setattr(sys, "stderr", Closed())
    monkeypatch.setattr(safe_log, "_told", set())
    log.logger.addFilter(broken)
    try:
        log.error("not to be seen")
    finally:
        log.logger.removeFilter(broken)
