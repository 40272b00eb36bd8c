# SPDX-License-Identifier: GPL-3.0-or-later
"""An MTA that is old, broken or hostile: each connection ends cleanly, and the others never notice."""

import contextlib
import random
from collections.abc import Callable
from typing import Any

import pytest

from milter import (
    Address,
    ClientAddress,
    Context,
    EomContext,
    InetAddress,
    Message,
    Milter,
    Params,
    Reply,
    Status,
    UnixAddress,
)
from milter.libmilter import libmilter
from milter.testing import Client, Packet, PeerClosed, Verdict, WireError
from milter.testing.wire import read_answer
from tests.conftest import Peer, Serve, begin_message, send_content, send_message

needs_redirection = pytest.mark.skipif(
    not libmilter.redirected, reason="libmilter does not say with which packet a piece of the body came"
)

OFFER = Packet(b"O", b"\0\0\0\6" + b"\0\0\1\xff" + b"\0\x1f\xff\xff").encode()

CONVERSATION = [
    (b"O", b"\0\0\0\6" + b"\0\0\1\xff" + b"\0\x1f\xff\xff"),
    (b"D", b"Cj\0mta.example\0"),
    (b"C", b"client.example\x004\x00\x19192.0.2.1\0"),
    (b"H", b"client.example\0"),
    (b"U", b"FOO\0"),
    (b"D", b"Mi\0QID\0"),
    (b"M", b"<ann@client.example>\0SIZE=100\0"),
    (b"R", b"<bob@mta.example>\0"),
    (b"T", b""),
    (b"L", b"Subject\0test\0"),
    (b"N", b""),
    (b"B", b"text\r\n"),
    (b"E", b""),
    (b"A", b""),
    (b"M", b"<ann@client.example>\0"),
    (b"A", b""),
    (b"Q", b""),
]


def everything() -> Milter[Any, Any]:
    """A filter with handlers everywhere, which look at all there is."""
    app = Milter("everything", leading_space=True, rejected_recipients=True, header_replies="each")

    def look(ctx: Context, *arguments: Any) -> Status:
        _ = (ctx.id, ctx.hostname, ctx.address, ctx.helo, ctx.sender, ctx.recipients, dict(ctx.macros), ctx.session)
        return Status.CONTINUE

    for stage in ("connect", "helo", "mail", "rcpt", "data", "header", "eoh", "body", "unknown", "abort", "close"):
        getattr(app, f"on_{stage}")(look if stage not in ("abort", "close") else lambda ctx: look(ctx) and None)

    @app.on_eom
    def eom(ctx: EomContext) -> Status:
        look(ctx)
        ctx.add_header("X-Seen", "yes")
        ctx.replace_body(b"new\r\n")
        ctx.transaction.done = True
        return Status.CONTINUE

    return app


@pytest.fixture
def peer(serve: Serve) -> Peer:
    return serve(everything())


def is_well(peer: Peer) -> bool:
    client = peer.greeted()
    well = send_message(client).answer.verdict is Verdict.CONTINUE
    client.close()
    return well


def read_until_closed(client: Client) -> None:
    def read() -> None:
        while True:
            client.receive()

    with pytest.raises(PeerClosed):
        read()


@pytest.mark.parametrize("count", range(len(CONVERSATION)))
def test_a_connection_may_close_after_each_packet(peer: Peer, count: int) -> None:
    client = peer.client()
    for command, data in CONVERSATION[:count]:
        client.send(command, data)
    client.close()
    assert is_well(peer)


@pytest.mark.parametrize("count", range(1, len(CONVERSATION)))
def test_a_connection_may_close_in_the_middle_of_each_packet(peer: Peer, count: int) -> None:
    stream = b"".join(Packet(command, data).encode() for command, data in CONVERSATION[:count])
    client = peer.client()
    client._socket.sendall(stream[:-1])
    client.close()
    assert is_well(peer)


@pytest.mark.parametrize(
    "garbage",
    [
        b"\0\0\0\0",
        b"\0\0\0\0\0\0\0\0",
        b"\xff\xff\xff\xff\xff",
        b"\x7f\xff\xff\xffO",
        b"\x80\0\0\0O",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"EHLO client.example\r\n",
        b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03",
        b"\0\0\0\1Z",
        b"\0\0\0\1O",
        b"\0\0\0\5O\0\0\0\6",
        b"\0\0\0\1M",
        b"\0\0\0\1K",
    ],
    ids=repr,
)
def test_garbage_instead_of_an_offer_ends_the_connection_or_is_ignored(peer: Peer, garbage: bytes) -> None:
    client = peer.client()
    client._socket.sendall(garbage)
    client._socket.shutdown(1)
    read_until_closed(client)
    assert is_well(peer)


@pytest.mark.parametrize(
    ("command", "data"),
    [
        (b"C", b""),
        (b"C", b"host"),
        (b"C", b"host\0"),
        (b"C", b"host\x004"),
        (b"C", b"host\x004\0\x19"),
        (b"C", b"host\x004\0\x19not an address\0"),
        (b"C", b"host\x006\0\x19192.0.2.1\0"),
        (b"C", b"host\0L\0\0/" + b"x" * 200 + b"\0"),
        (b"C", b"host\0Z\0\x19192.0.2.1\0"),
        (b"M", b""),
        (b"M", b"no final nul"),
        (b"R", b""),
        (b"L", b""),
        (b"L", b"name only\0"),
        (b"L", b"name\0no final nul"),
        (b"D", b""),
        (b"D", b"Z"),
        (b"D", b"Ci"),
        (b"Z", b"unknown command"),
    ],
)
def test_a_malformed_packet_after_the_offer_harms_nobody(peer: Peer, command: bytes, data: bytes) -> None:
    client = peer.client()
    client.send(b"O", b"\0\0\0\6" + b"\0\0\1\xff" + b"\0\x1f\xff\xff")
    client.send(command, data)
    client._socket.shutdown(1)
    read_until_closed(client)
    assert is_well(peer)


LOCAL = b"L\0\0"
INET = b"4\x9c\x40"
INET6 = b"6\x9c\x40"

# What follows the host's name in CONNECT, and what is shown of it.
ADDRESSES: list[tuple[bytes, ClientAddress]] = [
    (INET + b"192.0.2.1\0", InetAddress("192.0.2.1", 40000)),
    (INET6 + b"2001:db8::5\0", InetAddress("2001:db8::5", 40000)),
    (INET6 + b"IPv6:2001:db8::5\0", InetAddress("2001:db8::5", 40000)),
    (INET6 + b"ipv6:::ffff:192.0.2.1\0", InetAddress("::ffff:192.0.2.1", 40000)),
    (LOCAL + b"/run/client\0", UnixAddress("/run/client")),
    (LOCAL + b"x" * 107 + b"\0", UnixAddress("x" * 107)),
    (b"U\0\0\0", None),
    (b"U\x9c\x402001:db8::5\0", None),
    (INET6 + b"::1\0and more\0", InetAddress("::1", 40000)),
    (INET6 + b"2001:db8::5", None),
    (b"U", None),
    # Of Postfix, where a proxy says that it does not know the client:
    (INET + b"unknown\0", None),
    (INET + b"\0", None),
    (INET + b"[192.0.2.1]\0", None),
    (INET + b"192.0.2.256\0", None),
    (INET + b"192.0.2.1:25\0", None),
    (INET + b"2001:db8::5\0", None),
    (INET + b"client.example\0", None),
    (INET6 + b"unknown\0", None),
    (INET6 + b"192.0.2.1\0", None),
    (INET6 + b"fe80::1%eth0\0", None),
    (INET6 + b"[2001:db8::5]\0", None),
    (INET6 + b"IPv6:unknown\0", None),
    (INET6 + b"IPv6:IPv6:2001:db8::5\0", None),
    (LOCAL + b"x" * 108 + b"\0", None),
    (LOCAL + b"x" * 20000 + b"\0", None),
    (b"Z\0\x19192.0.2.1\0", None),
    (b"\0\0\x19192.0.2.1\0", None),
    (b"4", None),
    (b"4\0", None),
    (INET, None),
    (INET + b"192.0.2.1", None),
]


@needs_redirection
@pytest.mark.parametrize("piece", [1, 7, 100_000], ids=lambda size: f"in pieces of {size}")
@pytest.mark.parametrize(("data", "address"), ADDRESSES, ids=lambda value: repr(value)[:40])
def test_a_client_whose_address_cannot_be_read_is_one_of_an_unknown_address(
    serve: Serve, data: bytes, address: ClientAddress, piece: int
) -> None:
    """libmilter would close the connection, and the MTA defer all mail of that client."""
    app = Milter("test")
    seen: list[tuple[str, ClientAddress]] = []

    @app.on_connect
    def connect(ctx: Context, hostname: str, shown: ClientAddress) -> Status:
        seen.append((hostname, shown))
        return Status.CONTINUE

    client = serve(app).client()
    client.negotiate()
    packets = Packet(b"D", b"Cj\0mta.example\0").encode() + Packet(b"C", b"client.example\0" + data).encode()
    for start in range(0, len(packets), max(piece, len(packets) // 100)):
        client._socket.sendall(packets[start : start + max(piece, len(packets) // 100)])
    assert read_answer(client.receive()).verdict is Verdict.CONTINUE
    assert seen == [("client.example", address)]
    assert client.helo() is None  # and what follows is read as it came
    assert send_message(client).answer.verdict is Verdict.CONTINUE


def test_a_packet_over_the_limit_of_the_data_size_ends_the_connection(peer: Peer) -> None:
    client = peer.greeted()
    client.mail("<ann>")
    client.rcpt("<bob>")
    with pytest.raises(WireError):
        client.body(b"v" * 70000)
    assert is_well(peer)


OUT_OF_PLACE = [(b"E", b""), (b"L", b"a\0b\0"), (b"R", b"<bob>\0"), (b"T", b""), (b"N", b""), (b"B", b"x")]


def test_commands_in_an_order_that_no_mta_sends_are_to_be_tried_again(peer: Peer) -> None:
    """libmilter ignores them without an answer; where its system calls are redirected, they get one."""
    client = peer.client()
    client.negotiate()
    for command, data in OUT_OF_PLACE:
        client.send(command, data)
        if libmilter.redirected:
            assert read_answer(client.receive()).verdict is Verdict.TEMPFAIL
    client.send(b"K", b"")
    assert client.helo() is not None
    client.close()
    assert is_well(peer)


def test_commands_out_of_place_of_stages_that_do_not_reply_get_no_answer(serve: Serve) -> None:
    app = Milter("test")
    bodies: list[bytes] = []
    app.on_message(lambda ctx, message: bodies.append(message.body))
    client = serve(app).greeted()
    for command, data in OUT_OF_PLACE[1:]:
        client.send(command, data)
    assert send_message(client).answer.verdict is Verdict.CONTINUE
    if libmilter.redirected:
        client.send(b"E")
        assert read_answer(client.receive()).verdict is Verdict.TEMPFAIL
    assert send_message(client).answer.verdict is Verdict.CONTINUE
    assert bodies == [b"text\r\n"] * 2


@needs_redirection
@pytest.mark.parametrize("end", ["rcpt", "data"])
@pytest.mark.parametrize("state", ["data", "header", "eoh", "body"])
def test_a_message_that_goes_on_after_the_server_has_refused_it_is_to_be_tried_again(
    serve: Serve, state: str, end: str
) -> None:
    """So does Postfix after its smtpd_end_of_data_restrictions: libmilter would ignore it, and Postfix wait."""
    app = everything()
    client = serve(app).greeted()
    begin_message(client)
    steps: list[Callable[[], object]] = [
        lambda: client.header("Subject", "test"),
        client.eoh,
        lambda: client.body(b"text\r\n"),
    ]
    for step in steps[: ("data", "header", "eoh", "body").index(state)]:
        step()
    answers = [client.rcpt("<eve>")] if end == "rcpt" else []
    answers += [client.data(), client.header("Subject", "test")]
    assert {answer and answer.verdict for answer in answers} == {Verdict.TEMPFAIL}
    client.abort()
    assert send_message(client).answer.verdict is Verdict.CONTINUE


def test_a_message_before_any_offer_is_not_accepted(peer: Peer) -> None:
    client = peer.client()
    client.send(b"M", b"<ann>\0")
    client._socket.shutdown(1)
    with contextlib.suppress(PeerClosed):  # or, where an earlier connection left something behind that replies:
        assert client.receive().letter == b"t"
    assert is_well(peer)


def test_an_mta_that_goes_on_after_the_verdict_is_told_to_try_again(serve: Serve) -> None:
    """A DISCARD of a recipient leaves libmilter in the envelope; what comes may be another message."""
    app = Milter("test")
    stages: list[str] = []

    @app.on_rcpt
    def rcpt(ctx: Context, recipient: Address, params: Params) -> Status:
        stages.append("rcpt")
        return Status.DISCARD

    app.on_eoh(lambda ctx: stages.append("eoh"))
    app.on_eom(lambda ctx: stages.append("eom"))
    client = serve(app).greeted()
    client.mail("<ann>")
    answers = [client.rcpt("<bob>"), client.rcpt("<carl>"), client.eoh()]
    assert [answer and answer.verdict for answer in answers] == [Verdict.DISCARD, Verdict.TEMPFAIL, Verdict.TEMPFAIL]
    assert stages == ["rcpt"]


ENVELOPE_AND_CONTENT = ("mail", "rcpt", "data", "header", "eoh", "body", "eom")


ENDS = [
    *[(stage, verdict) for stage in ENVELOPE_AND_CONTENT for verdict in (Status.ACCEPT, Status.DISCARD)],
    *[(stage, verdict) for stage in ENVELOPE_AND_CONTENT for verdict in (Status.REJECT, Status.TEMPFAIL)],
    ("eom", Status.CONTINUE),
]
ENDS = [(stage, verdict) for stage, verdict in ENDS if stage != "rcpt" or verdict in (Status.ACCEPT, Status.DISCARD)]


@pytest.mark.parametrize(("stage", "verdict"), ENDS)
@pytest.mark.parametrize("between", ["nothing", "unknown", "abort", "abort and unknown"])
def test_a_message_that_begins_with_its_recipient_never_gets_the_verdict_of_the_one_before(
    serve: Serve, stage: str, verdict: Status, between: str
) -> None:
    """The server ended the first message by itself, and the filter is told of the second one without MAIL."""
    app = Milter("test")
    seen: list[str] = []

    def judge(ctx: Any, *arguments: Any) -> Status:
        seen.append(str(arguments[0]) if arguments else "")
        return verdict if ctx.sender == "first" else Status.CONTINUE

    for each in (*ENVELOPE_AND_CONTENT, "unknown"):
        getattr(app, f"on_{each}")(judge if each == stage else lambda ctx, *arguments: Status.CONTINUE)
    client = serve(app).greeted()
    steps: list[Callable[[], object]] = [
        lambda: client.mail("<first>"),
        lambda: client.rcpt("<bob>"),
        client.data,
        lambda: client.header("Subject", "test"),
        client.eoh,
        lambda: client.body(b"text\r\n"),
        client.end_of_message,
    ]
    for step in steps[: ENVELOPE_AND_CONTENT.index(stage) + 1]:
        step()
    if "abort" in between:
        client.abort()
    if "unknown" in between:
        client.unknown("FOO")

    for letter, address in (b"R", b"<eve>"), (b"M", b"<second>"), (b"R", b"<carl>"):
        client.send(letter, address + b"\0")
    answers = [read_answer(client.receive()).verdict for _ in range(2)]
    if answers[0] is Verdict.TEMPFAIL:  # else libmilter has ignored it without an answer
        answers = [*answers[1:], read_answer(client.receive()).verdict]
    assert answers == [Verdict.CONTINUE] * 2
    assert "eve" not in seen
    assert send_content(client).answer.verdict is Verdict.CONTINUE


@pytest.mark.parametrize("before", ["accepted", "aborted", "greeted again"])
def test_a_message_without_a_sender_is_not_accepted_with_the_verdict_of_another(serve: Serve, before: str) -> None:
    """libmilter lets a body follow an unknown command anywhere."""
    app = Milter("test")
    app.on_mail(lambda ctx, sender, params: Status.ACCEPT if sender == "friend" else Status.CONTINUE)
    for stage in ("body", "unknown"):
        getattr(app, f"on_{stage}")(lambda ctx, argument: Status.CONTINUE)
    app.on_eom(lambda ctx: Status.CONTINUE)
    client = serve(app).greeted()
    if before == "accepted":
        assert send_message(client).answer.verdict is Verdict.CONTINUE
    else:
        client.mail("<friend>")
    if before == "aborted":
        client.mail("<ann>")
        client.abort()
    if before == "greeted again":
        client.helo()
    client.unknown("FOO")
    answer = client.body(b"text\r\n")
    assert answer is not None
    assert answer.verdict is Verdict.TEMPFAIL


@pytest.mark.parametrize("data", [b"j", b"j\0", b"j\0mta\0i\0", b"\0", b"\0\0\0", b"i\0one\0i\0two\0i\0"], ids=repr)
@pytest.mark.parametrize("stage", b"CHMRTNE", ids=chr)
def test_a_macro_without_a_value_crashes_nobody(peer: Peer, stage: int, data: bytes) -> None:
    """libmilter's own look-up reads past the end of such a list."""
    client = peer.greeted()
    client.send(b"D", bytes([stage]) + data)
    client.mail("<ann>")
    client.send(b"D", bytes([stage]) + data)
    client.rcpt("<bob>")
    client.close()
    assert is_well(peer)


@pytest.mark.parametrize("size", [1, 8, 23, 24, 25, 40, 200, 5000])
def test_an_unknown_command_without_an_end_is_not_read_beyond_it(serve: Serve, size: int) -> None:
    """libmilter hands it on without its length."""
    app = Milter("test")
    commands: list[str] = []
    app.on_unknown(lambda ctx, command: commands.append(command))
    peer = serve(app)
    for _ in range(20):
        client = peer.greeted()
        client.send(b"U", b"x" * size)
        client._socket.shutdown(1)
        with contextlib.suppress(PeerClosed):
            client.receive()
            read_until_closed(client)
    if libmilter.redirected:
        assert commands == []
    # Else only the size of its memory is known.
    assert [command for command in commands if len(command) > size + 24] == []


@needs_redirection
@pytest.mark.parametrize("verdict", [Status.CONTINUE, Status.REJECT, Status.ACCEPT, Reply(550, "5.7.1", "no")], ids=str)
def test_a_piece_of_the_body_with_the_end_of_the_message_is_answered_once(
    serve: Serve, verdict: Status | Reply
) -> None:
    """libmilter would answer for the piece, too, and the MTA take that answer for the next command's."""
    app = Milter("test")
    bodies: list[bytes] = []
    app.on_body(lambda ctx, chunk: verdict)

    @app.on_message
    def message(ctx: EomContext, message: Message) -> Status:
        bodies.append(message.body)
        return Status.CONTINUE

    client = serve(app).greeted()
    begin_message(client)
    client.send(b"E", b"the rest\r\n")
    answer = read_answer(client.receive())
    assert str(answer) == (str(verdict) if isinstance(verdict, Reply) else verdict.name.lower())
    assert bodies == ([b"the rest\r\n"] if verdict is Status.CONTINUE else [])
    client.quit()
    client.wait_for_close()


@needs_redirection
def test_a_piece_of_the_body_with_the_end_of_the_message_is_observed_before_it(serve: Serve) -> None:
    """libmilter would not tell of the end, and leave the MTA waiting."""
    app = Milter("test")
    events: list[bytes] = []

    @app.on_body
    def body(ctx: Context, chunk: bytes) -> None:
        events.append(chunk)

    @app.on_eom
    def eom(ctx: EomContext) -> Status:
        events.append(b"end")
        return Status.REJECT

    client = serve(app).greeted()
    begin_message(client)
    client.send(b"E", b"the rest\r\n")
    assert read_answer(client.receive()).verdict is Verdict.REJECT
    assert events == [b"the rest\r\n", b"end"]


@pytest.mark.parametrize("length", [b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x80\0\0\1"], ids=bytes.hex)
def test_a_length_without_a_meaning_changes_nothing_for_the_packets_after_it(serve: Serve, length: bytes) -> None:
    """libmilter takes it for a packet without data, the end of a message of which there was no beginning."""
    app = Milter("test")
    app.on_body(lambda ctx, chunk: Status.REJECT)
    app.on_eom(lambda ctx: Status.CONTINUE)
    client = serve(app).greeted()
    client._socket.sendall(length + b"E")
    if libmilter.redirected:
        assert read_answer(client.receive()).verdict is Verdict.TEMPFAIL
    begin_message(client)
    client.eoh()
    answer = client.body(b"text\r\n")
    assert answer is not None
    assert answer.verdict is Verdict.REJECT


@pytest.mark.parametrize("seed", range(40))
def test_random_conversations_harm_nobody(peer: Peer, seed: int) -> None:
    choose = random.Random(seed)
    client = peer.client()
    client._socket.sendall(OFFER)
    try:
        for _ in range(60):
            command, data = choose.choice([*CONVERSATION[1:], (b"K", b""), (b"E", b"data at the end")])
            if choose.random() < 0.1:
                data = data[: choose.randrange(len(data) + 1)] + choose.randbytes(choose.randrange(5))
            client.send(command, data)
        client._socket.shutdown(1)
        read_until_closed(client)
    except PeerClosed:
        pass
    assert is_well(peer)
