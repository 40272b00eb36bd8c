# SPDX-License-Identifier: GPL-3.0-or-later
"""Context variables: what a handler sets, the next ones of the same message see, and no others.

Loggers and tracers keep there what belongs to one message. Plain functions and coroutines run on different threads.
"""

import asyncio
import contextlib
import contextvars
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from milter import Context, Milter, Status, loop
from milter.testing import Verdict
from tests.conftest import Serve, begin_message, send_content, send_message

LIMIT = 30.0
"""Seconds after which something hangs."""

STAGES = ["connect", "helo", "mail", "rcpt", "data", "header", "eoh", "body", "eom", "message", "abort", "close"]

trail: contextvars.ContextVar[tuple[str, ...]] = contextvars.ContextVar("trail", default=())
"""The stages that have left their mark."""


Visit = Callable[[str], None]


def mark(stage: str) -> None:
    trail.set((*trail.get(), stage))


def plain(stage: str, visit: Visit) -> Callable[..., Status | None]:
    def handler(*arguments: Any) -> Status | None:
        visit(stage)
        return None

    return handler


def coroutine(stage: str, visit: Visit) -> Callable[..., Any]:
    async def handler(*arguments: Any) -> Status | None:
        await asyncio.sleep(0)
        visit(stage)
        await asyncio.sleep(0)
        return None

    return handler


def observer(stage: str, visit: Visit) -> Callable[..., None]:
    def handler(*arguments: Any) -> None:
        visit(stage)

    return handler


def slow_observer(stage: str, visit: Visit) -> Callable[..., Any]:
    async def handler(*arguments: Any) -> None:
        await asyncio.sleep(0)
        visit(stage)

    return handler


KINDS = {
    "plain": [plain],
    "coroutines": [coroutine],
    "observers": [observer],
    "mixed": [plain, coroutine],
    "observing coroutines": [slow_observer],
    "all sorts": [coroutine, observer, plain, slow_observer, observer],
}


def marking(kinds: list[Any], visit: Visit, stages: list[str] = STAGES) -> Milter:
    """A filter with a handler at each stage, of these kinds in turn."""
    app = Milter("test")
    for number, stage in enumerate(stages):
        getattr(app, f"on_{stage}")(kinds[number % len(kinds)](stage, visit))
    return app


@pytest.mark.parametrize("kinds", KINDS.values(), ids=KINDS)
def test_a_message_sees_what_its_handlers_and_those_of_its_connection_set(serve: Serve, kinds: list[Any]) -> None:
    seen: list[tuple[str, ...]] = []

    def visit(stage: str) -> None:
        mark(stage)
        seen.append(trail.get())

    client = serve(marking(kinds, visit)).greeted()
    connection = ("connect", "helo")
    message = (*connection, "mail", "rcpt", "data", "header", "eoh", "body", "eom", "message")
    for _ in range(2):  # the second one knows nothing of the first
        seen.clear()
        assert send_message(client).answer.verdict is Verdict.CONTINUE
        assert seen[-1] == message
    seen.clear()
    begin_message(client)
    client.abort()
    client.mail("<ann@client.example>")
    client.quit()
    client.wait_for_close()
    assert (*connection, "mail", "rcpt", "data", "abort") in seen
    assert seen[-1] == (*connection, "close")


@pytest.mark.parametrize("kinds", KINDS.values(), ids=KINDS)
def test_messages_side_by_side_keep_apart(serve: Serve, kinds: list[Any]) -> None:
    name: contextvars.ContextVar[str] = contextvars.ContextVar("name")
    wrong: list[str] = []
    app = Milter("test")

    @app.on_mail
    async def begin(ctx: Context, sender: str, params: Any) -> None:
        assert name.get("nothing") == "nothing"
        name.set(sender)

    def check(ctx: Context, *arguments: Any) -> Status | None:
        if name.get("nothing") != ctx.sender:
            wrong.append(f"{name.get('nothing')} in the message of {ctx.sender}")
        return None

    async def check_later(ctx: Context, *arguments: Any) -> Status | None:
        await asyncio.sleep(0)
        return check(ctx)

    for number, stage in enumerate(STAGES[3:10]):
        getattr(app, f"on_{stage}")(check_later if kinds[number % len(kinds)] in (coroutine, slow_observer) else check)
    peer = serve(app)

    def send(number: int) -> None:
        client = peer.greeted()
        for message in range(10):
            client.mail(f"<{number}.{message}@client.example>")
            client.rcpt("<bob@mta.example>")
            client.data()
            assert send_content(client).answer.verdict is Verdict.CONTINUE

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(send, range(12)))
    assert wrong == []


@pytest.mark.parametrize("kinds", KINDS.values(), ids=KINDS)
def test_what_one_handler_sets_another_can_take_back(serve: Serve, kinds: list[Any]) -> None:
    """Tracers do that with a token, and only in the context that it was made in."""
    tokens: list[contextvars.Token[tuple[str, ...]]] = []
    after: list[tuple[str, ...]] = []

    def visit(stage: str) -> None:
        if stage == "mail":
            tokens.append(trail.set(("a span",)))
        elif stage == "message":
            trail.reset(tokens.pop())
            after.append(trail.get())

    client = serve(marking(kinds, visit)).greeted()
    assert send_message(client).answer.verdict is Verdict.CONTINUE
    assert send_message(client).answer.verdict is Verdict.CONTINUE
    assert after == [(), ()]


@pytest.mark.parametrize("hook", [plain, coroutine])
@pytest.mark.parametrize("handler", [plain, coroutine])
def test_handlers_see_what_was_set_before_the_filter_began(serve: Serve, hook: Any, handler: Any) -> None:
    seen: list[tuple[str, ...]] = []
    app = Milter("test")
    app.on_start(hook("start", mark))
    app.on_start(hook("start too", mark))
    app.on_eom(handler("eom", lambda stage: seen.append(trail.get())))
    app.on_eom(handler("eom", mark))
    app.on_stop(hook("stop", lambda stage: seen.append(trail.get())))
    token = trail.set(("the program",))
    try:
        peer = serve(app)
    finally:
        trail.reset(token)
    for _ in range(2):
        assert send_message(peer.greeted()).answer.verdict is Verdict.CONTINUE
    peer.hang_up()
    peer.server.stop()
    assert trail.get() == (), "a hook sets nothing for the program"
    assert seen == [("the program", "start", "start too")] * 3


def test_negotiation_belongs_to_the_connection(serve: Serve) -> None:
    app = marking([plain], mark, ["connect", "helo"])
    seen: list[tuple[str, ...]] = []
    app.on_negotiate(lambda ctx: mark("negotiate"))
    app.on_mail(lambda ctx, sender, params: seen.append(trail.get()))
    peer = serve(app)
    for _ in range(2):
        begin_message(peer.greeted())
    assert seen == [("negotiate", "connect", "helo")] * 2


def test_a_second_greeting_is_still_the_same_connection(serve: Serve) -> None:
    seen: list[tuple[str, ...]] = []
    app = marking([plain, coroutine], mark, ["connect", "helo"])
    app.on_mail(lambda ctx, sender, params: seen.append(trail.get()))
    client = serve(app).greeted()
    client.helo("again.example")
    begin_message(client)
    assert seen == [("connect", "helo", "helo")]


def test_tasks_and_threads_of_a_coroutine_see_the_values_and_change_them_for_themselves(serve: Serve) -> None:
    app = Milter("test")
    seen: list[tuple[str, ...]] = []
    background: list[asyncio.Task[None]] = []

    async def task() -> None:
        mark("task")
        seen.append(trail.get())

    def call() -> None:
        mark("thread")
        seen.append(trail.get())

    @app.on_mail
    async def begin(ctx: Context, sender: str, params: Any) -> None:
        mark("mail")
        await asyncio.to_thread(call)
        await asyncio.gather(task(), task())
        background.append(asyncio.create_task(task()))

    @app.on_rcpt
    async def go_on(ctx: Context, recipient: str, params: Any) -> Status:
        await background.pop()
        seen.append(trail.get())
        return Status.CONTINUE

    begin_message(serve(app).greeted())
    assert seen == [("mail", "thread"), ("mail", "task"), ("mail", "task"), ("mail", "task"), ("mail",)]


def test_a_plain_handler_may_run_a_loop_of_its_own(serve: Serve) -> None:
    app = Milter("test")
    seen: list[tuple[str, ...]] = []

    async def inner() -> None:
        await asyncio.sleep(0)
        mark("inner")
        seen.append(trail.get())

    @app.on_mail
    def run(ctx: Context, sender: str, params: Any) -> Status:
        mark("mail")
        asyncio.run(inner())
        seen.append(trail.get())
        return Status.CONTINUE

    begin_message(serve(app).greeted())
    assert seen == [("mail", "inner"), ("mail",)]


# ---- A coroutine that does not end


@contextlib.contextmanager
def one_that_stays(app: Milter, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """At MAIL: cancelled at once, it blocks the loop within its context until the end of the test."""
    monkeypatch.setattr(loop, "_GRACE", 0.01)
    here, leave = threading.Event(), threading.Event()
    app.handler_timeout = 0.01

    @app.on_mail
    async def stay(ctx: Context, sender: str, params: Any) -> Status:
        mark("stays")
        here.set()
        leave.wait(LIMIT)
        return Status.CONTINUE

    try:
        yield here
    finally:
        leave.set()


def test_a_coroutine_that_does_not_end_keeps_its_context_for_itself(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody else could run in it: "cannot enter context: ... is already entered"."""
    app = Milter("test", on_error=Status.CONTINUE)
    seen: list[tuple[str, ...]] = []
    app.on_helo(plain("helo", mark))
    app.on_mail(plain("mail", mark))
    with one_that_stays(app, monkeypatch) as here:
        app.on_rcpt(plain("rcpt", mark))
        app.on_eom(plain("eom", lambda stage: seen.append(trail.get())))
        client = serve(app).greeted()
        assert send_message(client).answer.verdict is Verdict.CONTINUE
        assert here.is_set()
    assert seen == [("helo", "mail", "rcpt")]
    assert "did not end by that" in caplog.text
    assert "already entered" not in caplog.text


# ---- The log


class Noting(logging.Filter):
    """What loggers do that know of context variables."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.trail = trail.get()
        return True


@pytest.fixture
def trails(caplog: pytest.LogCaptureFixture) -> Callable[[], list[tuple[str, tuple[str, ...]]]]:
    caplog.handler.addFilter(Noting())
    caplog.set_level(logging.INFO)
    return lambda: [
        (record.name, record.trail)  # type: ignore[attr-defined]
        for record in caplog.records
        if record.levelno == logging.ERROR or record.name == "milter.access"
    ]


@pytest.mark.parametrize("kind", [plain, coroutine])
def test_the_lines_of_a_message_are_logged_with_its_variables(serve: Serve, kind: Any, trails: Any) -> None:
    def fail(stage: str) -> None:
        mark(stage)
        raise RuntimeError("test")

    app = marking([plain, coroutine], mark, STAGES[:8])
    app.on_eom(kind("eom", fail))
    client = serve(app, access_log=True).greeted()
    assert send_message(client).answer.verdict is Verdict.TEMPFAIL
    whole = (*STAGES[:8], "eom")
    assert trails() == [("milter", whole), ("milter.access", whole)]


def test_so_is_the_line_of_a_refused_connection(serve: Serve, trails: Any) -> None:
    app = Milter("test")

    @app.on_connect
    def refuse(ctx: Context, hostname: str, address: Any) -> Status:
        mark("connect")
        return Status.REJECT

    client = serve(app, access_log=True).client()
    client.negotiate()
    client.connect_info()
    assert trails() == [("milter.access", ("connect",))]
