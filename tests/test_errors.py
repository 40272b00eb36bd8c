# SPDX-License-Identifier: GPL-3.0-or-later
"""What happens when a handler raises, or the engine itself fails: the mail never passes by accident."""

from collections.abc import Callable
from typing import Any

import pytest

from milter import Address, Context, EomContext, HandlerError, Message, Milter, Params, Reply, Status, binding
from milter.engine import Engine
from milter.testing import Answer, Client, ReplaceBody, Verdict
from tests.conftest import Serve, begin_message, send_content, send_message

REPLYING_STAGES = ("connect", "helo", "mail", "rcpt", "data", "header", "eoh", "body", "eom", "unknown")
MESSAGE_STAGES = ("mail", "rcpt", "data", "header", "eoh", "body")


def broken(*arguments: Any) -> Status:
    raise RuntimeError("broken handler")


def broken_observer(*arguments: Any) -> None:
    raise RuntimeError("broken observer")


def drive(client: Client) -> dict[str, Answer | None]:
    """Go on with a conversation up to the stage that is answered with something else than "continue"."""
    steps: dict[str, Callable[[], Answer | None]] = {
        "connect": client.connect_info,
        "helo": client.helo,
        "unknown": lambda: client.unknown("FOO"),
        "mail": lambda: client.mail("<ann>"),
        "rcpt": lambda: client.rcpt("<bob>"),
        "data": client.data,
        "header": lambda: client.header("Subject", "test"),
        "eoh": client.eoh,
        "body": lambda: client.body(b"text\r\n"),
        "eom": lambda: client.end_of_message().answer,
    }
    answers: dict[str, Answer | None] = {}
    for stage, step in steps.items():
        answers[stage] = step()
        answer = answers[stage]
        if answer is not None and answer.verdict is not Verdict.CONTINUE:
            break
    return answers


def answered_at(stage: str) -> str:
    """Header fields are answered together, at their end."""
    return "eoh" if stage == "header" else stage


def last(answers: dict[str, Answer | None]) -> tuple[str, Verdict]:
    stage, answer = list(answers.items())[-1]
    assert answer is not None
    return stage, answer.verdict


@pytest.mark.parametrize("stage", REPLYING_STAGES)
def test_a_handler_that_raises_is_answered_with_tempfail_and_logged(
    serve: Serve, stage: str, caplog: pytest.LogCaptureFixture
) -> None:
    app = Milter("test")
    getattr(app, f"on_{stage}")(broken)
    client = serve(app).client()
    client.negotiate()
    assert last(drive(client)) == (answered_at(stage), Verdict.TEMPFAIL)
    (record,) = caplog.records
    assert f"broken failed in on_{stage}" in record.getMessage()
    assert "RuntimeError: broken handler" in caplog.text
    assert "192.0.2.1" in record.getMessage()


@pytest.mark.parametrize("failure", [SystemExit, KeyboardInterrupt, GeneratorExit, MemoryError, RecursionError])
def test_no_kind_of_exception_gets_through(serve: Serve, failure: type[BaseException]) -> None:
    app = Milter("test")

    @app.on_mail
    def mail(ctx: Context, sender: Address, params: Params) -> Status:
        raise failure

    client = serve(app).client()
    client.negotiate()
    assert last(drive(client)) == ("mail", Verdict.TEMPFAIL)


@pytest.mark.parametrize("stage", MESSAGE_STAGES)
def test_an_observer_that_raises_fails_its_message_at_the_end_and_no_other(serve: Serve, stage: str) -> None:
    app = Milter("test")
    calls: list[Any] = []

    def observer(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 1:
            raise RuntimeError("the first time")

    getattr(app, f"on_{stage}")(observer)
    client = serve(app).greeted()
    assert send_message(client).answer.verdict is Verdict.TEMPFAIL
    assert send_message(client).answer.verdict is Verdict.CONTINUE


def test_an_observer_that_raises_rests_for_the_rest_of_its_message(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    app = Milter("test")
    app.on_header(broken_observer)
    client = serve(app).greeted()
    for _ in range(2):
        begin_message(client)
        for number in range(100):
            client.header("X-Number", str(number))
        assert send_content(client).answer.verdict is Verdict.TEMPFAIL
    assert len(caplog.records) == 2


def test_a_handler_that_raises_for_one_recipient_is_asked_about_the_next(serve: Serve) -> None:
    app = Milter("test")

    @app.on_rcpt
    def rcpt(ctx: Context, recipient: Address, params: Params) -> Status:
        if recipient == "bug":
            raise RuntimeError("broken handler")
        return Status.REJECT if recipient == "eve" else Status.CONTINUE

    client = serve(app).greeted()
    client.mail("<ann>")
    answers = [client.rcpt(recipient) for recipient in ("<bug>", "<eve>", "<bug>", "<bob>")]
    verdicts = [answer and answer.verdict for answer in answers]
    assert verdicts == [Verdict.TEMPFAIL, Verdict.REJECT, Verdict.TEMPFAIL, Verdict.CONTINUE]


def test_a_handler_that_raises_for_one_recipient_takes_no_edits_from_the_message(serve: Serve) -> None:
    app = Milter("test")

    @app.on_rcpt
    def rcpt(ctx: Context, recipient: Address, params: Params) -> Status:
        if recipient == "bug":
            raise RuntimeError("broken handler")
        return Status.CONTINUE

    @app.on_message
    def message(ctx: EomContext, message: Message) -> None:
        message.body = b"without the virus\r\n"

    client = serve(app).greeted()
    client.mail("<ann>")
    client.rcpt("<bug>")
    client.rcpt("<bob>")
    end = send_content(client)
    assert end.answer.verdict is Verdict.CONTINUE
    assert end.changes == (ReplaceBody(b"without the virus\r\n"),)


def test_an_observer_that_raises_is_answered_at_the_next_stage_that_replies(serve: Serve) -> None:
    app = Milter("test")
    later: list[str] = []
    app.on_mail(broken_observer)
    app.on_rcpt(lambda ctx, recipient, params: later.append("rcpt"))
    app.on_eom(lambda ctx: later.append("eom"))
    client = serve(app).greeted()
    client.mail("<ann>")
    for _ in range(2):  # each recipient is refused, since a refusal concerns one only
        answer = client.rcpt("<bob>")
        assert answer is not None
        assert answer.verdict is Verdict.TEMPFAIL
    assert later == []


def test_a_message_whose_observer_failed_fails_also_when_it_was_aborted_and_begun_again(serve: Serve) -> None:
    app = Milter("test")
    calls: list[Any] = []

    @app.on_mail
    def mail(ctx: Context, sender: Address, params: Params) -> None:
        calls.append(sender)
        if len(calls) != 2:
            raise RuntimeError

    client = serve(app).greeted()
    client.mail("<one>")
    client.abort()
    assert send_message(client).answer.verdict is Verdict.CONTINUE
    assert send_message(client).answer.verdict is Verdict.TEMPFAIL


def test_an_observer_of_helo_that_raises_fails_the_messages_until_the_next_helo(serve: Serve) -> None:
    app = Milter("test")

    @app.on_helo
    def helo(ctx: Context, name: str) -> None:
        if name == "broken":
            raise RuntimeError

    client = serve(app).greeted()
    client.helo("broken")
    assert send_message(client).answer.verdict is Verdict.TEMPFAIL
    assert send_message(client).answer.verdict is Verdict.TEMPFAIL
    client.helo("well")
    assert send_message(client).answer.verdict is Verdict.CONTINUE


@pytest.mark.parametrize("stage", ["connect", "helo"])
def test_an_observer_of_the_connection_that_raises_fails_all_its_messages(serve: Serve, stage: str) -> None:
    app = Milter("test")
    getattr(app, f"on_{stage}")(broken_observer)
    client = serve(app).greeted()
    for _ in range(2):
        assert send_message(client).answer.verdict is Verdict.TEMPFAIL


def test_an_observer_that_raises_is_answered_to_an_mta_that_expects_replies_too(serve: Serve) -> None:
    app = Milter("test")
    app.on_header(broken_observer)
    client = serve(app).client()
    client.negotiate(version=2, actions=0x3F, steps=0x7F)
    assert last(drive(client)) == ("eom", Verdict.TEMPFAIL)


def test_handlers_of_abort_and_close_that_raise_are_logged_and_the_others_run(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    app = Milter("test")
    calls: list[str] = []
    for stage in ("abort", "close"):
        getattr(app, f"on_{stage}")(broken_observer)
        getattr(app, f"on_{stage}")(lambda ctx, stage=stage: calls.append(stage))
    client = serve(app).greeted()
    client.mail("<ann>")
    client.abort()
    client.quit()
    client.wait_for_close()
    assert calls == ["abort", "close"]
    assert [record.getMessage().split(" (")[0] for record in caplog.records] == [
        "broken_observer failed in on_abort",
        "broken_observer failed in on_close",
    ]


# ---- Policies


@pytest.mark.parametrize(
    ("policy", "verdict"),
    [
        (Status.TEMPFAIL, Verdict.TEMPFAIL),
        (Status.REJECT, Verdict.REJECT),
        (Status.ACCEPT, Verdict.ACCEPT),
        (Reply(451, "4.3.0", "the filter is broken"), Verdict.REPLY),
        (Reply(554, "5.3.0", "the filter is broken"), Verdict.REPLY),
    ],
)
@pytest.mark.parametrize("stage", ["mail", "header", "eom"])
def test_the_policy_decides_what_the_mta_is_told(
    serve: Serve, stage: str, policy: Status | Reply, verdict: Verdict
) -> None:
    app = Milter("test", on_error=policy)
    getattr(app, f"on_{stage}")(broken)
    client = serve(app).client()
    client.negotiate()
    assert last(drive(client)) == (answered_at(stage), verdict)


def test_the_policy_to_go_on_lets_the_message_pass_as_was_asked_for(serve: Serve) -> None:
    app = Milter("test", on_error=Status.CONTINUE)
    app.on_mail(broken)
    app.on_header(broken_observer)
    assert send_message(serve(app).greeted()).answer.verdict is Verdict.CONTINUE


def test_the_policy_to_accept_is_never_an_answer_to_an_unknown_command(serve: Serve) -> None:
    app = Milter("test", on_error=Status.ACCEPT)
    app.on_unknown(broken)
    answer = serve(app).greeted().unknown("FOO")
    assert answer is not None
    assert answer.verdict is Verdict.CONTINUE


def test_shutdown_stops_the_filter_and_raises_the_cause(serve: Serve) -> None:
    app = Milter("test", on_error="shutdown")
    app.on_mail(broken)
    peer = serve(app)
    client = peer.client()
    client.negotiate()
    assert last(drive(client)) == ("mail", Verdict.TEMPFAIL)
    client.close()
    peer.server.wait()
    with pytest.raises(HandlerError, match="broken failed in on_mail: RuntimeError") as caught:
        peer.server.stop()
    assert isinstance(caught.value.__cause__, RuntimeError)


# ---- Wrong verdicts


@pytest.mark.parametrize("value", [0, 1, True, "reject", [], 550, Verdict.REJECT])
def test_a_return_value_that_is_no_verdict_is_an_error(
    serve: Serve, value: object, caplog: pytest.LogCaptureFixture
) -> None:
    app = Milter("test")
    app.on_mail(lambda ctx, sender, params: value)  # type: ignore[arg-type, return-value]
    client = serve(app).client()
    client.negotiate()
    assert last(drive(client)) == ("mail", Verdict.TEMPFAIL)
    assert "returns a milter.Status, a milter.Reply or None" in caplog.text


@pytest.mark.parametrize(
    ("stage", "verdict"),
    [
        ("connect", Status.DISCARD),
        ("connect", Status.SKIP),
        ("helo", Status.DISCARD),
        ("mail", Status.SKIP),
        ("rcpt", Status.SKIP),
        ("data", Status.SKIP),
        ("eoh", Status.SKIP),
        ("eom", Status.SKIP),
        ("unknown", Status.ACCEPT),
        ("unknown", Status.DISCARD),
        ("unknown", Status.SKIP),
    ],
)
def test_a_verdict_without_a_meaning_at_its_stage_is_an_error(
    serve: Serve, stage: str, verdict: Status, caplog: pytest.LogCaptureFixture
) -> None:
    app = Milter("test")
    getattr(app, f"on_{stage}")(lambda *arguments: verdict)
    client = serve(app).client()
    client.negotiate()
    assert last(drive(client)) == (stage, Verdict.TEMPFAIL)
    assert f"means nothing in on_{stage}; what does: CONTINUE" in caplog.text


def test_an_observer_that_replies_breaks_its_promise(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    app = Milter("test")

    @app.on_header
    def header(ctx: Context, name: str, value: str) -> None:
        return Status.REJECT  # type: ignore[return-value]

    assert send_message(serve(app).greeted()).answer.verdict is Verdict.TEMPFAIL
    assert "is annotated '-> None' and returned <Status.REJECT: 1>" in caplog.text


# ---- Several handlers


def test_handlers_run_in_order_until_one_gives_a_verdict(serve: Serve) -> None:
    app = Milter("test")
    calls: list[int] = []

    def make(number: int, verdict: Status | None) -> Any:
        def handler(ctx: EomContext) -> Status | None:
            calls.append(number)
            return verdict

        return handler

    for number, verdict in enumerate([None, Status.CONTINUE, Status.REJECT, Status.ACCEPT]):
        app.on_eom(make(number, verdict))
    assert send_message(serve(app).greeted()).answer.verdict is Verdict.REJECT
    assert calls == [0, 1, 2]


# ---- Replies


def test_a_reply_of_one_command_never_leaks_into_a_later_refusal(serve: Serve) -> None:
    app = Milter("test")
    verdicts: dict[str, Status | Reply] = {
        "<reply>": Reply(550, "5.7.1", "a custom text"),
        "<plain>": Status.REJECT,
        "<later>": Reply(450, "4.7.1", "later"),
        "<tempfail>": Status.TEMPFAIL,
    }
    app.on_rcpt(lambda ctx, recipient, params: verdicts[recipient.raw])
    client = serve(app).greeted()
    client.mail("<ann>")
    answers = [client.rcpt(recipient) for recipient in (*verdicts, *reversed(verdicts))]
    texts = [answer and answer.verdict for answer in answers]
    expected = [Verdict.REPLY, Verdict.REJECT, Verdict.REPLY, Verdict.TEMPFAIL]
    assert texts == expected + expected[::-1]


def test_replies_arrive_as_they_were_written_with_percent_signs_doubled_for_the_mta(serve: Serve) -> None:
    app = Milter("test")
    lines = [f"line {number}: 100%" for number in range(32)]
    app.on_mail(lambda ctx, sender, params: Reply(550, "5.7.1", *lines))
    answer = serve(app).greeted().mail("<ann>")
    assert answer is not None
    assert answer.code == 550
    assert list(answer.lines) == [line.replace("%", "%%") for line in lines]


@pytest.mark.parametrize("stage", [stage for stage in REPLYING_STAGES if stage != "unknown"])
@pytest.mark.parametrize("reply", [Reply(451, None, "one"), Reply(554, "5.7.1", "one", "two")], ids=str)
def test_a_reply_at_each_stage(serve: Serve, stage: str, reply: Reply) -> None:
    app = Milter("test")
    getattr(app, f"on_{stage}")(lambda *arguments: reply)
    client = serve(app).client()
    client.negotiate()
    answer = drive(client)[answered_at(stage)]
    assert answer is not None
    assert (answer.verdict, answer.code, answer.lines) == (Verdict.REPLY, reply.code, reply.lines)


# ---- The engine itself


def test_a_failure_of_the_engine_is_a_temporary_failure_of_the_message(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    app = Milter("test")
    app.on_eoh(lambda ctx: Status.CONTINUE)
    client = serve(app).greeted()
    send_message(client)  # so that the engine has heard of client and HELO
    begin_message(client)
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "enter", broken)
        answer = client.eoh()
        assert answer is not None
        assert answer.verdict is Verdict.TEMPFAIL
    assert "the engine failed" in caplog.text
    assert send_message(client).answer.verdict is Verdict.CONTINUE, "the next message is fine"


def test_a_failure_of_the_engine_where_nothing_can_be_said_fails_the_message_later(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = Milter("test")

    @app.on_rcpt
    def rcpt(ctx: Context, recipient: Address, params: Params) -> None: ...

    @app.on_data
    def data(ctx: Context) -> Status:
        return Status.CONTINUE

    client = serve(app).greeted()
    client.mail("<ann>")
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "enter", broken)
        client.rcpt("<bob>")  # no reply is waited for ...
        client.macros(b"R", {})
        client.rcpt("<carl>")
        answer = client.data()  # ... but here
    assert answer is not None
    assert answer.verdict is Verdict.TEMPFAIL


@pytest.mark.parametrize("answer", [0x100 | 5, 0x100 | 7, 0x100 | 99, 0x100 | 255, 4, 1 << 20])
def test_an_answer_that_libmilter_does_not_know_is_a_temporary_failure(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, answer: int
) -> None:
    app = Milter("test")
    app.on_eom(lambda ctx: None)
    monkeypatch.setattr(binding, "_encoded", lambda *arguments: answer)
    client = serve(app).greeted()
    begin_message(client)
    assert send_content(client).answer.verdict is Verdict.TEMPFAIL
    monkeypatch.undo()
    client.quit()
    client.wait_for_close()


def test_what_an_engine_failure_loses_of_the_connection_fails_the_whole_connection(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client and its HELO waited in the log; without them no later message can be judged."""
    app = Milter("test")

    @app.on_mail
    def mail(ctx: Context, sender: Address, params: Params) -> Status:
        return Status.REJECT if ctx.hostname == "spammer.example" else Status.CONTINUE

    client = serve(app).client()
    client.negotiate()
    client.connect_info("spammer.example")
    client.helo()
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "enter", broken)
        first = client.mail("<ann>")
    second = client.mail("<ann>")
    assert [first and first.verdict, second and second.verdict] == [Verdict.TEMPFAIL] * 2


def test_a_failure_of_one_message_does_not_fail_what_is_not_of_it(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = Milter("test")
    app.on_helo(lambda ctx, name: Status.CONTINUE)
    app.on_data(lambda ctx: Status.CONTINUE)
    client = serve(app).greeted()
    client.mail("<ann>")
    client.rcpt("<bob>")
    client.helo()  # the log is read: an engine failure can lose nothing of the connection
    client.mail("<ann>")
    client.rcpt("<bob>")
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "enter", broken)
        assert client.data() is not None
    answer = client.helo()
    assert answer is not None
    assert answer.verdict is Verdict.CONTINUE


def test_an_observer_that_raises_outside_of_a_message_costs_the_next_one_nothing(serve: Serve) -> None:
    app = Milter("test")

    @app.on_unknown
    def observe(ctx: Context, command: str) -> None:
        raise RuntimeError("of no message")

    @app.on_eom
    def at_the_end(ctx: EomContext) -> Status:
        return Status.CONTINUE

    client = serve(app).greeted()
    client.unknown("FOO")
    assert send_message(client).answer.verdict is Verdict.CONTINUE
