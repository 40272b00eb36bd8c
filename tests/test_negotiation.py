# SPDX-License-Identifier: GPL-3.0-or-later
"""The start of a connection: never more than the MTA offers, and no way into libmilter's dead ends."""

import itertools
import logging
from typing import Any

import pytest

from milter import (
    Actions,
    ClientAddress,
    Context,
    EomContext,
    Milter,
    NegotiateContext,
    ProtocolOptions,
    Stage,
    Status,
)
from milter.app import HeaderReplies
from milter.testing import Client, PeerClosed, Verdict
from tests.conftest import Serve, begin_message, send_content, send_message

V2_ACTIONS, V2_STEPS = 0x3F, 0x7F
V3_STEPS = V2_STEPS | ProtocolOptions.NO_UNKNOWN
V4_STEPS = V3_STEPS | ProtocolOptions.NO_DATA


def replying(*arguments: Any) -> Status:
    return Status.CONTINUE


def observing(*arguments: Any) -> None:
    return None


def test_all_offered_actions_are_asked_for(serve: Serve) -> None:
    assert serve(Milter("test")).client().negotiate().actions == 0x1FF


def test_fewer_actions_can_be_asked_for(serve: Serve) -> None:
    app = Milter("test", actions=Actions.ADD_HEADER | Actions.QUARANTINE)
    negotiated = serve(app).client().negotiate()
    assert negotiated.actions == int(Actions.ADD_HEADER | Actions.QUARANTINE | Actions.REQUEST_MACROS)


@pytest.mark.parametrize("offered", [0x01, 0x3F, 0x1FE, 0x100])
def test_no_action_is_asked_for_beyond_the_offer(serve: Serve, offered: int) -> None:
    client = serve(Milter("test")).client()
    assert client.negotiate(actions=offered).actions & ~offered == 0


@pytest.mark.parametrize("steps", [V2_STEPS, V3_STEPS, V4_STEPS, 0x1FFFFF, 0x1])
@pytest.mark.parametrize("version", [2, 3, 4, 5, 6])
def test_a_message_passes_whatever_version_and_steps_the_mta_offers(serve: Serve, version: int, steps: int) -> None:
    app = Milter("test")
    seen: list[str] = []
    for stage in ("connect", "helo", "mail", "rcpt", "data", "header", "eoh", "unknown"):
        getattr(app, f"on_{stage}")(observing)
    app.on_body(lambda ctx, chunk: Status.SKIP)
    app.on_eom(lambda ctx: seen.append("eom"))
    client = serve(app).client()
    negotiated = client.negotiate(version=version, actions=V2_ACTIONS, steps=steps)
    assert negotiated.version == version
    client.connect_info()
    client.helo()
    for _ in range(2):
        assert send_message(client).answer.verdict is Verdict.CONTINUE
    assert seen == ["eom", "eom"]


def test_an_mta_that_offers_nothing_gets_the_filter_it_can_have(serve: Serve) -> None:
    app = Milter("test")
    failures: list[str] = []

    @app.on_eom
    def eom(ctx: EomContext) -> Status:
        try:
            ctx.quarantine("why not")
        except Exception as failure:
            failures.append(str(failure))
        return Status.CONTINUE

    client = serve(app).client()
    client.send(b"O", b"\0\0\0\2" + bytes(8))  # libmilter takes no bits for those of version 1
    assert client.receive().letter == b"O"
    client.connect_info()  # each is answered "continue", since no-reply cannot be had
    client.helo()
    client.send(b"M", b"<ann>\0")
    client.send(b"R", b"<bob>\0")
    client.send(b"E")
    assert [client.receive().letter for _ in range(3)] == [b"c"] * 3
    assert "did not grant" in failures[0]


@pytest.mark.parametrize("version", [0, 1])
def test_a_version_that_is_too_old_ends_the_connection(serve: Serve, version: int) -> None:
    client = serve(Milter("test")).client()
    client.send(b"O", version.to_bytes(4, "big") + bytes(8))
    with pytest.raises(PeerClosed):
        client.receive()


def test_a_newer_version_gets_the_one_that_libmilter_speaks(serve: Serve) -> None:
    assert serve(Milter("test")).client().negotiate(version=7).version == 6


def test_without_required_actions_the_filter_refuses_and_says_why(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    app = Milter("test", requires=Actions.QUARANTINE)
    peer = serve(app)
    with pytest.raises(PeerClosed):
        peer.client().negotiate(actions=Actions.ALL & ~Actions.QUARANTINE)
    assert "does not offer <Actions.QUARANTINE: 32>" in caplog.text
    assert send_message(peer.greeted()).answer.verdict is Verdict.CONTINUE


# ---- on_negotiate


def test_a_handler_sees_the_offer_and_may_take_something_away(serve: Serve) -> None:
    app = Milter("test", leading_space=True, rejected_recipients=True)
    app.on_rcpt(observing)
    offers: list[Any] = []

    @app.on_negotiate
    def negotiate(ctx: NegotiateContext) -> None:
        offers.append((ctx.offered_actions, ProtocolOptions.SKIP in ctx.offered_options, ctx.actions))
        ctx.actions = ctx.actions & ~Actions.QUARANTINE
        ctx.leading_space = False
        ctx.rejected_recipients = False

    peer = serve(app)
    negotiated = peer.client().negotiate()
    assert offers == [(Actions.ALL, True, Actions.ALL & ~Actions.REQUEST_MACROS)]
    assert not negotiated.actions & Actions.QUARANTINE
    assert not negotiated.steps & (ProtocolOptions.LEADING_SPACE | ProtocolOptions.REJECTED_RCPT)


def test_leading_space_and_rejected_recipients_are_asked_for_only_where_offered(serve: Serve) -> None:
    app = Milter("test", leading_space=True, rejected_recipients=True)
    app.on_rcpt(observing)
    both = ProtocolOptions.LEADING_SPACE | ProtocolOptions.REJECTED_RCPT
    peer = serve(app)
    assert peer.client().negotiate().steps & both == int(both)
    assert peer.client().negotiate(steps=0x1FFFFF & ~both).steps & both == 0


def test_what_was_agreed_can_be_read_later(serve: Serve) -> None:
    app = Milter("test", leading_space=True)
    seen: list[Any] = []
    app.on_helo(lambda ctx, name: seen.append((ctx.actions, ProtocolOptions.LEADING_SPACE in ctx.options)))
    peer = serve(app)
    peer.greeted(actions=0x3)
    peer.greeted(steps=0x1FFFFF & ~ProtocolOptions.LEADING_SPACE)
    assert seen == [(Actions.ADD_HEADER | Actions.REPLACE_BODY, True), (Actions.ALL, False)]


def test_a_handler_cannot_ask_for_more(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    app = Milter("test", actions=Actions.ADD_HEADER)

    @app.on_negotiate
    def negotiate(ctx: NegotiateContext) -> None:
        ctx.leading_space = True
        assert not ctx.leading_space
        ctx.actions = Actions.QUARANTINE

    with pytest.raises(PeerClosed):
        serve(app).client().negotiate()
    assert "QUARANTINE: 32> is not among the actions" in caplog.text


def test_a_handler_that_raises_refuses_the_connection_and_no_other(serve: Serve) -> None:
    app = Milter("test")
    calls = itertools.count()

    @app.on_negotiate
    def negotiate(ctx: NegotiateContext) -> None:
        if next(calls) == 0:
            raise RuntimeError("not today")

    peer = serve(app)
    with pytest.raises(PeerClosed):
        peer.client().negotiate()
    peer.client().negotiate()


def test_macros_can_be_asked_for_besides_those_declared(serve: Serve) -> None:
    app = Milter("test")
    app.on_mail(macros=["{client_addr}"])(observing)

    @app.on_negotiate
    def negotiate(ctx: NegotiateContext) -> None:
        ctx.request_macros(Stage.MAIL, ["{client_ptr}"])
        ctx.request_macros(Stage.EOM, ["{nrcpts}"])
        with pytest.raises(ValueError, match="no list for it"):
            ctx.request_macros(Stage.UNKNOWN, ["i"])

    macros = serve(app).client().negotiate().macros
    assert set(macros) == {2, 5}
    assert {"j", "{client_addr}", "{client_ptr}", "{auth_authen}"} <= set(macros[2].split())
    assert {"j", "{nrcpts}", "i"} <= set(macros[5].split())


def test_macros_are_asked_for_only_where_the_mta_takes_lists(serve: Serve) -> None:
    app = Milter("test")
    app.on_mail(macros=["{client_addr}"])(observing)
    peer = serve(app)
    assert peer.client().negotiate(actions=0xFF).macros == {}
    assert set(peer.client().negotiate().macros) == {2}


# ---- Ways through libmilter's table of states


@pytest.mark.parametrize("steps", [V2_STEPS, V3_STEPS])
def test_an_mta_that_sends_no_data_does_not_get_stuck_after_an_unknown_command(serve: Serve, steps: int) -> None:
    app = Milter("test")
    app.on_unknown(replying)
    app.on_header(replying)
    client = serve(app).client()
    client.negotiate(version=3, steps=steps)
    client.connect_info()
    client.helo()
    client.mail("<ann>")
    client.rcpt("<bob>")
    if steps & ProtocolOptions.NO_UNKNOWN:
        assert client.unknown("FOO") is None, "declined, since libmilter would drop the headers after it"
    assert send_content(client).answer.verdict is Verdict.CONTINUE


# ---- SKIP


def test_skip_is_told_to_the_mta_when_all_handlers_of_the_body_have_skipped(serve: Serve) -> None:
    app = Milter("test")
    calls: list[str] = []

    @app.on_body
    def first(ctx: Context, chunk: bytes) -> Status:
        calls.append("first")
        return Status.SKIP

    @app.on_body
    def second(ctx: Context, chunk: bytes) -> Status:
        calls.append("second")
        return Status.SKIP if calls.count("second") == 2 else Status.CONTINUE

    client = serve(app).greeted()
    for _ in range(2):
        calls.clear()
        begin_message(client)
        client.header("Subject", "test")
        client.eoh()
        answers = [client.body(b"x") for _ in range(3)]
        assert [answer and answer.verdict for answer in answers] == [Verdict.CONTINUE, Verdict.SKIP, None]
        assert calls == ["first", "second", "second"]
        client.end_of_message()


def test_skip_where_the_mta_did_not_grant_it_is_continue_and_the_handler_rests(serve: Serve) -> None:
    app = Milter("test")
    calls: list[bytes] = []

    @app.on_body
    def body(ctx: Context, chunk: bytes) -> Status:
        calls.append(chunk)
        return Status.SKIP

    client = serve(app).greeted(steps=0x1FFFFF & ~ProtocolOptions.SKIP)
    begin_message(client)
    client.header("Subject", "test")
    client.eoh()
    for chunk in (b"1", b"2", b"3"):
        answer = client.body(chunk)
        assert answer is not None
        assert answer.verdict is Verdict.CONTINUE
    assert client.end_of_message().answer.verdict is Verdict.CONTINUE
    assert calls == [b"1"]


@pytest.mark.parametrize("replies", ["together", "each"])
def test_skip_of_a_header_is_never_told_and_lasts_for_the_message(serve: Serve, replies: HeaderReplies) -> None:
    app = Milter("test", header_replies=replies)
    names: list[str] = []

    @app.on_header
    def header(ctx: Context, name: str, value: str) -> Status:
        names.append(name)
        return Status.SKIP

    client = serve(app).greeted()
    for _ in range(2):
        begin_message(client)
        for name in ("A", "B"):
            answer = client.header(name, "x")
            assert answer is None if replies == "together" else answer and answer.verdict is Verdict.CONTINUE
        client.eoh()
        client.end_of_message()
    assert names == ["A", "A"]


def test_a_start_and_its_end_are_logged(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="milter"):
        serve(Milter("chatty"))
    assert "chatty is listening on unix:" in caplog.text


def test_a_second_offer_on_a_connection_is_ignored_by_libmilter(serve: Serve) -> None:
    client: Client = serve(Milter("test")).greeted()
    client.send(b"O", b"\0\0\0\6" + b"\0\0\1\xff" + b"\0\x1f\xff\xff")
    assert send_message(client).answer.verdict is Verdict.CONTINUE


def test_bits_that_nobody_knows_are_not_remembered(serve: Serve) -> None:
    """The standard library keeps each combination of flags for ever, and an MTA may offer billions."""
    app = Milter("test")
    offers: list[tuple[Actions, ProtocolOptions]] = []

    @app.on_negotiate
    def negotiate(ctx: NegotiateContext) -> None:
        offers.append((ctx.offered_actions, ctx.offered_options))

    @app.on_connect
    def connect(ctx: Context, hostname: str, address: ClientAddress) -> Status:
        offers.append((ctx.actions, ctx.options))
        return Status.CONTINUE

    peer = serve(app)
    all_known = (1 << 9) - 1, (1 << 21) - 1
    for unknown in range(9, 32):
        client = peer.client()
        client.negotiate(actions=0x1FF | 1 << unknown, steps=0x1FFFFF | 1 << max(unknown, 21))
        client.connect_info()
        assert offers[-2] == all_known
    assert all(int(number) <= known for flags in offers for number, known in zip(flags, all_known, strict=True))
    for flags, known in zip((Actions, ProtocolOptions), all_known, strict=True):
        assert [number for number in flags._value2member_map_ if isinstance(number, int) and number > known] == []


@pytest.mark.parametrize("steps", [0x1FFFFF, 0x7F])
def test_a_handler_sees_whether_refused_recipients_will_be_shown(serve: Serve, steps: int) -> None:
    app = Milter("test", rejected_recipients=True)
    app.on_rcpt(observing)
    seen: list[bool] = []

    @app.on_negotiate
    def negotiate(ctx: NegotiateContext) -> None:
        seen.append(ctx.rejected_recipients)

    serve(app).client().negotiate(steps=steps)
    assert seen == [steps == 0x1FFFFF]
