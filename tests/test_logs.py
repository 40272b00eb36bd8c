# SPDX-License-Identifier: GPL-3.0-or-later
"""What a filter that is a program of its own logs: its form, and where it goes."""

import contextlib
import enum
import json
import logging
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from milter import Milter, MilterError, Status, logs
from milter.logs import JournalFormatter, JsonFormatter, SyslogFormatter, TextFormatter, configure
from tests.conftest import Serve, send_message

log = logging.getLogger("milter.test")
TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00"


@pytest.fixture(autouse=True)
def unchanged_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    if logs._installed is not None:
        logs._installed.close()
        logs._installed = None
    root.handlers[:] = handlers
    root.setLevel(level)


def record(message: str = "text", *, failed: bool = False, **attributes: Any) -> logging.LogRecord:
    failure = None
    if failed:
        try:
            raise RuntimeError("bad\n2026-01-31T12:00:00.123+00:00 INFO milter[1]: forged \x1b[2J")
        except RuntimeError as error:
            failure = (type(error), error, error.__traceback__)
    made = logging.LogRecord("milter.test", logging.INFO, __file__, 1, message, (), failure)
    vars(made).update(attributes)
    return made


# ---- Text ------------------------------------------------------------------------------------


def test_text_has_time_level_logger_and_process(capsys: pytest.CaptureFixture[str]) -> None:
    configure()
    log.warning("number %d", 7)
    assert re.fullmatch(TIME + rf" WARNING milter\.test\[{os.getpid()}\]: number 7\n", capsys.readouterr().err)


def test_the_time_is_that_of_the_record_in_utc() -> None:
    assert TextFormatter().format(record(created=1769860800.1239)).startswith("2026-01-31T12:00:00.123+00:00 INFO ")


def test_no_text_looks_like_a_line_of_its_own() -> None:
    text = TextFormatter().format(record("one\n2026-01-31T12:00:00.123+00:00 INFO milter[1]: two\x1b", failed=True))
    first, *rest = text.split("\n")
    assert first.endswith(r"one\n2026-01-31T12:00:00.123+00:00 INFO milter[1]: two\x1b")
    assert rest[0] == "  Traceback (most recent call last):"
    assert all(line.startswith("  ") for line in rest)
    assert "\x1b" not in text


def test_the_stack_that_a_record_brings_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    configure()
    log.info("here", stack_info=True)
    assert "\n  Stack (most recent call last):\n" in capsys.readouterr().err


@pytest.mark.parametrize("level", ["warning", "WARNING", logging.WARNING])
def test_below_the_level_nothing_is_shown(capsys: pytest.CaptureFixture[str], level: str | int) -> None:
    configure(level)
    log.info("quiet")
    log.warning("loud")
    assert re.findall("quiet|loud", capsys.readouterr().err) == ["loud"]


def test_a_later_call_replaces_what_the_earlier_one_set_up(capsys: pytest.CaptureFixture[str]) -> None:
    configure()
    configure(format="json")
    log.info("once")
    assert json.loads(capsys.readouterr().err)["message"] == "once"


@pytest.mark.parametrize(("level", "format"), [("loud", "text"), ("info", "xml")])
def test_a_level_or_format_that_does_not_exist_is_refused(level: str, format: Any) -> None:
    before = list(logging.getLogger().handlers)
    with pytest.raises(ValueError, match=r"loud|xml"):
        configure(level, format)
    assert logging.getLogger().handlers == before


# ---- The journal ---------------------------------------------------------------------------


def journal(monkeypatch: pytest.MonkeyPatch, inode: int = 0) -> None:
    file = os.fstat(2)
    monkeypatch.setenv("JOURNAL_STREAM", f"{file.st_dev}:{file.st_ino + inode}")


@pytest.mark.parametrize(
    ("level", "priority"),
    [("debug", 7), ("info", 6), ("warning", 4), ("error", 3), ("critical", 2)],
)
def test_the_journal_gets_the_level_as_systemd_wants_it(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], level: str, priority: int
) -> None:
    journal(monkeypatch)
    configure("debug")
    getattr(log, level)("number %d\n<0>forged", 7)
    assert capfd.readouterr().err == f"<{priority}>milter.test: number 7\\n<0>forged\n"


def test_the_journal_gets_the_level_with_each_line_of_a_traceback() -> None:
    lines = JournalFormatter().format(record("one", failed=True)).split("\n")
    assert lines[:2] == ["<6>milter.test: one", "<6>  Traceback (most recent call last):"]
    assert all(line.startswith("<6>  ") for line in lines[1:])


def test_standard_error_that_is_no_journal_has_the_usual_form(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    journal(monkeypatch, inode=1)
    configure()
    log.info("here")
    assert re.match(TIME, capfd.readouterr().err)


# ---- JSON ------------------------------------------------------------------------------------


def test_json_has_an_object_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    configure(format="json")
    log.error("number %d", 7)
    entry = json.loads(capsys.readouterr().err)
    assert re.fullmatch(TIME, entry.pop("time"))
    assert entry == {"level": "ERROR", "logger": "milter.test", "pid": os.getpid(), "message": "number 7"}


def test_json_has_the_traceback_within() -> None:
    line = JsonFormatter().format(record(failed=True))
    assert "\n" not in line
    exception = json.loads(line)["exception"]
    assert exception.startswith("Traceback (most recent call last):\n")
    assert "RuntimeError: bad\n" in exception


def test_json_shows_the_fields_of_the_access_log(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    configure(format="json")
    app = Milter("test")
    app.on_eom(lambda ctx: Status.REJECT)
    send_message(serve(app, access_log=True).greeted())
    entries = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    (entry,) = (entry for entry in entries if entry["logger"] == "milter.access")
    assert entry["verdict"] == "reject"
    assert entry["recipients"] == ["bob@mta.example"]
    assert entry["size"] is None
    assert entry["message"].startswith("queue_id=- client=client.example ")


def test_a_record_can_not_overwrite_what_the_log_itself_says() -> None:
    entry = json.loads(JsonFormatter().format(record(milter={"level": "DEBUG", "pid": 1, "more": 2})))
    assert (entry["level"], entry["pid"], entry["more"]) == ("INFO", os.getpid(), 2)


class _Colour(enum.IntEnum):
    RED = 3


def test_json_is_valid_whatever_a_record_brings() -> None:
    circle: list[Any] = []
    circle.append(circle)
    fields = {
        "nan": float("nan"),
        "infinite": float("-inf"),
        "huge": 10**5000,
        "enum": _Colour.RED,
        "bytes": b"\xff",
        "object": Status.REJECT,
        3: {(1, 2): {"x"}},
        "circle": circle,
        "surrogate \udcff": "\udcff\ud800 \u2028 \u00e9",
    }
    line = JsonFormatter().format(record("\udcff\n\u2028", milter=fields))
    assert re.fullmatch(r"[ -~]*", line)
    entry = json.loads(line, parse_constant=_no_json)
    assert entry["message"] == "\udcff\n\u2028"
    assert (entry["nan"], entry["infinite"], entry["enum"]) == ("nan", "-inf", 3)
    assert int(entry["huge"], 16) == 10**5000
    assert (entry["bytes"], entry["object"]) == (repr(b"\xff"), repr(Status.REJECT))
    assert entry["3"] == {"(1, 2)": ["x"]}
    assert entry["surrogate \udcff"] == fields["surrogate \udcff"]


def _no_json(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


_BYTES = st.characters(min_codepoint=0xDC80, max_codepoint=0xDCFF, categories=["Cs"])
_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters() | _BYTES) | st.binary(),
    lambda values: st.lists(values) | st.dictionaries(st.text() | st.integers(), values),
)


@given(st.text(st.characters() | _BYTES), st.dictionaries(st.text(), _VALUES))
def test_json_is_always_valid_and_in_ascii(message: str, fields: dict[str, Any]) -> None:
    line = JsonFormatter().format(record(message, milter=fields))
    assert re.fullmatch(r"[ -~]*", line)
    assert json.loads(line, parse_constant=_no_json)["message"] == message


# ---- Syslog ----------------------------------------------------------------------------------

MAIL = 2 << 3


@pytest.fixture
def system_log(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "log"))
        listener.settimeout(10)
        yield listener


def test_syslog_gets_facility_level_logger_and_process(system_log: socket.socket) -> None:
    configure(syslog=system_log.getsockname())
    log.info("fine")
    log.warning("strange")
    name = f"milter.test[{os.getpid()}]: "
    assert system_log.recv(4096) == f"<{MAIL + 6}>{name}fine\0".encode()
    assert system_log.recv(4096) == f"<{MAIL + 4}>{name}warning: strange\0".encode()


def test_syslog_gets_one_line_with_the_traceback() -> None:
    text = SyslogFormatter().format(record("one\ntwo", failed=True))
    assert r"]: one\ntwo\nTraceback (most recent call last):\n" in text
    assert text.isprintable()


def test_syslog_gets_json_too(system_log: socket.socket) -> None:
    configure(format="json", syslog=system_log.getsockname())
    log.info("fine")
    head, _, text = system_log.recv(4096).decode().partition("]: ")
    assert head == f"<{MAIL + 6}>milter.test[{os.getpid()}"
    assert json.loads(text.rstrip("\0"))["message"] == "fine"


def test_syslog_of_another_machine_gets_datagrams() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.settimeout(10)
        host, port = listener.getsockname()
        configure(syslog=f"{host}:{port}")
        log.error("strange \udcff")
        assert listener.recv(4096) == rf"<{MAIL + 3}>milter.test[{os.getpid()}]: error: strange \xff".encode()


def test_a_system_log_that_is_not_there_is_told(tmp_path: Path) -> None:
    missing = tmp_path / "log"
    with pytest.raises(MilterError, match=re.escape(f"{missing} cannot be reached (No such file or directory): start")):
        configure(syslog=str(missing))
    missing.touch()
    with pytest.raises(MilterError, match="is no socket of the system's log"):
        configure(syslog=str(missing))


def test_a_system_log_where_nobody_listens_is_told(tmp_path: Path) -> None:
    path = str(tmp_path / "log")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as gone:
        gone.bind(path)
    with pytest.raises(MilterError, match=f"nobody listens at {path}"):
        configure(syslog=path)


@pytest.mark.parametrize("syslog", ["", ":514", "host:", "host:x", "host:0", "host:65536", "host:\u0663"])
def test_what_is_no_syslog_is_refused(syslog: str) -> None:
    with pytest.raises(ValueError, match="is no syslog: write /dev/log"):
        configure(syslog=syslog)


@pytest.mark.parametrize(
    ("syslog", "place"),
    [
        ("host", ("host", 514)),
        ("host:515", ("host", 515)),
        ("[2001:db8::1]:515", ("2001:db8::1", 515)),
        ("[2001:db8::1]", ("2001:db8::1", 514)),
    ],
)
def test_a_syslog_of_another_machine_may_be_written_so(syslog: str, place: tuple[str, int]) -> None:
    assert logs._host_and_port(syslog) == place


def test_a_machine_that_does_not_exist_is_told() -> None:
    with pytest.raises(MilterError, match=r"the syslog at nowhere\.invalid cannot be reached"):
        configure(syslog="nowhere.invalid")


# ---- A system's log in trouble ---------------------------------------------------------------


def test_a_system_log_that_does_not_read_stops_nobody(
    system_log: socket.socket, capsys: pytest.CaptureFixture[str]
) -> None:
    configure(syslog=system_log.getsockname())
    count = 0
    while "cannot be written" not in capsys.readouterr().err:  # the queue of a datagram socket is short
        log.info("number %d", count)
        count += 1
    log.info("lost as well")
    texts = []
    system_log.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            texts.append(system_log.recv(4096).decode())
    system_log.settimeout(10)
    assert [text.partition("]: ")[2] for text in texts] == [f"number {number}\0" for number in range(count - 1)]
    log.info("again")
    assert b"again" in system_log.recv(4096)
    assert b"lines lost until now: 2" in system_log.recv(4096)


def test_a_system_log_that_was_started_anew_gets_the_next_line(
    system_log: socket.socket, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configure(syslog=system_log.getsockname())
    log.info("before")
    system_log.close()
    (tmp_path / "log").unlink()
    log.info("lost")
    log.info("lost")
    assert capsys.readouterr().err.count("cannot be written") == 1
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as anew:
        anew.bind(str(tmp_path / "log"))
        anew.settimeout(10)
        log.info("after")
        assert anew.recv(4096).endswith(b"]: after\0")
        assert b"lines lost until now: 2" in anew.recv(4096)
