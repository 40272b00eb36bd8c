# SPDX-License-Identifier: GPL-3.0-or-later
"""Header fields that are answered together, at the end of the header; and one by one, on demand."""

from typing import Any

import pytest

from milter import Context, Milter, Reply, Status
from milter.testing import MTA, Client, Steps, Verdict
from tests.conftest import Serve, begin_message, send_message

NO = Reply(554, "5.7.1", "no such field here")


def deciding(verdicts: dict[str, Any], **options: Any) -> tuple[Milter[Any, Any], list[str]]:
    """A filter with a verdict for each of these fields, and the list of what it was shown."""
    app = Milter("test", **options)
    shown: list[str] = []

    @app.on_header
    def decide(ctx: Context, name: str, value: str) -> Any:
        shown.append(name)
        verdict = verdicts.get(name)
        if isinstance(verdict, Exception):
            raise verdict
        return verdict

    app.on_eoh(lambda ctx: shown.append("eoh"))
    app.on_body(lambda ctx, chunk: shown.append("body"))
    app.on_eom(lambda ctx: shown.append("eom"))
    return app, shown


def say_header(client: Client, *names: str) -> Verdict:
    """The header, of which no field is answered; what its end is answered."""
    begin_message(client)
    for name in names:
        assert client.header(name, "x") is None
    answer = client.eoh()
    assert answer is not None
    return answer.verdict


@pytest.mark.parametrize(
    ("verdict", "told"),
    [
        (Status.REJECT, Verdict.REJECT),
        (Status.TEMPFAIL, Verdict.TEMPFAIL),
        (Status.DISCARD, Verdict.DISCARD),
        (Status.ACCEPT, Verdict.ACCEPT),
        (NO, Verdict.REPLY),
        (ValueError("no verdict"), Verdict.TEMPFAIL),
        ("no verdict", Verdict.TEMPFAIL),
    ],
)
def test_the_first_verdict_is_told_at_the_end_of_the_header_and_nothing_is_called_after_it(
    serve: Serve, verdict: Any, told: Verdict
) -> None:
    app, shown = deciding({"B": verdict, "C": Status.DISCARD})
    client = serve(app).greeted()
    assert say_header(client, "A", "B", "C") is told
    client.abort()
    assert shown == ["A", "B"]
    assert say_header(client, "A") is Verdict.CONTINUE, "the next message is the filter's as usual"
    assert shown == ["A", "B", "A", "eoh"]


def test_a_skip_ends_the_calls_of_one_handler(serve: Serve) -> None:
    app, shown = deciding({"A": Status.SKIP, "B": NO})
    others: list[str] = []
    app.on_header(lambda ctx, name, value: others.append(name))
    assert say_header(serve(app).greeted(), "A", "B") is Verdict.CONTINUE
    assert (shown, others) == (["A", "eoh"], ["A", "B"])


def test_an_observer_sees_the_fields_up_to_the_verdict_of_another_handler(serve: Serve) -> None:
    app = Milter("test")
    shown: list[str] = []

    @app.on_header
    def observe(ctx: Context, name: str, value: str) -> None:
        shown.append(name)

    app.on_header(lambda ctx, name, value: NO if name == "B" else None)
    assert say_header(serve(app).greeted(), "A", "B", "C") is Verdict.REPLY
    assert shown == ["A", "B"]


def test_a_verdict_in_a_header_that_is_too_long_to_wait_is_kept_for_its_end(serve: Serve) -> None:
    """More than 64 KiB are handed to Python before the end of the header."""
    app, shown = deciding({"B": NO})
    client = serve(app).greeted()
    begin_message(client)
    for name in ("A", "B", "C", "D", "E"):
        assert client.header(name, "x" * 30_000) is None
    answer = client.eoh()
    assert answer is not None
    assert (answer.verdict, answer.lines) == (Verdict.REPLY, NO.lines)
    assert shown == ["A", "B"]


def test_a_message_that_is_given_up_within_its_header_leaves_nothing_behind(serve: Serve) -> None:
    app, shown = deciding({"B": NO})
    client = serve(app).greeted()
    begin_message(client)
    client.header("A", "x")
    client.header("B", "x")
    client.abort()
    assert send_message(client).answer.verdict is Verdict.CONTINUE
    assert shown[-3:] == ["eoh", "body", "eom"]


def test_a_message_without_a_header_is_answered_at_its_end(serve: Serve) -> None:
    app, shown = deciding({})
    assert say_header(serve(app).greeted()) is Verdict.CONTINUE
    assert shown == ["eoh"]


def test_without_other_handlers_the_end_of_the_header_is_asked_for_all_the_same(serve: Serve) -> None:
    app = Milter("test")
    app.on_header(lambda ctx, name, value: NO)
    client = serve(app).greeted()
    assert say_header(client, "A") is Verdict.REPLY
    assert say_header(client) is Verdict.CONTINUE, "nothing was refused"


def test_an_mta_that_wants_each_field_answered_is_told_at_the_end_as_well(serve: Serve) -> None:
    """It offers no stage without a reply; libmilter answers "continue" for the fields."""
    app, shown = deciding({"B": NO})
    client = serve(app).client()
    client.negotiate(steps=Steps.SKIP)
    client.connect_info()
    client.helo()
    begin_message(client)
    answers = [client.header("A", "x"), client.header("B", "x"), client.eoh()]
    assert [answer and answer.verdict for answer in answers] == [Verdict.CONTINUE, Verdict.CONTINUE, Verdict.REPLY]
    assert shown == ["A", "B"]


def test_each_field_is_answered_by_itself_on_demand(serve: Serve) -> None:
    app, shown = deciding({"B": NO}, header_replies="each")
    client = serve(app).greeted()
    begin_message(client)
    answers = [client.header("A", "x"), client.header("B", "x")]
    assert [answer and answer.verdict for answer in answers] == [Verdict.CONTINUE, Verdict.REPLY]
    assert shown == ["A", "B"]


@pytest.mark.parametrize("replies", ["together", "each"])
def test_the_result_of_a_message_is_the_same(replies: Any) -> None:
    app, _ = deciding({"Subject": NO}, header_replies=replies)
    with MTA(app) as mta:
        result = mta.send(message=b"From: ann\nSubject: test\n\ntext\n")
        passed = mta.send(message=b"From: ann\n\ntext\n")
    assert (result.reply, passed.accepted) == ("554 5.7.1 no such field here", True)


def test_another_word_is_refused() -> None:
    with pytest.raises(ValueError, match='header_replies must be "together" or "each"'):
        Milter("test", header_replies="never")  # type: ignore[call-overload]
