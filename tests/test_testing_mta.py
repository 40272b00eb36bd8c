# SPDX-License-Identifier: GPL-3.0-or-later
"""The simple form of a test, `milter.testing.MTA`: filters in this process, on the real libmilter, and elsewhere."""

import asyncio
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from email.message import EmailMessage
from pathlib import Path
from typing import Any, cast

import pytest

from milter import (
    Actions,
    Address,
    Context,
    EomContext,
    HandlerError,
    Milter,
    NegotiateContext,
    Params,
    Reply,
    SocketError,
    Status,
)
from milter import Message as Received
from milter.binding import WantedRun
from milter.libmilter import libmilter
from milter.testing import (
    MTA,
    AddHeader,
    AddRecipient,
    ClientAddress,
    Command,
    EndOfMessage,
    Envelope,
    Family,
    Mail,
    Mailbox,
    Message,
    Negotiated,
    NotDeliveredError,
    Outcome,
    Packet,
    PeerClosed,
    PeerTimeout,
    Postfix,
    ReplaceBody,
    ReplaceSender,
    Response,
    Result,
    Sendmail,
    Steps,
    Transcript,
    Verdict,
    WireError,
)
from milter.testing import Answer as WireAnswer
from milter.testing.rehearsal import Rehearsal, _WantingClient
from milter.testing.wire import Actions as WireActions
from tests.conftest import Serve

MESSAGE = b"Subject: test\nTo: bob@mta.example\n\ntext\n"
STAGES = ("connect", "helo", "mail", "rcpt", "data", "header", "eoh", "body", "eom")


def answering(stage: str, answer: Status | Reply) -> Milter[Any, Any]:
    """A filter that gives this answer at this stage."""
    app = Milter("answering")
    arguments = {"connect": 2, "helo": 1, "mail": 2, "rcpt": 2, "header": 2, "body": 1}.get(stage, 0)
    handlers: list[Callable[..., Any]] = [
        lambda ctx: answer,
        lambda ctx, one: answer,
        lambda ctx, one, two: answer,
    ]
    getattr(app, f"on_{stage}")(handlers[arguments])
    return app


def raising(stage: str, error: BaseException, arguments: int = 0) -> Milter[Any, Any]:
    """A filter whose handler of this stage raises."""
    app = Milter("raising")

    def plain(ctx: Any) -> None:
        raise error

    def with_two(ctx: Any, one: Any, two: Any) -> None:
        raise error

    getattr(app, f"on_{stage}")([plain, plain, with_two][arguments])
    return app


def sent(app: Milter[Any, Any], like: Any = "postfix", **arguments: Any) -> Result:
    with MTA(app, like=like) as mta:
        return mta.send(**arguments)


# ---- the verdict, and what the client is told


@pytest.mark.parametrize("stage", STAGES)
def test_a_refusal_is_told_with_its_stage_and_its_text(stage: str) -> None:
    result = sent(answering(stage, Reply(550, "5.7.1", "we are 100% sure")))
    assert result.verdict is Status.REJECT
    assert (result.rejected, result.accepted, result.deferred, result.discarded) == (True, False, False, False)
    assert (result.code, result.reply) == (550, "550 5.7.1 we are 100% sure")
    answered_at = "eoh" if stage == "header" else stage
    assert repr(result) == (f"<Result: rejected at {answered_at}: 550 5.7.1 we are 100% sure>")
    assert result.stage == answered_at


@pytest.mark.parametrize(
    ("status", "flag", "postfix", "sendmail"),
    [
        (Status.REJECT, "rejected", "550 5.7.1 Command rejected", "554 5.7.1 Command rejected"),
        (
            Status.TEMPFAIL,
            "deferred",
            "451 4.7.1 Service unavailable - try again later",
            "451 4.3.2 Please try again later",
        ),
        (
            Status.ACCEPT,
            "accepted",
            "250 2.0.0 Ok: queued as 4Fz00001Qx1",
            "250 2.0.0 4Fz00001Qx1 Message accepted for delivery",
        ),
        (
            Status.DISCARD,
            "discarded",
            "250 2.0.0 Ok: queued as 4Fz00001Qx1",
            "250 2.0.0 4Fz00001Qx1 Message accepted for delivery",
        ),
    ],
)
def test_each_mta_words_a_bare_verdict_in_its_own_way(status: Status, flag: str, postfix: str, sendmail: str) -> None:
    for like, reply in (("postfix", postfix), (Postfix, postfix), ("sendmail", sendmail), (Sendmail, sendmail)):
        result = sent(answering("eom", status), like)
        assert result.verdict is status
        assert getattr(result, flag)
        assert result.reply == reply


def test_a_reply_of_several_lines_has_them_all() -> None:
    result = sent(answering("eom", Reply(554, "5.7.1", "no", "not today")))
    assert result.reply == "554-5.7.1 no\n554 5.7.1 not today"


def guard() -> Milter[Any, Any]:
    """Refuses each recipient that begins with no."""
    app = Milter("guard")

    @app.on_rcpt
    def on_rcpt(ctx: Context, recipient: str, params: object) -> Reply | None:
        return Reply(550, "5.7.1", f"{recipient} is not here") if recipient.startswith("no") else None

    return app


def test_a_refused_recipient_is_not_the_message() -> None:
    result = sent(guard(), recipients=["no1@mta.example", "bob@mta.example", "<no2@mta.example>"])
    assert result.accepted
    assert result.recipients == ["bob@mta.example"]
    assert result.refused == {
        "no1@mta.example": "550 5.7.1 no1@mta.example is not here",
        "no2@mta.example": "550 5.7.1 no2@mta.example is not here",
    }
    assert repr(result) == "<Result: accepted, 2 of 3 recipients refused: 250 2.0.0 Ok: queued as 4Fz00001Qx1>"


def test_the_reply_to_the_last_recipient_is_the_reply_if_nobody_is_left() -> None:
    result = sent(guard(), recipients=["no1@mta.example", "no2@mta.example"])
    assert (result.verdict, result.stage) == (Status.REJECT, "rcpt")
    assert result.reply == "550 5.7.1 no2@mta.example is not here"
    assert sent(guard(), Sendmail, recipients="no@mta.example").reply == (
        "550 5.7.1 <no@mta.example>... no@mta.example is not here"
    )


def test_a_message_is_deferred_if_one_of_its_recipients_is() -> None:
    app = Milter("mixed")

    @app.on_rcpt
    def on_rcpt(ctx: Context, recipient: str, params: object) -> Reply:
        return Reply(450, "4.7.1", "later") if recipient == "later@mta.example" else Reply(550, "5.7.1", "never")

    result = sent(app, recipients=["no1@mta.example", "later@mta.example", "no2@mta.example"])
    assert (result.verdict, result.reply) == (Status.TEMPFAIL, "450 4.7.1 later")


def test_what_the_mta_refuses_because_of_the_changes_is_deferred() -> None:
    interrupted = (ReplaceBody(b"a"), AddHeader("X-A", "a"), ReplaceBody(b"b"))
    transcript = Transcript(
        Envelope.of("ann@client.example", "bob@mta.example"),
        Message.parse(MESSAGE),
        Negotiated(6, WireActions(0), Steps(0), {}),
        recipients=[Mailbox("bob@mta.example")],
        end=EndOfMessage(interrupted, WireAnswer(Verdict.CONTINUE)),
        outcome=Outcome.ACCEPTED,
    )
    refused, taken = Result(transcript, Postfix(), (), None), Result(transcript, Sendmail(), (), None)
    assert (refused.verdict, refused.reply) == (
        Status.TEMPFAIL,
        "451 4.3.5 Server configuration problem - try again later",
    )
    assert (taken.verdict, taken.body) == (Status.ACCEPT, b"ab\r\n")


# ---- what is delivered


def editor() -> Milter[Any, Any]:
    app = Milter("editor")

    @app.on_message
    def edit(ctx: EomContext, message: Received) -> None:
        message.headers["X-Scanned"] = "clean"
        message.headers["subject"] = "changed"
        message.recipients.add("archive@mta.example")
        message.sender = "bounces@mta.example"
        message.body = message.body + b"footer\n"

    return app


@pytest.mark.parametrize("like", ["postfix", "sendmail"])
def test_the_message_is_there_as_it_is_delivered(like: str) -> None:
    result = sent(editor(), like, message=MESSAGE)
    assert result.accepted
    assert result.sender == "bounces@mta.example"
    assert result.recipients == ["bob@mta.example", "archive@mta.example"]
    assert result.body == b"text\r\nfooter\r\n"
    assert result.sent == b"Subject: test\r\nTo: bob@mta.example\r\n\r\ntext\r\n"
    assert result.message == (b"Subject: changed\r\nTo: bob@mta.example\r\nX-Scanned: clean\r\n\r\ntext\r\nfooter\r\n")
    assert result.email()["x-scanned"] == "clean"
    assert result.delivery.message.headers[0].name == "Received"
    assert result.delivered.headers[0].name == "Subject"


@pytest.mark.parametrize("like", ["postfix", "sendmail"])
def test_the_filter_counts_header_fields_as_its_mta_does(like: str) -> None:
    app = Milter("deleting")

    @app.on_message
    def delete(ctx: EomContext, message: Received) -> None:
        message.headers.replace("X-A", None, 1)
        message.headers.replace("X-A", "changed", 1)

    result = sent(app, like, message=b"X-A: 1\nX-A: 2\nX-A: 3\n\n")
    assert result.headers.get_all("X-A") == ["changed", "3"]


def test_each_mta_tells_its_version() -> None:
    versions: list[str | None] = []
    app = Milter("asking")

    @app.on_eom(macros=["v"])
    def on_eom(ctx: EomContext) -> None:
        versions.append(ctx.macros.get("v"))

    sent(app)
    sent(app, "sendmail")
    assert versions == ["Postfix 3.7.11", "8.17.1"]


def test_header_fields_are_found_in_any_case() -> None:
    result = sent(Milter("idle"), message=b"Subject: one\nX-A: 1\nx-a: 2\nLong: a\n b\n\n")
    headers = result.headers
    assert (headers["SUBJECT"], headers["x-A"], headers["long"]) == ("one", "1", "a\n b")
    assert headers.get_all("X-a") == ["1", "2"]
    assert list(headers) == ["Subject", "X-A", "Long"]
    assert (len(headers), "x-b" in headers, headers.get("x-b"), headers.get_all("x-b")) == (3, False, None, [])
    assert headers.fields()[1:3] == [("X-A", "1"), ("x-a", "2")]
    with pytest.raises(KeyError, match=r"X-B \(there are: Subject, X-A, Long\)"):
        headers["X-B"]


def test_actions_are_what_the_filter_asked_for() -> None:
    app = Milter("acting")

    @app.on_eom
    def act(ctx: EomContext) -> Status:
        ctx.add_header("X-A", "1")
        ctx.replace_sender("bounces@mta.example")
        ctx.add_recipient("archive@mta.example")
        ctx.quarantine("odd")
        return Status.CONTINUE

    result = sent(app)
    assert result.actions[:3] == (
        AddHeader("X-A", "1"),
        ReplaceSender("<bounces@mta.example>"),
        AddRecipient("<archive@mta.example>"),
    )
    assert (result.quarantined, result.quarantine) == (True, "odd")
    assert repr(result).startswith("<Result: accepted, but quarantined (odd): 250 ")


def test_values_of_actions_are_as_handlers_have_them() -> None:
    result = sent(editor(), message=MESSAGE)
    assert Steps.LEADING_SPACE in result.transcript.negotiated.steps
    assert AddHeader("X-Scanned", "clean") in result.actions


def test_the_answer_of_each_stage_is_there() -> None:
    result = sent(answering("eoh", Status.REJECT), message=MESSAGE)
    assert [(entry.stage, entry.answer and entry.answer.verdict) for entry in result.answers] == [
        (Command.CONNECT, None),
        (Command.HELO, None),
        (Command.MAIL, None),
        (Command.RCPT, None),
        (Command.DATA, None),
        (Command.HEADER, None),
        (Command.HEADER, None),
        (Command.EOH, Verdict.REJECT),
    ]
    assert result.actions == ()


@pytest.mark.parametrize("status", [Status.REJECT, Status.TEMPFAIL, Status.DISCARD])
def test_of_what_is_not_delivered_nothing_is_told(status: Status) -> None:
    result = sent(answering("eom", status))
    assert result.recipients == []
    for name in ("message", "sender", "headers", "body", "delivery", "delivered"):
        with pytest.raises(NotDeliveredError, match=r"^nothing was delivered: \w+ at eom: "):
            getattr(result, name)
    with pytest.raises(AssertionError):
        result.email()


# ---- a result for people


def test_str_tells_the_conversation_the_changes_and_the_differences() -> None:
    lines = str(sent(editor(), message=b"Subject: a\x1b[1m\n\nt\xe9xt\n")).splitlines()
    assert lines[0] == "accepted: 250 2.0.0 Ok: queued as 4Fz00001Qx1"
    assert [line.split()[0] for line in lines[2:10]] == [
        *("connect", "helo", "mail", "rcpt", "data", "header", "eoh", "body"),
    ]
    assert lines[4].split()[1:] == ["<ann@client.example>", "(no", "reply)"]
    assert lines[10].split() == ["eom", "continue"]
    assert "  add header X-Scanned: clean" in lines
    assert lines[lines.index("--- as sent") :] == [
        "--- as sent",
        "+++ as delivered",
        "@@ -1,6 +1,9 @@",
        "-MAIL FROM:<ann@client.example>",
        "+MAIL FROM:<bounces@mta.example>",
        " RCPT TO:<bob@mta.example>",
        "+RCPT TO:<archive@mta.example>",
        " ",
        "-Subject: a\\x1b[1m",
        "+Subject: changed",
        "+X-Scanned: clean",
        " ",
        " t\\xe9xt",
        "+footer",
    ]


def test_str_of_a_refusal_ends_with_the_conversation() -> None:
    text = str(sent(guard(), recipients="no@mta.example"))
    assert text.splitlines()[-1].split() == [
        "rcpt",
        "<no@mta.example>",
        *["550", "5.7.1", "no@mta.example", "is", "not", "here"],
    ]


def test_a_message_that_was_not_changed_has_no_differences() -> None:
    result = sent(Milter("idle"))
    assert result.diff() == ""
    assert str(result).endswith("\n\nnothing was changed")


def test_large_bodies_are_compared_as_a_whole() -> None:
    app = Milter("shorter")

    @app.on_message
    def shorten(ctx: EomContext, message: Received) -> None:
        message.body = b"short\r\n"

    result = sent(app, message=b"Subject: test\n\n" + b"0123456789abcd\r\n" * 20000)
    assert result.diff().splitlines()[-2:] == ["-(a body of 320000 bytes)", "+(another body, of 7 bytes)"]


# ---- what a test says


@dataclass
class Notes:
    """What a filter was told."""

    seen: list[Any] = field(default_factory=list)


def noting() -> tuple[Milter[Any, Any], Notes]:
    app, notes = Milter("noting"), Notes()

    @app.on_message
    def note(ctx: EomContext, message: Received) -> None:
        notes.seen.append((ctx.hostname, str(ctx.address), ctx.helo, message.sender.raw))
        notes.seen.append([(recipient.raw, recipient.params.raw) for recipient in ctx.recipients])
        notes.seen.append(message.as_bytes())

    return app, notes


def test_everything_has_a_default() -> None:
    app, notes = noting()
    result = sent(app)
    assert notes.seen[:2] == [
        ("client.example", "192.0.2.1:49152", "client.example", "<ann@client.example>"),
        [("<bob@mta.example>", ())],
    ]
    assert result.headers["Subject"] == "A sample message"


@pytest.mark.parametrize(
    ("client", "hostname", "address"),
    [
        ("mail.example[192.0.2.8]", "mail.example", "192.0.2.8:49152"),
        ("192.0.2.8", "[192.0.2.8]", "192.0.2.8:49152"),
        ("mail.example[2001:db8::8]", "mail.example", "[2001:db8::8]:49152"),
        (ClientAddress(Family.INET, "192.0.2.8", 25), "[192.0.2.8]", "192.0.2.8:25"),
        ("/run/submit.sock", "localhost", "unix:/run/submit.sock"),
        (None, "unknown", "None"),
    ],
)
def test_who_connects(client: Any, hostname: str, address: str) -> None:
    app, notes = noting()
    sent(app, client=client, helo="hello")
    assert notes.seen[0][:3] == (hostname, address, "hello")


def test_an_address_that_is_none_is_refused() -> None:
    with MTA(Milter("idle")) as mta, pytest.raises(ValueError, match=r"'mail.example'.*write client='192.0.2.8', "):
        mta.send(client="mail.example")


def test_envelopes_with_parameters() -> None:
    app, notes = noting()
    sent(
        app,
        sender="",
        params=["SIZE=100"],
        recipients=[Mailbox("bob@mta.example", ("NOTIFY=NEVER",)), "<eve@mta.example>"],
    )
    assert notes.seen[0][3] == "<>"
    assert notes.seen[1] == [("<bob@mta.example>", ("NOTIFY=NEVER",)), ("<eve@mta.example>", ())]
    with MTA(app) as mta, pytest.raises(TypeError, match=r'params=\["SIZE=100"\]'):
        mta.send(params="SIZE=100")
    with MTA(app) as mta, pytest.raises(ValueError, match="needs a recipient"):
        mta.send(recipients=[])


def parsed() -> EmailMessage:
    mail = EmailMessage()
    mail["Subject"] = "test"
    mail.set_content("text\n")
    return mail


def test_a_message_in_any_form(tmp_path: Path) -> None:
    app, notes = noting()
    file = tmp_path / "mail.eml"
    file.write_bytes(MESSAGE)
    expected = b"Subject: test\r\nTo: bob@mta.example\r\n\r\ntext\r\n"
    forms: list[Mail] = [MESSAGE, MESSAGE.decode(), Message.parse(MESSAGE), file, MESSAGE.replace(b"\n", b"\r\n")]
    with MTA(app) as mta:
        for message in forms:
            assert mta.send(message=message).message == expected
        assert b"Subject: test\r\n" in mta.send(message=parsed()).message
        with pytest.raises(TypeError, match="a message is bytes"):
            mta.send(message=17)  # type: ignore[arg-type]
    assert notes.seen[2::3][:5] == [expected] * 5


def test_macros_come_with_and_without_braces() -> None:
    app = Milter("macros")
    seen: list[dict[str, str | None]] = []

    @app.on_eom(macros=["{auth_authen}", "{mine}"])
    def look(ctx: EomContext) -> Status:
        seen.append({name: ctx.macros.get(name) for name in ("{auth_authen}", "{mine}", "i")})
        return Status.CONTINUE

    with MTA(app) as mta:
        result = mta.send(macros={"auth_authen": "ann", "{mine}": "yes", "i": "ABC"})
        assert result.queue_id == "ABC"
        with mta.connect(macros={"auth_authen": "ann"}) as session:
            session.send(macros={"mine": "first"})
            session.send(macros={"mine": "second", "auth_authen": "eve"})
            session.send()
    assert seen == [
        {"{auth_authen}": "ann", "{mine}": "yes", "i": "ABC"},
        {"{auth_authen}": "ann", "{mine}": "first", "i": "4Fz00001Qx1"},
        {"{auth_authen}": "eve", "{mine}": "second", "i": "4Fz00002Qx1"},
        {"{auth_authen}": "ann", "{mine}": None, "i": "4Fz00003Qx1"},
    ]


def test_less_can_be_offered() -> None:
    app = editor()
    with MTA(app, version=2, actions=1, steps=0x7F, raise_errors=False) as mta:
        result = mta.send()
    assert (result.transcript.negotiated.version, result.transcript.negotiated.steps & Steps.LEADING_SPACE) == (2, 0)
    assert result.deferred
    assert "the MTA did not grant" in str(result.errors[0])


@pytest.mark.parametrize("like", ["exim", Milter, None])
def test_an_unknown_mta_is_refused(like: Any) -> None:
    with pytest.raises(ValueError, match='like must be "postfix", "sendmail"'):
        MTA(Milter("idle"), like=like)


def test_an_mta_says_what_it_is() -> None:
    assert repr(MTA(Milter("guard"))) == "<MTA like Postfix with the filter 'guard' in this process>"
    assert repr(MTA("inet:3@localhost", like=Sendmail)) == "<MTA like Sendmail with the filter at inet:3@localhost>"


def test_what_is_no_filter_is_refused() -> None:
    with pytest.raises(TypeError, match=r"a filter is a milter.Milter, or a socket such as 'inet:3000@localhost'"):
        MTA(17)  # type: ignore[arg-type]


# ---- sessions, and the filter's state


@dataclass
class Seen:
    messages: int = 0


@dataclass
class Draft:
    recipients: list[str] = field(default_factory=list)


def counting(closed: list[int] | None = None) -> Milter[Seen, Draft]:
    app = Milter("counting", session=Seen, transaction=Draft)

    @app.on_rcpt
    def on_rcpt(ctx: Context[Seen, Draft], recipient: str, params: object) -> None:
        ctx.transaction.recipients.append(str(recipient))

    @app.on_eom
    def on_eom(ctx: EomContext[Seen, Draft]) -> Status:
        ctx.session.messages += 1
        return Status.CONTINUE

    @app.on_close
    def on_close(ctx: Context[Seen, Draft]) -> None:
        if closed is not None:
            closed.append(ctx.session.messages)

    return app


def test_state_of_the_filter_can_be_looked_at() -> None:
    closed: list[int] = []
    with MTA(counting(closed)) as mta:
        with mta.connect() as session:
            assert session.state is None
            first = session.send(recipients=["a@mta.example", "b@mta.example"])
            second = session.send(recipients=["c@mta.example"])
            assert first.transaction == Draft(["a@mta.example", "b@mta.example"])
            assert second.transaction == Draft(["c@mta.example"])
            assert session.state == Seen(2)
            assert closed == []
        assert closed == [2]
        mta.send()
        assert closed == [2, 1]


def test_there_is_no_state_if_no_handler_looked() -> None:
    assert sent(guard()).transaction is None


def test_a_session_can_say_more_than_messages() -> None:
    app = Milter("unknown")

    @app.on_unknown
    def on_unknown(ctx: Context, command: str) -> Reply:
        return Reply(502, "5.5.1", command)

    with MTA(app) as mta, mta.connect() as session:
        session.client.connect_info()
        answer = session.client.unknown("FOO")
        assert session.send().accepted
    assert answer is not None
    assert answer.lines == ("FOO",)


def test_a_filter_that_decided_on_the_session_is_asked_no_more() -> None:
    calls: list[str] = []
    app = Milter("early")

    @app.on_helo
    def on_helo(ctx: Context, name: str) -> Status:
        calls.append(name)
        return Status.REJECT

    with MTA(app) as mta, mta.connect() as session:
        replies = [session.send().reply for _ in range(3)]
    assert (calls, set(replies)) == (["client.example"], {"550 5.7.1 Command rejected"})


# ---- what handlers raise


@pytest.mark.parametrize("stage", ["mail", "header", "eoh", "eom", "close", "connect"])
def test_what_a_handler_raises_is_raised_in_the_test(stage: str) -> None:
    error = LookupError("what is wrong")
    app = raising(stage, error, 2 if stage in ("mail", "header", "connect") else 0)
    with MTA(app) as mta, pytest.raises(LookupError) as caught:
        mta.send(message=b"Subject: test\n\n")
    assert caught.value is error
    assert error.__notes__[0].startswith("raised by raising.<locals>.")
    assert error.__notes__[0].endswith(f", the handler of on_{stage}")
    assert caught.traceback[-1].name in ("plain", "with_two")


def test_what_several_handlers_raise_is_raised_as_a_group() -> None:
    app = raising("close", LookupError("last"))
    app.include(raising("eom", ValueError("first")))
    with MTA(app) as mta, pytest.raises(ExceptionGroup) as caught:
        mta.send()
    assert [repr(error) for error in caught.value.exceptions] == ["ValueError('first')", "LookupError('last')"]


def test_an_assertion_in_a_handler_fails_the_test() -> None:
    app = Milter("checking")

    @app.on_mail
    def check(ctx: Context, sender: str, params: object) -> None:
        assert sender == "eve@client.example"

    with MTA(app) as mta, pytest.raises(AssertionError):
        mta.send()


def test_a_wrong_verdict_is_raised_too() -> None:
    app = Milter("wrong")
    app.on_eom(lambda ctx: 4)  # type: ignore[arg-type, return-value]
    with MTA(app) as mta, pytest.raises(TypeError, match="returned 4"):
        mta.send()


def test_errors_can_be_left_to_the_policy_of_the_filter() -> None:
    error = ValueError("what is wrong")
    with MTA(raising("eom", error), raise_errors=False) as mta:
        result = mta.send()
    assert (result.deferred, result.errors) == (True, (error,))
    assert repr(result).endswith(" (raised: ValueError('what is wrong'))>")


def test_errors_belong_to_the_message_in_which_they_were_raised() -> None:
    app = Milter("picky")

    @app.on_header
    def on_header(ctx: Context, name: str, value: str) -> None:
        if value == "bad":
            raise ValueError(value)

    with MTA(app, raise_errors=False) as mta, mta.connect() as session:
        results = [session.send(message=f"Subject: {subject}\n\n") for subject in ("good", "bad", "good")]
    assert [(len(result.errors), result.accepted) for result in results] == [(0, True), (1, False), (0, True)]
    with MTA(app) as mta, mta.connect() as session:
        with pytest.raises(ValueError, match="bad"):
            session.send(message="Subject: bad\n\n")
        assert session.send(message="Subject: good\n\n").accepted


def test_an_error_at_the_end_of_a_session_is_raised_at_its_end() -> None:
    app = raising("close", LookupError("at the end"))
    with MTA(app) as mta:
        session = mta.connect()
        with pytest.raises(LookupError, match="at the end"), session:
            assert session.send().accepted


def test_the_error_of_the_test_itself_comes_first() -> None:
    app = raising("close", LookupError("at the end"))
    with MTA(app) as mta:
        session = mta.connect()
        with pytest.raises(ZeroDivisionError), session:
            raise ZeroDivisionError


def test_an_error_in_the_negotiation_is_raised_before_anything_is_sent() -> None:
    app = raising("negotiate", ValueError("no such offer"))
    with MTA(app) as mta, pytest.raises(ValueError, match="no such offer"):
        mta.connect()
    with MTA(app, raise_errors=False) as mta, pytest.raises(PeerClosed, match="after NEGOTIATE"):
        mta.connect()


def test_a_filter_that_requires_more_than_is_offered_hangs_up() -> None:
    app = Milter("demanding", requires=Actions.QUARANTINE)
    with MTA(app, actions=1) as mta, pytest.raises(WireError):
        mta.send()


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), asyncio.CancelledError()])
def test_what_would_end_more_than_the_test_is_wrapped(error: BaseException) -> None:
    with MTA(raising("eom", error)) as mta, pytest.raises(HandlerError) as caught:
        mta.send()
    assert caught.value.__cause__ is error


def test_a_failing_test_of_pytest_is_one_in_a_handler_too() -> None:
    app = Milter("failing")

    @app.on_eom
    def fail(ctx: EomContext) -> None:
        pytest.fail("not like this")

    with MTA(app) as mta, pytest.raises(pytest.fail.Exception, match="not like this"):
        mta.send()


def test_a_policy_of_shutdown_raises_what_was_raised() -> None:
    app = Milter("strict", on_error="shutdown")
    app.include(raising("eom", ValueError("what is wrong")))
    with MTA(app) as mta, pytest.raises(ValueError, match="what is wrong"):
        mta.send()


# ---- hooks and coroutines


def test_hooks_run_once_for_a_block() -> None:
    events: list[str] = []
    app = Milter("hooked")
    app.on_start(lambda: events.append("start"))
    app.on_stop(lambda: events.append("stop 1"))
    app.on_stop(lambda: events.append("stop 2"))
    app.on_eom(lambda ctx: events.append("message"))
    for _ in range(2):
        with MTA(app) as mta:
            mta.send()
            mta.send()
    assert events == ["start", "message", "message", "stop 2", "stop 1"] * 2


def test_a_hook_that_raises_is_raised() -> None:
    app = Milter("hooked")

    @app.on_start
    def start() -> None:
        raise ValueError("no database")

    with pytest.raises(ValueError, match="no database"), MTA(app):
        pass
    app.start_hooks.clear()
    app.on_stop(start)
    with pytest.raises(ValueError, match="no database"), MTA(app) as mta:
        assert mta.send().accepted


def test_coroutines_and_hooks_share_one_loop() -> None:
    loops: list[asyncio.AbstractEventLoop] = []
    app = Milter("async")

    @app.on_start
    async def start() -> None:
        loops.append(asyncio.get_running_loop())

    @app.on_message
    async def scan(ctx: EomContext, message: Received) -> Reply:
        loops.append(asyncio.get_running_loop())
        await asyncio.sleep(0)
        return Reply(554, "5.7.1", "virus found")

    with MTA(app) as mta:
        assert mta.send().reply == mta.send().reply == "554 5.7.1 virus found"
    assert len(loops) == 3
    assert len(set(loops)) == 1
    assert loops[0].is_closed()


def test_a_coroutine_that_raises_is_raised() -> None:
    app = Milter("async")

    @app.on_mail
    async def fail(ctx: Context, sender: str, params: object) -> None:
        raise LookupError(sender)

    with MTA(app) as mta, pytest.raises(LookupError, match=r"^ann@client\.example\n"):
        mta.send()


# ---- many filters in one process


def named(name: str) -> Milter[Any, Any]:
    app = Milter(name)
    app.on_helo(lambda ctx, helo: Reply(550, "5.7.1", name))
    return app


def test_many_filters_run_at_once_and_each_gets_its_own() -> None:
    apps = [named(str(number)) for number in range(5)]
    with MTA(apps[0]) as first, MTA(apps[1]) as second, MTA(apps[0], like="sendmail") as again:
        mtas = (first, second, again, second, first)
        assert [mta.send().reply[10:] for mta in mtas] == ["0", "1", "0", "1", "0"]
    for app in apps:
        assert sent(app).reply == f"550 5.7.1 {app.name}"


def test_sessions_of_several_threads_are_kept_apart() -> None:
    app = guard()
    barrier = threading.Barrier(4)

    def work(number: int) -> list[str]:
        barrier.wait()
        with mta.connect() as session:
            return [session.send(recipients=f"no{number}-{turn}@mta.example").reply for turn in range(10)]

    with MTA(app) as mta, ThreadPoolExecutor(4) as pool:
        replies = list(pool.map(work, range(4)))
    assert replies == [
        [f"550 5.7.1 no{number}-{turn}@mta.example is not here" for turn in range(10)] for number in range(4)
    ]


def test_a_filter_that_was_started_is_no_hindrance(tmp_path: Path) -> None:
    socket = f"unix:{tmp_path}/filter.sock"
    with MTA(named("before")) as before:
        assert before.send().reply == "550 5.7.1 before"
        for turn in ("first", "second"):
            with named(turn).start(socket) as server, MTA(server.socket) as outside, MTA(named("beside")) as beside:
                assert outside.send().reply == f"550 5.7.1 {turn}"
                assert [mta.send().reply[10:] for mta in (beside, outside, before)] == ["beside", turn, "before"]
            assert before.send().reply == "550 5.7.1 before"


@pytest.mark.skipif(not libmilter.redirected, reason="the shared libmilter serves one family of sockets in a process")
@pytest.mark.parametrize("socket", ["inet:0@127.0.0.1", "inet:0@0.0.0.0", "inet6:0@::1"])
def test_a_filter_may_listen_on_any_kind_of_socket(socket: str) -> None:
    with MTA(named("tested")) as tested:
        assert tested.send().reply == "550 5.7.1 tested"
        with named("started").start(socket) as server:
            reached = server.socket.replace("@0.0.0.0", "@127.0.0.1")
            with MTA(reached) as outside:
                assert [mta.send().reply[10:] for mta in (tested, outside)] == ["tested", "started"]
        assert tested.send().reply == "550 5.7.1 tested"


def test_the_state_of_a_filter_is_not_that_of_the_object_that_was_given() -> None:
    app = counting()
    with MTA(app) as mta:
        mta.send()
        assert app.server is None
        assert (app.new_session, app.new_transaction) == (Seen, Draft)


def test_handlers_may_be_added_between_two_connections() -> None:
    app = Milter("growing")
    with MTA(app) as mta:
        assert mta.send().accepted
        app.on_eom(lambda ctx: Status.REJECT)
        assert mta.send().rejected


def test_a_filter_that_was_asked_for_and_is_gone_is_not_served_by_another() -> None:
    with MTA(named("other")):
        rehearsal = Rehearsal(named("gone"))
        connection = rehearsal.connect(10.0)
        connection.end()
        late = _WantingClient(libmilter.connect(), connection._run, 10.0)
        with late, pytest.raises(PeerClosed):
            late.negotiate()


# ---- every packet


@pytest.mark.parametrize("version", [2, 3, 4, 5, 6])
def test_a_client_has_every_packet_in_its_hands(version: int) -> None:
    offers: list[Any] = []
    app = guard()

    @app.on_negotiate
    def on_negotiate(ctx: NegotiateContext) -> None:
        offers.append(ctx.offered_actions)

    with MTA(app) as mta, mta.client() as client:
        assert client.negotiate(version, actions=0x3F).version == version
        client.send(b"R", b"<bob@mta.example>\0")  # without MAIL
        if libmilter.redirected:
            assert client.receive().letter == b"t"
        client.connect_info()
        client.mail("<ann@client.example>")
        answer = client.rcpt("<no@mta.example>")
    assert answer is not None
    assert answer.lines == ("no@mta.example is not here",)
    assert offers == [Actions(0x3F)]


def test_whatever_is_offered_the_filter_is_the_one_that_was_asked_for() -> None:
    with MTA(named("other")) as other, other.connect(), MTA(named("wanted")) as mta, mta.client() as client:
        client.negotiate(actions=0xFFFFFFFF)
        client.connect_info()
        answer = client.helo()
    assert answer is not None
    assert answer.lines == ("wanted",)


def test_what_is_raised_at_such_a_connection_is_raised_at_the_end() -> None:
    app = Milter("raising")

    @app.on_mail
    def mail(ctx: Context, sender: Address, params: Params) -> Status:  # it replies: the client waits for it
        raise LookupError("of a raw client")

    mta = MTA(app)
    mta.__enter__()
    client = mta.client()
    client.negotiate()
    client.connect_info()
    client.mail("<ann@client.example>")
    with pytest.raises(LookupError, match="of a raw client"):
        mta.__exit__(None, None, None)


class Busy:
    """A run that has so many handlers at work, one look after the other."""

    mark = 0

    def __init__(self, *handlers: int) -> None:
        self.handlers = list(handlers)

    def wait_handlers(self, milliseconds: int) -> int:
        return self.handlers.pop(0)


def test_time_does_not_count_while_a_handler_runs() -> None:
    here, there = socket.socketpair()
    busy = Busy(1, 1, 0, 1, 0, 0, 99)
    with there, _WantingClient(here, cast(WantedRun, busy), 0.001) as client, pytest.raises(PeerTimeout):
        client.receive()
    assert busy.handlers == [99]


def test_an_answer_is_taken_whenever_it_comes() -> None:
    here, there = socket.socketpair()

    class Answering(Busy):
        def wait_handlers(self, milliseconds: int) -> int:
            if len(self.handlers) == 1:
                there.sendall(Packet(Response.CONTINUE).encode())
            return super().wait_handlers(milliseconds)

    busy = Answering(1, 1, 1)
    with there, _WantingClient(here, cast(WantedRun, busy), 0.001) as client:
        assert client.receive() == Packet(Response.CONTINUE)


def test_a_command_that_libmilter_drops_is_not_waited_for_without_end() -> None:
    with MTA(Milter("idle")) as mta, mta.client(timeout=0.001) as client, pytest.raises(PeerTimeout):
        client.end_of_message()


# ---- filters elsewhere


def test_a_filter_elsewhere_is_reached_by_its_socket(serve: Serve) -> None:
    peer = serve(counting())
    with MTA(peer.server.socket, timeout=5.0) as mta, mta.connect() as session:
        result = session.send()
        assert (result.accepted, result.transaction, session.state) == (True, None, None)
        assert session.client.timeout == 5.0


def test_what_a_filter_elsewhere_raises_nobody_knows(serve: Serve) -> None:
    peer = serve(raising("eom", ValueError("there")))
    with MTA(peer.server.socket) as mta:
        result = mta.send()
    assert (result.deferred, result.errors) == (True, ())


def test_a_filter_that_is_not_there_is_told(tmp_path: Path) -> None:
    with MTA(f"unix:{tmp_path}/nobody.sock") as mta, pytest.raises(SocketError, match="is the filter running"):
        mta.send()


# ---- the process


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="descriptors are listed in /proc")
def test_nothing_is_left_of_a_test() -> None:
    app = counting()
    sent(app)
    before = threading.active_count(), descriptors()
    for _ in range(50):
        with MTA(app) as mta:
            mta.send()
            mta.client().negotiate()
    from milter import binding

    assert (threading.active_count(), descriptors()) == before
    assert binding._engines == {}


def run(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=False
    )


OPEN = """
import os, sys
from milter import Milter
from milter.testing import MTA
app = Milter("left open")
app.on_close(lambda ctx: print("closed", flush=True))
mta = MTA(app).__enter__()
client = mta.client()
client.negotiate()
client.connect_info()
"""


def test_a_process_may_end_while_a_connection_is_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    ended = run(OPEN)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert list(tmp_path.iterdir()) == []


def test_a_process_ends_although_a_handler_does_not() -> None:
    ended = run(
        """
import threading
from milter import Milter
from milter.testing import MTA
app = Milter("stuck")
entered = threading.Event()
@app.on_helo
def on_helo(ctx, name):
    entered.set()
    threading.Event().wait()
mta = MTA(app).__enter__()
client = mta.client()
client.negotiate()
client.connect_info()
client.send(b"H", b"client.example\\0")
entered.wait()
"""
    )
    assert (ended.returncode, ended.stderr) == (
        70,
        "handlers of a filter under test did not end: the process ends without them\n",
    )


def test_a_child_of_the_process_is_told_why_it_cannot() -> None:
    ended = run(
        OPEN
        + """
if os.fork() == 0:
    try:
        mta.send()
    except Exception as error:
        print(error, flush=True)
    os._exit(0)
os.wait()
"""
    )
    assert ended.stdout == "libmilter was started before this process was forked: fork first, then start\n"
