# SPDX-License-Identifier: GPL-3.0-or-later
"""The access log: one line for each message, whatever becomes of it, and nobody can forge one."""

import logging
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from hypothesis import given
from hypothesis import strategies as st

from milter import ActionError, Actions, Address, Context, EomContext, Message, Milter, Reply, Status, access
from milter.ledger import open_books
from milter.testing import Client, ClientAddress, Verdict
from tests.conftest import Peer, Serve, begin_message, send_content, send_message

Records: TypeAlias = Callable[[], list[dict[str, Any]]]

NO = Reply(550, "5.7.1", "not for you")
CLIENT = {"client": "client.example", "address": "192.0.2.1", "port": 0}
ENVELOPE = {"sender": "ann@client.example", "recipients": ["bob@mta.example"]}
NO_REPLY = {"code": None, "enhanced": None, "text": None}
OF_NO = {"code": 550, "enhanced": "5.7.1", "text": "not for you"}


@pytest.fixture
def records(caplog: pytest.LogCaptureFixture) -> Records:
    """The records of the access log until now."""
    return lambda: [vars(record)["milter"] for record in caplog.records if record.name == "milter.access"]


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    return lambda: [record.getMessage() for record in caplog.records if record.name == "milter.access"]


def ended(peer: Peer, client: Client) -> None:
    """The connection ends, and libmilter has said so to the filter."""
    client.quit()
    client.wait_for_close()
    peer.forget(client)


def answering(stage: str, verdict: Status | Reply) -> Milter[Any, Any]:
    """A filter with one handler."""
    app = Milter("test")

    def answer(ctx: Any, *arguments: Any) -> Status | Reply:
        return verdict

    getattr(app, f"on_{stage}")(answer)
    return app


# ---- A line for each message -----------------------------------------------------------------


def test_an_accepted_message_has_a_line_with_all_that_is_known(
    serve: Serve, records: Records, lines: Callable[[], list[str]]
) -> None:
    app = answering("message", Status.CONTINUE)
    client = serve(app, access_log=True).greeted()
    client.macros(b"M", {"i": "4bXq"})
    send_message(client)
    (record,) = records()
    handlers, total = record.pop("handlers_ms"), record.pop("total_ms")
    assert record == {
        "queue_id": "4bXq",
        **CLIENT,
        **ENVELOPE,
        "refused": [],
        "verdict": "accept",
        "stage": "eom",
        **NO_REPLY,
        "failed": [],
        "actions": {},
        "size": len("Subject:test\r\n\r\ntext\r\n"),
        "connection": record["connection"],
    }
    assert lines() == [
        "queue_id=4bXq client=client.example address=192.0.2.1 port=0 sender=ann@client.example "
        "recipients=bob@mta.example refused=- verdict=accept stage=eom code=- enhanced=- text=- failed=- actions=- "
        f"size=22 handlers_ms={handlers} total_ms={total} connection={record['connection']}"
    ]


def test_a_message_of_which_no_handler_hears_has_a_line_too(serve: Serve, records: Records) -> None:
    client = serve(Milter("test"), access_log=True).greeted()
    send_message(client)
    (record,) = records()
    assert (record["verdict"], record["size"], record["handlers_ms"]) == ("accept", None, 0.0)
    assert {name: record[name] for name in ENVELOPE} == ENVELOPE


def test_without_the_option_nothing_is_written(serve: Serve, records: Records) -> None:
    send_message(serve(answering("message", Status.CONTINUE)).greeted())
    assert records() == []
    assert open_books(False, None) is None


def test_the_actions_that_were_sent_are_counted(serve: Serve, records: Records) -> None:
    app = Milter("test")

    @app.on_eom
    def change(ctx: EomContext) -> None:
        ctx.add_header("X-One", "1")
        ctx.insert_header(0, "X-Two", "2")
        ctx.replace_header("Subject", 1, "other")
        ctx.replace_sender("eve@client.example")
        ctx.remove_recipient("bob@mta.example")
        ctx.quarantine("strange")
        ctx.replace_body([b"one\r\n", b"two\r\n"])

    @app.on_message
    def edit(ctx: EomContext, message: Message) -> None:
        message.headers["X-Three"] = "3"
        message.headers["X-Four"] = "4"
        message.recipients.add("carl@mta.example")

    result = send_message(serve(app, access_log=True).greeted())
    (record,) = records()
    assert record["actions"] == {
        "add_header": 3,
        "insert_header": 1,
        "replace_header": 1,
        "replace_sender": 1,
        "remove_recipient": 1,
        "quarantine": 1,
        "replace_body": 1,
        "add_recipient": 1,
    }
    assert len(result.changes) == 11  # two of them parts of the body
    assert record["sender"] == "ann@client.example"


def test_an_action_that_was_not_sent_is_not_counted(serve: Serve, records: Records) -> None:
    app = Milter("test")

    @app.on_message
    def edit(ctx: EomContext, message: Message) -> Status:
        message.headers["X-Never"] = "sent"
        with pytest.raises(ValueError, match="header"):
            ctx.add_header("no name", "")
        with pytest.raises(ActionError, match="did not grant"):
            ctx.quarantine("strange")
        return Status.REJECT

    send_message(serve(app, access_log=True).greeted(actions=Actions.ADD_HEADER))
    assert [(record["verdict"], record["actions"]) for record in records()] == [("reject", {})]


@pytest.mark.parametrize("stage", ["mail", "data", "header", "eoh", "body", "eom", "message"])
@pytest.mark.parametrize("verdict", [NO, Status.REJECT, Status.TEMPFAIL, Status.DISCARD, Status.ACCEPT])
def test_the_line_says_where_a_message_was_decided_and_how(
    serve: Serve, records: Records, stage: str, verdict: Status | Reply
) -> None:
    client = serve(answering(stage, verdict), access_log=True).greeted()
    client.mail("<ann@client.example>")
    if stage != "mail":
        client.rcpt("<bob@mta.example>")
        client.data()
        send_to(client, "eoh" if stage == "header" else stage)
    client.abort()  # as Postfix does after each verdict
    client.mail("<next@client.example>")
    record, *rest = records()
    assert record["verdict"] == ("reject" if verdict is NO else verdict.name.lower())  # type: ignore[union-attr]
    assert record["stage"] == {"message": "eom", "header": "eoh"}.get(stage, stage)
    assert {name: record[name] for name in NO_REPLY} == (OF_NO if verdict is NO else NO_REPLY)
    assert record["sender"] == "ann@client.example"
    assert record["recipients"] == ([] if stage == "mail" else ["bob@mta.example"])
    assert [other["sender"] for other in rest] == (["next@client.example"] if stage == "mail" else [])


def send_to(client: Client, stage: str) -> None:
    """The content, up to this stage."""
    steps: list[tuple[str, Callable[[], object]]] = [
        ("data", lambda: None),
        ("header", lambda: client.header("Subject", "test")),
        ("eoh", client.eoh),
        ("body", lambda: client.body(b"text\r\n")),
        ("eom", client.end_of_message),
    ]
    for name, step in steps:
        step()
        if name == stage:
            return


@pytest.mark.parametrize("verdict", [Status.ACCEPT, Status.DISCARD])
def test_a_recipient_can_decide_the_message(serve: Serve, records: Records, verdict: Status) -> None:
    client = serve(answering("rcpt", verdict), access_log=True).greeted()
    client.mail("<ann@client.example>")
    client.rcpt("<bob@mta.example>")
    client.abort()
    (record,) = records()
    assert (record["verdict"], record["stage"]) == (verdict.name.lower(), "rcpt")
    assert {name: record[name] for name in ENVELOPE} == ENVELOPE


def test_refused_recipients_stand_in_the_line_of_their_message_with_their_answers(
    serve: Serve, records: Records, lines: Callable[[], list[str]]
) -> None:
    app = Milter("test")
    answers: dict[str, Status | Reply] = {
        "carl@mta.example": NO,
        "dora@mta.example": Status.TEMPFAIL,
        "erna@mta.example": Status.REJECT,
    }

    @app.on_rcpt
    def refuse(ctx: Context, recipient: str, params: object) -> Status | Reply:
        return answers.get(recipient, Status.CONTINUE)

    client = serve(app, access_log=True).greeted()
    client.mail("<ann@client.example>")
    for name in ("bob", "carl", "dora", "erna", "fred"):
        client.rcpt(f"<{name}@mta.example>")
    client.data()
    send_content(client)
    (record,) = records()
    assert record["recipients"] == ["bob@mta.example", "fred@mta.example"]
    assert record["refused"] == [
        {"recipient": "carl@mta.example", "verdict": "reject", **OF_NO},
        {"recipient": "dora@mta.example", "verdict": "tempfail", **NO_REPLY},
        {"recipient": "erna@mta.example", "verdict": "reject", **NO_REPLY},
    ]
    assert (record["verdict"], record["code"]) == ("accept", None)
    assert (
        ' refused=carl@mta.example="550 5.7.1 not for you",dora@mta.example=tempfail,erna@mta.example=reject '
        in lines()[0]
    )


@pytest.mark.parametrize(("accepted", "refused"), [(0, 3), (100, 100), (101, 0), (150, 230)])
def test_a_line_lists_a_hundred_recipients_and_tells_how_many_more_there_are(
    serve: Serve, records: Records, lines: Callable[[], list[str]], accepted: int, refused: int
) -> None:
    app = Milter("test")

    @app.on_rcpt
    def refuse(ctx: Context, recipient: Address, params: object) -> Status | Reply:
        return NO if recipient.local.startswith("no") else Status.CONTINUE

    peer = serve(app, access_log=True)
    client = peer.greeted()
    client.mail("<ann@client.example>")
    expected: dict[str, list[str]] = {}
    for prefix, count in (("yes", accepted), ("no", refused)):
        expected[prefix] = [f"{prefix}{number}@mta.example" for number in range(count)]
        for name in expected[prefix]:
            client.rcpt(f"<{name}>")
    ended(peer, client)
    (record,), (line,) = records(), lines()
    assert record["recipients"] == expected["yes"][:100]
    assert [entry["recipient"] for entry in record["refused"]] == expected["no"][:100]
    more = {"more_recipients": accepted - 100, "more_refused": refused - 100}
    for key, count in more.items():
        assert record.get(key, 0) == max(count, 0)
        assert (f" {key}={count} " in line) == (count > 0)
    assert (record["verdict"], record["stage"]) == (("abort", "abort") if accepted else ("reject", "rcpt"))


def test_handlers_that_raise_again_and_again_are_named_once(serve: Serve, records: Records) -> None:
    app = Milter("test")

    @app.on_rcpt
    def fail(ctx: Context, recipient: Address, params: object) -> Status:
        raise RuntimeError

    peer = serve(app, access_log=True)
    client = peer.greeted()
    client.mail("<ann@client.example>")
    for _ in range(3):
        client.rcpt("<bob@mta.example>")
    ended(peer, client)
    (record,) = records()
    assert record["failed"] == [fail.__qualname__]


LATER = Reply(450, "4.7.1", "later")
OF_LATER = {"code": 450, "enhanced": "4.7.1", "text": "later"}
RAISES, ACCEPTS, DISCARDS = "raises", Status.ACCEPT, Status.DISCARD
PASSES = Status.CONTINUE

# The filter's answers to the recipients of a message, and what its line says when the client then has nothing to send.
RECIPIENTS: list[tuple[list[Any], dict[str, Any]]] = [
    ([NO], {"verdict": "reject", "stage": "rcpt", **OF_NO}),
    ([LATER], {"verdict": "tempfail", "stage": "rcpt", **OF_LATER}),
    ([Status.REJECT], {"verdict": "reject", "stage": "rcpt", **NO_REPLY}),
    ([Status.TEMPFAIL], {"verdict": "tempfail", "stage": "rcpt", **NO_REPLY}),
    ([RAISES], {"verdict": "tempfail", "stage": "rcpt", **NO_REPLY}),
    ([NO, Status.REJECT], {"verdict": "reject", "stage": "rcpt", **NO_REPLY}),
    ([Status.REJECT, NO], {"verdict": "reject", "stage": "rcpt", **OF_NO}),
    ([NO, LATER, NO], {"verdict": "tempfail", "stage": "rcpt", **OF_LATER}),
    ([LATER, Status.TEMPFAIL, NO], {"verdict": "tempfail", "stage": "rcpt", **NO_REPLY}),
    ([PASSES], {"verdict": "abort", "stage": "abort", **NO_REPLY}),
    ([], {"verdict": "abort", "stage": "abort", **NO_REPLY}),
    ([NO, PASSES], {"verdict": "abort", "stage": "abort", **NO_REPLY}),
    ([PASSES, NO], {"verdict": "abort", "stage": "abort", **NO_REPLY}),
    ([NO, ACCEPTS], {"verdict": "accept", "stage": "rcpt", **NO_REPLY}),
    ([NO, DISCARDS], {"verdict": "discard", "stage": "rcpt", **NO_REPLY}),
]

# What MTAs send when a client gives up, or comes to its next message.
STEPS: dict[str, Callable[[Client], object]] = {
    "abort": Client.abort,
    "quit": Client.quit,
    "hang-up": Client.close,
    "helo": Client.helo,
    "mail": lambda client: client.mail("<next@client.example>"),
    "unknown": lambda client: client.unknown("FOO"),
}
GIVING_UP = [
    *["abort", "abort abort", "abort quit", "quit", "hang-up", "helo"],
    *["abort helo", "mail", "abort mail", "unknown mail"],
]


@pytest.mark.parametrize("giving_up", GIVING_UP)
@pytest.mark.parametrize(("answers", "expected"), RECIPIENTS, ids=lambda value: str(value)[:60])
def test_a_message_all_of_whose_recipients_were_refused_is_refused(
    serve: Serve, records: Records, answers: list[Any], expected: dict[str, Any], giving_up: str
) -> None:
    app = Milter("test")
    app.on_unknown(lambda ctx, command: Status.CONTINUE)

    @app.on_rcpt
    def answer(ctx: Context, recipient: str, params: object) -> Status | Reply:
        verdict = answers[int(recipient.partition("@")[0])]
        if verdict is RAISES:
            raise RuntimeError("no list")
        return verdict  # type: ignore[no-any-return]

    app.on_unknown(lambda ctx, command: Status.CONTINUE)
    peer = serve(app, access_log=True, metrics="0")
    client = peer.greeted()
    client.mail("<ann@client.example>")
    names = [f"{number}@mta.example" for number in range(len(answers))]
    for name in names:
        client.rcpt(f"<{name}>")
    client.unknown("PING")  # whose answer shows that MAIL was read: libmilter may miss what comes before a hang-up
    for step in giving_up.split():
        STEPS[step](client)
    if "mail" in giving_up:
        client.unknown("PING")
    if "quit" in giving_up:
        client.wait_for_close()
    peer.hang_up()
    peer.server.stop()  # waits for the session
    record = records()[0]
    assert {name: record[name] for name in expected} == expected
    refused = [name for name, answer in zip(names, answers, strict=True) if answer not in (PASSES, ACCEPTS, DISCARDS)]
    assert [entry["recipient"] for entry in record["refused"]] == refused
    assert record["recipients"] == [name for name in names if name not in refused]
    assert [other["sender"] for other in records()[1:]] == (["next@client.example"] if "mail" in giving_up else [])


@pytest.mark.parametrize("giving_up", GIVING_UP)
@pytest.mark.parametrize("stage", ["mail", "data", "header", "eoh", "body", "eom"])
def test_a_refused_message_has_one_line_whatever_the_mta_sends_next(
    serve: Serve, records: Records, stage: str, giving_up: str
) -> None:
    app = Milter("test")
    for each in ("mail", "data", "header", "eoh", "body", "eom", "unknown"):

        def judge(ctx: Any, *arguments: Any, refuses: bool = each == stage) -> Status | Reply:
            return NO if refuses and ctx.sender == "ann@client.example" else Status.CONTINUE

        getattr(app, f"on_{each}")(judge)
    peer = serve(app, access_log=True)
    client = peer.greeted()
    client.mail("<ann@client.example>")
    if stage != "mail":
        client.rcpt("<bob@mta.example>")
        client.data()
        send_to(client, "eoh" if stage == "header" else stage)
    for step in giving_up.split():
        STEPS[step](client)
    if "quit" in giving_up:
        client.wait_for_close()
    peer.hang_up()
    peer.server.stop()  # waits for the session
    answered_at = "eoh" if stage == "header" else stage
    expected: list[tuple[str, str, str, int | None]] = [("ann@client.example", "reject", answered_at, 550)]
    expected += [("next@client.example", "abort", "abort", None)] if "mail" in giving_up else []
    assert [(r["sender"], r["verdict"], r["stage"], r["code"]) for r in records()] == expected


def test_a_handler_that_raises_is_named(serve: Serve, records: Records) -> None:
    app = Milter("test")

    @app.on_message
    def scan(ctx: EomContext, message: Message) -> None:
        raise RuntimeError("no scanner")

    result = send_message(serve(app, access_log=True).greeted())
    assert result.answer.verdict is Verdict.TEMPFAIL
    (record,) = records()
    assert (record["verdict"], record["stage"], record["failed"]) == ("tempfail", "eom", [scan.__qualname__])


def test_an_observer_that_raised_is_named_where_its_message_is_refused(serve: Serve, records: Records) -> None:
    app = Milter("test")

    @app.on_header
    def watch(ctx: Context, name: str, value: str) -> None:
        raise RuntimeError("no eyes")

    send_message(serve(app, access_log=True).greeted())
    (record,) = records()
    assert (record["verdict"], record["stage"], record["failed"]) == ("tempfail", "eom", [watch.__qualname__])


def test_an_observer_of_the_connection_that_raised_is_named_by_each_message(serve: Serve, records: Records) -> None:
    app = Milter("test")

    @app.on_connect
    def watch(ctx: Context, hostname: str, address: object) -> None:
        raise RuntimeError("no eyes")

    client = serve(app, access_log=True).greeted()
    for _ in range(2):
        send_message(client)
    assert [(record["verdict"], record["failed"]) for record in records()] == [("tempfail", [watch.__qualname__])] * 2


@pytest.mark.parametrize("stages", [[], ["eom"], ["mail"], ["header"]])
def test_a_message_that_is_given_up_has_a_line(serve: Serve, records: Records, stages: list[str]) -> None:
    app = Milter("test")
    for stage in stages:
        getattr(app, f"on_{stage}")(lambda ctx, *arguments: None)
    peer = serve(app, access_log=True)
    client = peer.greeted()
    begin_message(client)
    client.header("Subject", "test")
    client.abort()
    client.abort()
    begin_message(client, "<carl@mta.example>")
    client.helo()
    begin_message(client, "<dora@mta.example>")
    ended(peer, client)
    assert [(record["verdict"], record["stage"], record["recipients"]) for record in records()] == [
        ("abort", "abort", ["bob@mta.example"]),
        ("abort", "abort", ["carl@mta.example"]),
        ("abort", "abort", ["dora@mta.example"]),
    ]


def test_each_message_of_a_connection_has_a_line_of_its_own(serve: Serve, records: Records) -> None:
    app = Milter("test")

    @app.on_rcpt
    def refuse(ctx: Context, recipient: str, params: object) -> Status | Reply:
        return NO if recipient == "eve@mta.example" else Status.CONTINUE

    @app.on_eom
    def mark(ctx: EomContext) -> None:
        if ctx.sender == "first@client.example":
            ctx.add_header("X-First", "yes")

    client = serve(app, access_log=True).greeted()
    for sender in ("first", "second", "third"):
        client.mail(f"<{sender}@client.example>")
        client.rcpt("<bob@mta.example>")
        if sender == "first":
            client.rcpt("<eve@mta.example>")
        client.data()
        send_content(client)
    assert [(r["sender"], r["recipients"], len(r["refused"]), r["actions"]) for r in records()] == [
        ("first@client.example", ["bob@mta.example"], 1, {"add_header": 1}),
        ("second@client.example", ["bob@mta.example"], 0, {}),
        ("third@client.example", ["bob@mta.example"], 0, {}),
    ]


def test_events_that_observers_get_later_all_together_make_the_same_line(serve: Serve, records: Records) -> None:
    app = Milter("test")
    seen: list[str] = []
    for stage in ("connect", "mail", "data", "header", "eoh", "body"):

        def observe(ctx: Context, *arguments: object, stage: str = stage) -> None:
            seen.append(stage)

        getattr(app, f"on_{stage}")(observe)
    client = serve(app, access_log=True).greeted()
    for _ in range(2):
        send_message(client)
    assert seen == ["connect", *["mail", "data", "header", "eoh", "body"] * 2]
    assert [{name: record[name] for name in ("verdict", "size", *ENVELOPE)} for record in records()] == [
        {"verdict": "accept", "size": 23, **ENVELOPE}
    ] * 2


# ---- Connections -----------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["connect", "helo"])
@pytest.mark.parametrize("verdict", [NO, Status.REJECT, Status.TEMPFAIL])
def test_a_refused_connection_has_a_line(serve: Serve, records: Records, stage: str, verdict: Status | Reply) -> None:
    peer = serve(answering(stage, verdict), access_log=True)
    client = peer.client()
    client.negotiate()
    client.connect_info()
    if stage == "helo":
        client.helo()
    (record,) = records()
    assert {name: record[name] for name in CLIENT} == CLIENT
    assert (record["sender"], record["stage"], record["total_ms"]) == (None, stage, None)
    assert record["verdict"] == ("tempfail" if verdict is Status.TEMPFAIL else "reject")
    assert {name: record[name] for name in NO_REPLY} == (OF_NO if verdict is NO else NO_REPLY)


def test_a_connection_that_is_refused_since_a_handler_raised_names_it(serve: Serve, records: Records) -> None:
    app = Milter("test")

    @app.on_helo
    def greet(ctx: Context, name: str) -> Status:
        raise RuntimeError("no manners")

    serve(app, access_log=True).greeted()
    assert [(record["verdict"], record["failed"]) for record in records()] == [("tempfail", [greet.__qualname__])]


def test_a_connection_that_goes_on_has_no_line(serve: Serve, records: Records) -> None:
    peer = serve(answering("connect", Status.CONTINUE), access_log=True)
    ended(peer, peer.greeted())
    assert records() == []


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        (ClientAddress.of("2001:db8::5", 25), {"address": "2001:db8::5", "port": 25}),
        (ClientAddress.of("/run/mta.sock"), {"address": "unix:/run/mta.sock", "port": None}),
        (None, {"address": None, "port": None}),
    ],
)
def test_the_client_may_have_any_kind_of_address(
    serve: Serve, records: Records, address: ClientAddress | None, shown: dict[str, object]
) -> None:
    client = serve(Milter("test"), access_log=True).client()
    client.negotiate()
    client.connect_info("client.example", address)
    client.helo()
    send_message(client)
    (record,) = records()
    assert {name: record[name] for name in shown} == shown


# ---- Size and time ---------------------------------------------------------------------------


@pytest.mark.parametrize("leading_space", [False, True])
def test_the_size_is_that_of_the_message_when_all_of_it_was_shown(
    serve: Serve, records: Records, leading_space: bool
) -> None:
    app = Milter("test", leading_space=leading_space)
    app.on_header(lambda ctx, name, value: None)
    app.on_body(lambda ctx, chunk: None)
    client = serve(app, access_log=True).greeted()
    begin_message(client)
    client.header("Subject", " " * leading_space + "gr\udcfc\u00dfe\n\tfolded")
    client.eoh()
    client.body(b"one\r\n")
    client.body(b"two\r\n")
    client.end_of_message()
    (record,) = records()
    assert record["size"] == len(b"Subject: gr\xfc\xc3\x9fe\r\n\tfolded\r\n\r\none\r\ntwo\r\n")


def test_without_the_header_the_size_is_that_of_the_body(serve: Serve, records: Records) -> None:
    client = serve(answering("body", Status.CONTINUE), access_log=True).greeted()
    send_message(client)
    begin_message(client)
    send_content(client, body=b"")
    assert [record["size"] for record in records()] == [len(b"text\r\n"), 0]


def test_a_body_of_which_a_part_was_skipped_has_no_size(serve: Serve, records: Records) -> None:
    client = serve(answering("body", Status.SKIP), access_log=True).greeted()
    send_message(client)
    assert [(record["verdict"], record["size"]) for record in records()] == [("accept", None)]


def test_a_large_message_has_a_size_though_no_handler_has_read_it(serve: Serve, records: Records) -> None:
    app = Milter("test", spool_size=100)
    app.on_message(lambda ctx, message: None)
    client = serve(app, access_log=True).greeted()
    begin_message(client)
    send_content(client, body=b"x" * 60_000)
    assert [record["size"] for record in records()] == [len(b"Subject:test\r\n\r\n") + 60_000]


def test_the_time_counts_from_mail_on_and_that_of_handlers_within_it(serve: Serve, records: Records) -> None:
    app = Milter("test")
    noted: dict[str, float] = {}

    def now() -> float:
        return time.clock_gettime(time.CLOCK_MONOTONIC) * 1000

    @app.on_mail
    def mail(ctx: Context, sender: str, params: object) -> Status:
        noted["mail"] = now()
        return Status.CONTINUE

    @app.on_eom
    def end(ctx: EomContext) -> Status:
        noted["end"] = now()
        while now() < noted["end"] + 1:  # so that something is to be seen
            pass
        noted["return"] = now()
        return Status.CONTINUE

    client = serve(app, access_log=True).greeted()
    before = now()
    send_message(client)
    after = now()
    (record,) = records()
    rounding = 0.001
    assert noted["return"] - noted["mail"] - rounding <= record["total_ms"] <= after - before + rounding
    assert noted["return"] - noted["end"] - rounding <= record["handlers_ms"] <= record["total_ms"]


# ---- What goes wrong -------------------------------------------------------------------------


def test_a_log_that_fails_fails_no_message(
    serve: Serve, records: Records, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(fields: object) -> str:
        raise RuntimeError("no ink")

    monkeypatch.setattr(access, "line", fail)
    result = send_message(serve(answering("eom", Status.CONTINUE), access_log=True).greeted())
    assert result.answer.verdict is Verdict.CONTINUE
    assert "the access log failed" in caplog.text
    assert "no ink" in caplog.text


@pytest.mark.parametrize("stage", ["mail", "data", "eom"])
def test_a_message_that_failed_in_the_library_itself_is_no_accepted_one(
    serve: Serve, records: Records, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    peer = serve(answering(stage, Status.CONTINUE), access_log=True)
    client = peer.greeted()
    send_message(client)  # so that the engine has heard of client and HELO

    def crash(*arguments: object) -> Status:
        monkeypatch.undo()
        raise MemoryError

    monkeypatch.setattr(peer.server.engine, "_run", crash)
    client.mail("<ann@client.example>")
    if stage != "mail":
        client.rcpt("<bob@mta.example>")
        client.data()
    if stage == "eom":
        send_content(client)
    client.abort()
    send_message(client)
    assert [record["verdict"] for record in records()] == ["accept", "tempfail", "accept"]


def test_an_observer_that_failed_in_the_library_itself_fails_its_message_in_the_log_too(
    serve: Serve, records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = Milter("test")
    app.on_rcpt(_observe_recipient)
    peer = serve(app, access_log=True)
    client = peer.greeted()

    def crash(*arguments: object) -> Status:
        monkeypatch.undo()
        raise MemoryError

    send_message(client)
    monkeypatch.setattr(peer.server.engine, "_run", crash)
    assert send_message(client).answer.verdict is Verdict.TEMPFAIL
    assert [record["verdict"] for record in records()] == ["accept", "tempfail"]


def _observe_recipient(ctx: Context, recipient: str, params: object) -> None:
    pass


def test_a_message_that_is_under_way_when_the_filter_stops_has_a_line(tmp_path: Path, records: Records) -> None:
    with answering("mail", Status.CONTINUE).start(f"unix:{tmp_path}/filter.sock", access_log=True, grace=0.0) as server:
        client = Peer(server).greeted()
        begin_message(client)
    client.close()
    assert [(record["verdict"], record["stage"]) for record in records()] == [("tempfail", None)]


# ---- Strangers -------------------------------------------------------------------------------


HOSTILE = '<x"\\ y=1\n\r\tINFO\x1b[2J\x7f\u00e9\u2028\udcff>'


def test_nobody_can_forge_a_line(serve: Serve, records: Records, lines: Callable[[], list[str]]) -> None:
    client = serve(Milter("test"), access_log=True).client()
    client.negotiate()
    client.connect_info("a b\nverdict=accept")
    client.helo()
    client.macros(b"M", {"i": "1 verdict=reject"})
    client.mail(HOSTILE)
    client.rcpt("<a,b@mta.example>")
    client.rcpt("<->")
    client.data()
    client.end_of_message()
    (record,), (line,) = records(), lines()
    assert record["sender"] == Address(HOSTILE)
    assert re.fullmatch(r"[ -~]*", line)
    assert r"INFO\x1b[2J\x7f\u00e9\u2028\xff" in line
    assert parsed(line) == {
        **{name: [str(value)] for name, value in record.items() if isinstance(value, int | float)},
        "queue_id": ["1 verdict=reject"],
        "client": ["a b\nverdict=accept"],
        "address": ["192.0.2.1"],
        "sender": [str(Address(HOSTILE))],
        "recipients": ['"a,b"@mta.example', "-"],
        "verdict": ["accept"],
        "stage": ["eom"],
        **dict.fromkeys(("refused", "code", "enhanced", "text", "failed", "actions", "size")),
    }


_BYTES = st.characters(min_codepoint=0xDC80, max_codepoint=0xDCFF, categories=["Cs"])
_TEXTS = st.text(st.characters() | _BYTES)
_KEYS = st.from_regex(r"[a-z_]+", fullmatch=True).filter(lambda key: key != "refused")


@given(st.dictionaries(_KEYS, st.none() | _TEXTS | st.lists(_TEXTS, min_size=1)))
def test_a_line_can_be_read_back(fields: dict[str, Any]) -> None:
    line = access.line(fields)
    assert re.fullmatch(r"[ -~]*", line)
    assert parsed(line) == {name: [value] if isinstance(value, str) else value for name, value in fields.items()}


_ITEM = re.compile(r'(?:"((?:[^"\\]|\\.)*)"|([^ ,"]+))')


def parsed(line: str) -> dict[str, list[str] | None]:
    """The values of a line: a scalar is a list of one."""
    values: dict[str, list[str] | None] = {}
    position = 0
    while position < len(line):
        key, _, _ = line[position:].partition("=")
        position += len(key) + 1
        items: list[str | None] = []
        while True:
            match = _ITEM.match(line, position)
            assert match is not None, line[position:]
            items.append(None if match[2] == "-" else match[2] if match[2] is not None else unescaped(match[1]))
            position = match.end()
            if line[position : position + 1] != ",":
                break
            position += 1
        values[key] = None if items == [None] else [str(item) for item in items]
        assert line[position : position + 1] in (" ", ""), line[position:]
        position += 1
    return values


def unescaped(text: str) -> str:
    simple = {"n": "\n", "r": "\r", "t": "\t"}

    def character(match: re.Match[str]) -> str:
        code = match[1]
        if code[0] in "uU":
            return chr(int(code[1:], 16))
        if code[0] == "x":
            number = int(code[1:], 16)
            return chr(number if number < 0x80 else 0xDC00 + number)
        return simple.get(code, code)

    return re.sub(r"\\(x..|u....|U........|.)", character, text)


def test_the_line_is_written_whatever_other_levels_are_shown(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("milter.access").setLevel(logging.NOTSET)
    caplog.set_level(logging.WARNING)
    caplog.handler.setLevel(logging.NOTSET)
    send_message(serve(Milter("test"), access_log=True).greeted())
    assert [record.name for record in caplog.records] == ["milter.access"]


def test_no_line_is_made_where_nobody_wants_one(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("WARNING", "milter.access")
    send_message(serve(Milter("test"), access_log=True).greeted())
    assert [record for record in caplog.records if record.name == "milter.access"] == []
