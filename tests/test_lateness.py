# SPDX-License-Identifier: GPL-3.0-or-later
"""Handlers that take so long that their MTA may give up are named in the log, while they run and afterwards."""

import asyncio
import logging
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from milter import Context, EomContext, Message, Milter, Stage, Status, watch
from milter.testing import Client, Verdict
from milter.watch import Watch
from tests.conftest import Serve, begin_message, send_content, send_message

LIMIT = 30.0
"""Seconds after which something hangs."""


class Lines(logging.Handler):
    """What the log says, for those who wait for it."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []
        self._more = threading.Condition()

    def emit(self, record: logging.LogRecord) -> None:
        with self._more:
            self.lines.append(record.getMessage())
            self._more.notify_all()

    def find(self, text: str) -> str:
        """The first line with this; it is waited for."""
        with self._more:
            found = self._more.wait_for(lambda: [line for line in self.lines if text in line], LIMIT)
        assert found, self.lines
        return found[0]


@pytest.fixture
def lines() -> Iterator[Lines]:
    handler = Lines()
    log = logging.getLogger("milter")
    log.addHandler(handler)
    yield handler
    log.removeHandler(handler)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that takes any time is late."""
    monkeypatch.setattr(watch, "_LATE", 0.001)
    monkeypatch.setattr(watch, "_LATE_AT", {Stage.CLOSE: math.inf})


class Slow:
    """Handlers that go on when their line is in the log, one in each style."""

    def __init__(self, lines: Lines) -> None:
        self._lines = lines

    def plain(self, *arguments: Any) -> Status:
        self._lines.find("Slow.plain still runs")
        return Status.CONTINUE

    async def coroutine(self, *arguments: Any) -> Status:
        await asyncio.to_thread(self._lines.find, "Slow.coroutine still runs")
        return Status.CONTINUE


def converse(client: Client) -> None:
    client.negotiate()
    client.macros(b"C", {"j": "mta.example"})
    client.connect_info()
    client.helo()
    client.unknown("FOO")
    client.mail("<ann@client.example>")
    client.macros(b"R", {"i": "QUEUE1"})
    client.rcpt("<bob@mta.example>")
    client.data()
    assert send_content(client).answer.verdict is Verdict.CONTINUE
    begin_message(client)
    client.abort()
    client.helo()


SENDMAIL = "For an answer there, Sendmail waits 10 seconds (T=R:10s), and Postfix "
COMMAND = SENDMAIL + "30 (milter_command_timeout)"
CONTENT = SENDMAIL + "300 (milter_content_timeout)"
END = (
    "Sendmail waits 5 minutes for all of it (T=E:5m), Postfix 300 seconds for each sign of progress "
    "(milter_content_timeout)"
)
HINTS = {
    "connect": COMMAND,
    "helo": COMMAND,
    "unknown": COMMAND,
    "mail": COMMAND,
    "rcpt": COMMAND,
    "data": COMMAND,
    "header": CONTENT,
    "eoh": CONTENT,
    "body": CONTENT,
    "eom": END,
    "abort": COMMAND,
}


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("style", ["plain", "coroutine"])
@pytest.mark.parametrize("stage", HINTS)
def test_a_slow_handler_is_named_while_it_runs_and_when_it_has_ended(
    serve: Serve, lines: Lines, stage: str, style: str
) -> None:
    app = Milter("test")
    getattr(app, f"on_{stage}")(getattr(Slow(lines), style))
    converse(serve(app).client())
    client = client_of(stage)
    event = "eoh" if stage == "header" else stage  # header fields wait for their end
    assert lines.find("still runs") == (
        f"Slow.{style} still runs, 0 seconds after on_{event} began ({client}). {HINTS[stage]}"
    )
    assert lines.find("took").startswith(f"on_{event} took 0 seconds ({client})")


def client_of(stage: str) -> str:
    queue_id = "None" if stage in ("connect", "helo", "unknown", "mail", "abort") else "'QUEUE1'"
    return f"client 'client.example' [192.0.2.1:0], queue id {queue_id}"


@pytest.mark.usefixtures("impatient")
def test_of_several_handlers_the_one_that_runs_is_named(serve: Serve, lines: Lines) -> None:
    app = Milter("test")
    app.on_eom(lambda ctx: Status.CONTINUE)
    app.on_message(Slow(lines).coroutine)
    assert send_message(serve(app).greeted()).answer.verdict is Verdict.CONTINUE
    assert lines.find("still runs").startswith("Slow.coroutine still runs, 0 seconds after on_eom began")


@pytest.mark.usefixtures("impatient")
def test_it_is_said_when_the_mta_did_not_wait(serve: Serve, lines: Lines) -> None:
    app = Milter("test")
    go_on = threading.Event()

    @app.on_rcpt
    def slow(ctx: Context, recipient: str, params: Any) -> Status:
        assert go_on.wait(LIMIT)
        return Status.CONTINUE

    peer = serve(app)
    client = peer.greeted()
    client.mail("<ann@client.example>")
    client.send(b"R", b"<bob@mta.example>\0")
    assert "slow still runs" in lines.find("still runs")
    peer.forget(client)
    client.close()
    go_on.set()
    assert lines.find("took").endswith(", and the MTA did not wait: it has closed its connection")


def test_quick_handlers_leave_no_line(serve: Serve, lines: Lines) -> None:
    app = Milter("test")
    app.on_rcpt(lambda ctx, recipient, params: Status.CONTINUE)
    app.on_eom(lambda ctx: Status.CONTINUE)
    peer = serve(app)
    converse(peer.client())
    assert [line for line in lines.lines if "still runs" in line or "took" in line] == []
    assert peer.server.engine.watch.running == {}


class Broken(logging.Filter):
    """As one that needs a variable which only handlers have set."""

    def filter(self, record: logging.LogRecord) -> bool:
        raise LookupError("no such variable here")


@pytest.mark.usefixtures("impatient")
def test_a_log_that_fails_fails_no_message(serve: Serve, lines: Lines) -> None:
    app = Milter("test", progress=0.001)
    going = threading.Event()

    @app.on_eom
    def slow(ctx: EomContext) -> Status:
        assert going.wait(LIMIT)
        return Status.ACCEPT

    client = serve(app).greeted()
    begin_message(client)
    client.eoh()
    log = logging.getLogger("milter")
    broken = Broken()
    log.addFilter(broken)
    try:
        client.send(b"E")
        for _ in range(5):
            assert client.receive().letter == b"p"
        going.set()
        while (letter := client.receive().letter) == b"p":
            pass
    finally:
        log.removeFilter(broken)
    assert letter == b"a"


@pytest.mark.usefixtures("impatient")
def test_a_handler_that_waits_for_its_mta_holds_up_no_line(
    serve: Serve, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does so under the lock of its session, which whoever asks for the queue id would need."""
    monkeypatch.setattr(watch, "_LATE_AT", {Stage.EOM: math.inf})
    app = Milter("test", progress=None)

    @app.on_message
    def rewrite(ctx: EomContext, message: Message) -> Status:
        if message.headers["Subject"] == "large":
            ctx.replace_body(bytes(1 << 24))
        lines.find("queue id 'OTHER'")
        return Status.CONTINUE

    peer = serve(app)
    stuck = peer.greeted()
    begin_message(stuck)
    stuck.header("Subject", "large")
    stuck.eoh()
    stuck.send(b"E")
    assert stuck.receive().letter == b"b"  # and no more is read
    monkeypatch.setattr(watch, "_LATE_AT", {})
    assert "rewrite still runs" in lines.find("queue id None")
    other = peer.greeted()
    begin_message(other)
    other.macros(b"E", {"i": "OTHER"})
    assert send_content(other).answer.verdict is Verdict.CONTINUE
    peer.forget(stuck)
    stuck.close()


# ---- The thread's table


class Running:
    """A call, for the table alone."""

    late = False

    def __init__(self, stage: Stage) -> None:
        self.stage = stage

    def offer_progress(self) -> bool:
        return True


def told_by(progress: float | None) -> tuple[Watch, Callable[[float], tuple[float, list[Stage]]]]:
    told: list[Stage] = []
    watching = Watch(progress, lambda call, began: told.append(call.stage))

    def look(now: float) -> tuple[float, list[Stage]]:
        told.clear()
        return watching._look(now), list(told)

    return watching, look


def test_each_call_is_told_once_and_when_it_is_due() -> None:
    watching, look = told_by(None)
    table: Any = watching.running
    assert look(1000.0) == (1005.0, [])
    table[Running(Stage.RCPT)] = 1001.0
    table[Running(Stage.HEADER)] = 1004.0
    table[Running(Stage.EOM)] = 1000.0
    table[Running(Stage.CLOSE)] = 1000.0
    assert look(1005.0) == (1006.0, [])
    assert look(1006.0) == (1009.0, [Stage.RCPT])
    assert look(1009.0) == (1014.0, [Stage.HEADER])
    assert look(1149.0) == (1150.0, [])
    assert look(1150.0) == (1155.0, [Stage.EOM])
    assert look(9999.0) == (10004.0, [])


def test_progress_and_lateness_do_not_disturb_each_other() -> None:
    watching, look = told_by(30.0)
    table: Any = watching.running
    table[Running(Stage.EOM)] = 1000.0
    table[Running(Stage.RCPT)] = 1000.0
    assert look(1005.0) == (1010.0, [Stage.RCPT])
    assert look(1028.0) == (1033.0, [])
    assert watching._shown == {next(iter(table)): 1028.0}
    assert look(1150.0) == (1155.0, [Stage.EOM])
    table.clear()
    assert look(1180.0) == (1185.0, [])
    assert watching._shown == {}
