# SPDX-License-Identifier: GPL-3.0-or-later
"""Observers, whose events reach Python in batches: order, completeness, and what becomes of their failures."""

from collections.abc import Callable
from typing import Any

import pytest

from milter import Context, Milter, Status
from milter.testing import Verdict
from tests.conftest import Serve, begin_message, send_content

Events = list[tuple[str, ...]]


def observer(app: Milter[Any, Any], *stages: str) -> Events:
    """Observe these stages; returns the list in which stage and arguments are noted."""
    events: Events = []

    def observe(stage: str) -> Any:
        def note(ctx: Any, *arguments: Any) -> None:
            shown = (repr(argument) if isinstance(argument, bytes) else str(argument) for argument in arguments)
            events.append((stage, *shown))

        return note

    for stage in stages:
        getattr(app, f"on_{stage}")(observe(stage))
    return events


def replier(app: Milter[Any, Any], stage: str, events: Events, verdict: Status = Status.CONTINUE) -> None:
    def reply(ctx: Any, *arguments: Any) -> Status:
        events.append((f"{stage} replies",))
        return verdict

    getattr(app, f"on_{stage}")(reply)


CLIENT = [("connect", "client.example", "192.0.2.1:0"), ("helo", "client.example")]
MESSAGE = [
    ("mail", "ann@client.example", "Params([])"),
    ("data",),
    ("header", "Subject", "test"),
    ("eoh",),
    ("body", repr(b"text\r\n")),
]
OBSERVED = ("connect", "helo", "mail", "data", "header", "eoh", "body")


def test_observed_events_come_in_order_with_the_end_of_the_message(serve: Serve) -> None:
    app = Milter("test")
    batches: dict[object, list[str]] = {}

    def observe(stage: str) -> Any:
        def note(ctx: Any, *arguments: Any) -> None:
            batches.setdefault(ctx._call, []).append(stage)

        return note

    for stage in OBSERVED:
        getattr(app, f"on_{stage}")(observe(stage))
    client = serve(app).greeted()
    begin_message(client)
    send_content(client)
    begin_message(client)
    send_content(client)
    message = ["mail", "data", "header", "eoh", "body"]
    # HELO comes at once: its macros are replaced by those of another HELO after STARTTLS.
    assert list(batches.values()) == [["connect", "helo"], message, message]


@pytest.mark.parametrize("stage", ["helo", "mail", "data", "header", "eoh", "body"])
def test_a_stage_that_replies_brings_all_that_waited_before_it_first(serve: Serve, stage: str) -> None:
    app = Milter("test", header_replies="each")
    events = observer(app, *(observed for observed in OBSERVED if observed != stage))
    replier(app, stage, events)
    client = serve(app).client()
    client.negotiate()
    client.connect_info()
    steps: dict[str, Callable[[], object]] = {
        "helo": client.helo,
        "mail": lambda: client.mail("<ann@client.example>"),
        "data": lambda: (client.rcpt("<bob@mta.example>"), client.data()),
        "header": lambda: client.header("Subject", "test"),
        "eoh": client.eoh,
        "body": lambda: client.body(b"text\r\n"),
    }
    for name, step in steps.items():
        step()
        if name == stage:
            break
    whole = [*CLIENT, *MESSAGE]
    place = next(number for number, event in enumerate(whole) if event[0] == stage)
    assert events == [*whole[:place], (f"{stage} replies",)]


def test_an_observer_of_recipients_is_called_at_once_with_the_recipients_macros(serve: Serve) -> None:
    app = Milter("test")
    seen: list[tuple[str, str | None]] = []

    @app.on_rcpt
    def rcpt(ctx: Context, recipient: str, params: object) -> None:
        seen.append((str(recipient), ctx.macros.get("{rcpt_mailer}")))

    events = observer(app, "mail")
    client = serve(app).greeted()
    client.mail("<ann@client.example>")
    for name in ("bob", "carl"):
        client.macros(b"R", {"{rcpt_mailer}": f"mailer of {name}"})
        client.rcpt(f"<{name}@mta.example>")
    client.unknown("FOO")  # declined: nothing is sent, and nothing asked
    client.data()
    client.end_of_message()
    assert seen == [("bob@mta.example", "mailer of bob"), ("carl@mta.example", "mailer of carl")]
    assert events == MESSAGE[:1]


def test_an_abort_in_the_middle_of_a_batch_brings_what_was_seen_and_then_the_abort(serve: Serve) -> None:
    app = Milter("test")
    events = observer(app, "header", "body", "abort", "eom")
    client = serve(app).greeted()
    begin_message(client)
    client.header("Subject", "first")
    client.header("To", "first")
    client.abort()
    begin_message(client)
    send_content(client)
    assert events == [
        ("header", "Subject", "first"),
        ("header", "To", "first"),
        ("abort",),
        ("header", "Subject", "test"),
        ("body", repr(b"text\r\n")),
        ("eom",),
    ]


def test_an_abort_brings_the_batch_without_a_handler_of_aborts_too(serve: Serve) -> None:
    app = Milter("test")
    events = observer(app, "header")
    client = serve(app).greeted()
    begin_message(client)
    client.header("Subject", "first")
    client.abort()
    begin_message(client)
    send_content(client)
    assert events == [("header", "Subject", "first"), ("header", "Subject", "test")]


def test_a_connection_that_ends_at_once_is_observed_all_the_same(serve: Serve) -> None:
    app = Milter("test")
    events = observer(app, "connect", "helo")
    peer = serve(app)
    client = peer.greeted()
    client.quit()
    client.wait_for_close()
    peer.forget(client)
    peer.server.stop()
    assert events == CLIENT


def test_a_client_that_vanishes_in_the_middle_of_a_batch_loses_nothing_that_libmilter_read(serve: Serve) -> None:
    app = Milter("test")
    events = observer(app, *OBSERVED, "abort")
    peer = serve(app)
    client = peer.greeted()
    begin_message(client)
    client.header("Subject", "test")
    client.eoh()
    client.body(b"text\r\n")
    client.close()
    peer.server.stop()
    whole = [*CLIENT, *MESSAGE]
    read = [event for event in events if event != ("abort",)]  # libmilter may see the end before the last commands
    assert read == whole[: len(read)]
    assert events == (read if len(read) <= len(CLIENT) else [*read, ("abort",)])


@pytest.mark.parametrize("sizes", [(1, 2, 3), (65535, 1), (1, 65535), (30000, 30000, 30000), (65535,) * 3])
def test_pieces_of_the_body_come_as_they_were_sent(serve: Serve, sizes: tuple[int, ...]) -> None:
    app = Milter("test")
    chunks: list[bytes] = []

    @app.on_body
    def body(ctx: Context, chunk: bytes) -> None:
        chunks.append(chunk)

    sent = [bytes([number]) * size for number, size in enumerate(sizes)]
    client = serve(app).greeted()
    begin_message(client)
    client.eoh()
    for chunk in sent:
        client.body(chunk)
    client.end_of_message()
    assert chunks == sent


def test_a_batch_does_not_grow_beyond_64_kib(serve: Serve) -> None:
    app = Milter("test")
    batches: list[tuple[object, str]] = []

    @app.on_header
    def header(ctx: Context, name: str, value: str) -> None:
        batches.append((ctx._call, value[0]))

    client = serve(app).greeted()
    begin_message(client)
    for number in range(9):
        client.header("Subject", str(number) * 10_000)
    client.end_of_message()
    assert [value for _, value in batches] == list("012345678")
    assert [call for call, _ in batches] == [batches[0][0]] * 7 + [batches[8][0]] * 2


@pytest.mark.parametrize(
    ("stage", "replies_at"), [(stage, at) for stage in OBSERVED for at in ("body", "eom") if stage != at]
)
def test_a_failure_is_answered_at_the_next_stage_that_replies(
    serve: Serve, stage: str, replies_at: str, caplog: pytest.LogCaptureFixture
) -> None:
    app = Milter("test")
    events: Events = []

    def fail(*arguments: Any) -> None:
        raise RuntimeError("broken observer")

    getattr(app, f"on_{stage}")(fail)
    replier(app, replies_at, events)
    client = serve(app).greeted()
    begin_message(client)
    client.header("Subject", "test")
    client.eoh()
    answer = client.body(b"text\r\n")
    if replies_at == "eom":
        answer = client.end_of_message().answer
    assert answer is not None
    assert answer.verdict is Verdict.TEMPFAIL
    assert events == []
    assert "broken observer" in caplog.text


def test_a_failure_does_not_reach_the_next_message(serve: Serve) -> None:
    app = Milter("test")

    @app.on_header
    def header(ctx: Context, name: str, value: str) -> None:
        if value == "bad":
            raise RuntimeError("broken observer")

    client = serve(app).greeted()
    verdicts = []
    for value in ("good", "bad", "good"):
        begin_message(client)
        client.header("Subject", value)
        client.eoh()
        verdicts.append(client.end_of_message().answer.verdict)
    assert verdicts == [Verdict.CONTINUE, Verdict.TEMPFAIL, Verdict.CONTINUE]


def test_an_unknown_command_that_is_observed_outside_a_message_is_not_lost(serve: Serve) -> None:
    app = Milter("test")
    events = observer(app, "unknown", "mail")
    peer = serve(app)
    client = peer.greeted()
    client.unknown("FOO bar")
    client.quit()
    client.wait_for_close()
    peer.forget(client)
    peer.server.stop()
    assert events == [("unknown", "FOO bar")]


def test_a_connection_that_python_holds_nothing_of_costs_no_call_at_its_end(serve: Serve) -> None:
    app = Milter("test")
    replier(app, "eom", [])
    peer = serve(app)
    engine = peer.server.engine
    for _ in range(10):
        client = peer.greeted()
        begin_message(client)
        send_content(client)
        client.quit()
        client.wait_for_close()
        peer.forget(client)
    client = peer.greeted()
    begin_message(client)
    send_content(client)
    assert engine.connections <= 2  # this one, and the last, if its end came after this message's entry
