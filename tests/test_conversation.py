# SPDX-License-Identifier: GPL-3.0-or-later
"""What the library remembers of a conversation, and that nothing leaks from one message to the next."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from milter import (
    Address,
    ClientAddress,
    Context,
    EomContext,
    InetAddress,
    Milter,
    Params,
    Reply,
    Stage,
    StageError,
    Status,
    UnixAddress,
)
from milter.testing import Answer, Client, PeerClosed, Verdict
from tests.conftest import Serve, begin_message, collect, send_content, send_message


def recorder(app: Milter[Any, Any], *stages: str) -> list[tuple[Any, ...]]:
    """Register a replying handler at each stage, which notes stage and arguments."""
    events: list[tuple[Any, ...]] = []

    def make(stage: str) -> Any:
        def note(ctx: Any, *arguments: Any) -> Status:
            events.append((stage, *arguments))
            return Status.CONTINUE

        return note

    for stage in stages:
        getattr(app, f"on_{stage}")(make(stage))
    return events


def test_the_conversation_is_remembered_without_handlers_of_its_stages(serve: Serve) -> None:
    app = Milter("test")
    seen: list[Any] = []

    @app.on_eom
    def eom(ctx: EomContext) -> Status:
        assert ctx.sender is not None
        seen.append((ctx.hostname, ctx.address, ctx.helo, ctx.sender, ctx.sender.raw, dict(ctx.sender.params)))
        seen.append([(recipient, recipient.raw) for recipient in ctx.recipients])
        return Status.CONTINUE

    client = serve(app).client()
    client.negotiate()
    assert client.connect_info("client.example", "2001:db8::5") is None
    assert client.helo("first") is None
    assert client.helo("second") is None
    assert client.mail("<ann@client.example>", "SIZE=100", "SMTPUTF8") is None
    client.rcpt("<bob@mta.example>")
    client.rcpt("carl@mta.example")
    client.data()
    assert send_content(client).answer.verdict is Verdict.CONTINUE
    assert seen == [
        (
            "client.example",
            InetAddress("2001:db8::5", 0),
            "second",
            "ann@client.example",
            "<ann@client.example>",
            {"SIZE": "100", "SMTPUTF8": None},
        ),
        [("bob@mta.example", "<bob@mta.example>"), ("carl@mta.example", "carl@mta.example")],
    ]


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ("192.0.2.1", InetAddress("192.0.2.1", 0)),
        ("2001:db8::5", InetAddress("2001:db8::5", 0)),
        ("/run/client", UnixAddress("/run/client")),
        (None, None),
    ],
)
def test_each_kind_of_client_address(serve: Serve, told: str | None, expected: ClientAddress) -> None:
    app = Milter("test")
    events = recorder(app, "connect")
    client = serve(app).client()
    client.negotiate()
    client.connect_info("host", told)
    assert events == [("connect", "host", expected)]


def test_bytes_that_are_no_utf_8_arrive_and_can_be_turned_back(serve: Serve) -> None:
    app = Milter("test")
    events = recorder(app, "helo", "mail", "rcpt", "header", "body")
    raw = b"caf\xe9 \xff\x80 \xc3\xa9"
    text = raw.decode("utf-8", "surrogateescape")
    reading = text.replace(" ", ".")  # as Sendmail reads an address
    client = serve(app).client()
    client.negotiate()
    client.connect_info()
    client.helo(text)
    client.mail(f"<{text}>", text)
    client.rcpt(f"<{text}>")
    client.data()
    client.header(text, text + "\n\tfolded ")
    client.eoh()
    client.body(b"\0\xff")
    assert client.end_of_message().answer.verdict is Verdict.CONTINUE
    assert events == [
        ("helo", text),
        ("mail", reading, Params([text])),
        ("rcpt", reading, Params([])),
        ("header", text, text + "\n\tfolded "),
        ("body", b"\0\xff"),
    ]
    assert events[0][1].encode("utf-8", "surrogateescape") == raw


def test_a_refused_recipient_is_not_among_the_recipients(serve: Serve) -> None:
    app = Milter("test")
    before: list[Sequence[Address]] = []
    at_end: list[Sequence[Address]] = []

    @app.on_rcpt
    def rcpt(ctx: Context, recipient: Address, params: Params) -> Status | Reply:
        before.append(ctx.recipients)
        if recipient == "rejected":
            return Status.REJECT
        return Reply(450, None, "later") if recipient == "deferred" else Status.CONTINUE

    @app.on_eom
    def eom(ctx: EomContext) -> None:
        at_end.append(ctx.recipients)

    client = serve(app).greeted()
    client.mail("<>")
    for recipient in ("one", "rejected", "deferred", "two"):
        client.rcpt(f"<{recipient}>")
    client.data()
    send_content(client)
    assert before == [(), ("one",), ("one",), ("one",)]
    assert at_end == [("one", "two")]


def test_the_null_sender_is_an_empty_address(serve: Serve) -> None:
    app = Milter("test")
    events = recorder(app, "mail")
    serve(app).greeted().mail("<>")
    assert events == [("mail", "", Params())]
    assert events[0][1].raw == "<>"


def test_recipients_that_were_kept_do_not_change(serve: Serve) -> None:
    app = Milter("test")
    kept: list[Sequence[Address]] = []

    @app.on_rcpt
    def keep(ctx: Context, recipient: Address, params: object) -> Status:
        kept.append(ctx.recipients)
        return Status.CONTINUE

    client = serve(app).greeted()
    names = [f"{number}@mta.example" for number in range(4)]
    for sender in ("ann", "eve"):
        client.mail(f"<{sender}@client.example>")
        for name in names:
            client.rcpt(f"<{name}>")
        client.abort()
    assert [list(recipients) for recipients in kept] == [names[:number] for number in range(4)] * 2
    three = kept[3]
    assert (three[0], three[-1], three[1:], three[::-1]) == (names[0], names[2], (*names[1:3],), (*names[2::-1],))
    assert names[2] in three
    assert names[3] not in three
    assert names[3] not in list(reversed(three))
    assert three == tuple(names[:3]) == three
    assert three == kept[7]
    assert three != kept[2]
    others: list[Any] = [(*names[:2], names[3]), [], "012", None]
    assert not any(three == other for other in others)
    assert {three} == {kept[7]} == {tuple(names[:3])}
    assert repr(three) == repr(tuple(names[:3]))
    with pytest.raises(IndexError):
        three[3]


def test_recipients_that_the_mta_itself_refuses_are_shown_but_not_remembered(serve: Serve) -> None:
    app = Milter("test", rejected_recipients=True)
    events = recorder(app, "rcpt")
    at_end: list[Sequence[Address]] = []
    app.on_eom(lambda ctx: at_end.append(ctx.recipients))
    client = serve(app).greeted()
    client.mail("<ann>")
    client.macros(b"R", {"{rcpt_mailer}": "error", "{rcpt_host}": "5.1.1"})
    client.rcpt("<nobody>")
    client.macros(b"R", {"{rcpt_mailer}": "smtp", "{rcpt_host}": "mta"})
    client.rcpt("<bob>")
    client.data()
    send_content(client)
    assert [event[1] for event in events] == ["nobody", "bob"]
    assert at_end == [("bob",)]


# ---- State of one's own


@dataclass
class Session:
    messages: int = 0


@dataclass
class Transaction:
    headers: list[str] = field(default_factory=list)


def test_session_state_lives_for_the_connection_and_transaction_state_for_the_message(serve: Serve) -> None:
    app = Milter("test", session=Session, transaction=Transaction)
    seen: list[tuple[int, list[str]]] = []

    @app.on_header
    def header(ctx: Context[Session, Transaction], name: str, value: str) -> None:
        ctx.transaction.headers.append(name)

    @app.on_eom
    def eom(ctx: EomContext[Session, Transaction]) -> Status:
        ctx.session.messages += 1
        seen.append((ctx.session.messages, ctx.transaction.headers))
        return Status.CONTINUE

    client = serve(app).greeted()
    send_message(client)  # no ABORT between two messages, as Sendmail has it
    send_message(client)
    client.abort()  # and with one, as Postfix has it
    send_message(client)
    assert seen == [(1, ["Subject"]), (2, ["Subject"]), (3, ["Subject"])]


@pytest.mark.parametrize("end", ["abort", "helo", "reject", "new mail"])
def test_transaction_state_goes_however_the_message_ends(serve: Serve, end: str) -> None:
    app = Milter("test")
    states: list[dict[str, Any]] = []

    @app.on_mail
    def mail(ctx: Context, sender: Address, params: Params) -> Status:
        states.append(dict(vars(ctx.transaction)))
        ctx.transaction.sender = sender
        return Status.CONTINUE

    @app.on_data
    def data(ctx: Context) -> Status:
        return Status.REJECT if end == "reject" else Status.CONTINUE

    client = serve(app).greeted()
    begin_message(client)
    if end == "abort":
        client.abort()
    elif end == "helo":
        client.helo()
    begin_message(client)
    assert states == [{}, {}]


def test_there_is_no_transaction_outside_a_message(serve: Serve) -> None:
    app = Milter("test")
    failures: list[str] = []

    @app.on_helo
    def helo(ctx: Context, name: str) -> Status:
        assert ctx.sender is None
        assert ctx.recipients == ()
        with pytest.raises(StageError) as caught:
            _ = ctx.transaction
        failures.append(str(caught.value))
        return Status.CONTINUE

    serve(app).greeted()
    assert "begins at on_mail" in failures[0]


def test_objects_of_a_connection_are_dropped_with_it(serve: Serve) -> None:
    import weakref

    class State:
        pass

    app = Milter("test", session=State, transaction=State)
    kept: list[weakref.ref[State]] = []

    @app.on_mail
    def mail(ctx: Context[State, State], sender: Address, params: Params) -> Status:
        kept.extend([weakref.ref(ctx.transaction), weakref.ref(ctx.session)])
        return Status.CONTINUE

    client = serve(app).greeted()
    client.mail("<ann>")
    transaction, session = kept
    client.abort()
    client.unknown("x")  # not sent: it is declined
    client.mail("<bob>")  # answered, so the abort was handled before
    collect()
    assert transaction() is None
    assert session() is not None
    client.quit()
    client.wait_for_close()
    collect()
    assert session() is None


def test_transaction_state_is_dropped_at_once_even_where_no_handler_hears_of_the_end(serve: Serve) -> None:
    import weakref

    class State:
        pass

    app = Milter("test", transaction=State)
    kept: list[weakref.ref[State]] = []

    @app.on_mail
    def mail(ctx: Context[Any, State], sender: Address, params: Params) -> Status:
        kept.append(weakref.ref(ctx.transaction))
        return Status.CONTINUE

    client = serve(app).greeted()
    send_message(client)
    collect()
    assert kept[0]() is None


# ---- Abort and close


def test_abort_is_told_once_for_a_message_that_was_begun_and_never_after_its_end(serve: Serve) -> None:
    app = Milter("test")
    events = recorder(app, "mail", "eom", "abort", "close")
    client = serve(app).greeted()
    client.abort()  # nothing was begun
    client.mail("<one>")
    client.abort()
    client.abort()
    client.abort()
    send_message(client)
    client.abort()
    client.abort()
    client.quit()
    client.wait_for_close()
    assert [event[0] for event in events] == ["mail", "abort", "mail", "eom", "close"]


@pytest.mark.parametrize(
    ("stage", "verdict"),
    [
        ("mail", Status.REJECT),
        ("mail", Status.DISCARD),
        ("rcpt", Status.DISCARD),
        ("rcpt", Status.ACCEPT),
        ("data", Status.TEMPFAIL),
        ("header", Status.ACCEPT),
        ("eoh", Status.REJECT),
        ("body", Status.DISCARD),
        ("eom", Status.REJECT),
    ],
)
def test_abort_is_not_told_for_a_message_that_the_filter_decided(serve: Serve, stage: str, verdict: Status) -> None:
    app = Milter("test")
    getattr(app, f"on_{stage}")(lambda *arguments: verdict)
    events = recorder(app, "abort", "close")
    client = serve(app).greeted()
    send_until_decided(client)
    client.abort()
    client.quit()
    client.wait_for_close()
    assert events == [("close",)]


def send_until_decided(client: Client) -> None:
    steps: list[Callable[[], Answer | None]] = [
        lambda: client.mail("<ann>"),
        lambda: client.rcpt("<bob>"),
        client.data,
        lambda: client.header("Subject", "test"),
        client.eoh,
        lambda: client.body(b"text\r\n"),
        lambda: client.end_of_message().answer,
    ]
    for step in steps:
        answer = step()
        if answer is not None and answer.verdict is not Verdict.CONTINUE:
            return


def test_an_unknown_command_between_does_not_bring_an_abort(serve: Serve) -> None:
    app = Milter("test")
    events = recorder(app, "unknown", "abort")
    client = serve(app).greeted()
    client.unknown("FOO")
    client.abort()
    client.helo()
    assert events == [("unknown", "FOO")]


def test_a_connection_that_drops_in_a_message_is_an_abort_and_a_close(serve: Serve) -> None:
    app = Milter("test")
    events = recorder(app, "data", "abort", "close")
    peer = serve(app)
    client = peer.greeted()
    begin_message(client)  # DATA is answered, so all was read before the connection drops
    client.close()
    peer.server.stop()  # waits for the session
    assert events == [("data",), ("abort",), ("close",)]


def test_a_connection_that_drops_after_an_unknown_command_in_a_message_is_an_abort_too(serve: Serve) -> None:
    app = Milter("test")
    events = recorder(app, "unknown", "abort", "close")
    peer = serve(app)
    client = peer.greeted()
    client.mail("<ann>")
    client.rcpt("<bob>")
    client.unknown("FOO")
    client.close()
    peer.server.stop()
    assert events == [("unknown", "FOO"), ("abort",), ("close",)]


@pytest.mark.parametrize("after", ["mail", "helo"])
def test_an_unknown_command_does_not_hide_that_a_message_was_given_up(serve: Serve, after: str) -> None:
    """libmilter itself forgets there that a message was under way."""
    app = Milter("test")
    seen: list[tuple[str, str | None]] = []
    app.on_unknown(lambda ctx, command: Status.CONTINUE)
    app.on_abort(lambda ctx: seen.append(("abort", ctx.sender)))
    app.on_helo(lambda ctx, name: seen.append(("helo", ctx.sender)))
    client = serve(app).greeted()
    client.mail("<one>")
    client.rcpt("<bob>")
    client.unknown("FOO")
    if after == "mail":
        send_message(client)
    client.helo()
    client.quit()
    client.wait_for_close()
    assert seen == [("helo", None), ("abort", "one"), ("helo", None)]


def test_quit_nc_is_remembered_however_many_other_connections_end(serve: Serve) -> None:
    app = Milter("test")
    events = recorder(app, "connect")
    peer = serve(app)
    client = peer.greeted()
    send_message(client)
    client.quit_nc()
    for _ in range(300):
        other = peer.greeted()
        other.quit()
        other.wait_for_close()
        other.close()
    answer = client.connect_info("again")
    assert answer is not None
    assert events[-1][1] == "again"


def test_close_is_told_even_when_nothing_else_was(serve: Serve) -> None:
    app = Milter("test")
    seen: list[tuple[Any, ...]] = []
    app.on_close(lambda ctx: seen.append((ctx.hostname, ctx.address, ctx.helo, ctx.sender)))
    client = serve(app).client()
    client.negotiate()
    client.quit()
    client.wait_for_close()
    assert seen == [(None, None, None, None)]


def test_contexts_have_numbers_that_are_never_used_twice(serve: Serve) -> None:
    app = Milter("test")
    numbers: list[int] = []
    app.on_connect(lambda ctx, hostname, address: numbers.append(ctx.id))
    peer = serve(app)
    for _ in range(5):
        client = peer.greeted()
        client.quit()
        client.wait_for_close()
    assert len(set(numbers)) == 5


# ---- QUIT_NC: another connection on the same socket


def test_after_quit_nc_a_new_connection_begins_with_what_was_negotiated_and_nothing_else(serve: Serve) -> None:
    app = Milter("test")
    seen: list[Any] = []

    @app.on_connect
    def connect(ctx: Context, hostname: str, address: ClientAddress) -> Status:
        seen.append((ctx.id, hostname, ctx.helo, vars(ctx.session).copy(), int(ctx.actions)))
        ctx.session.host = hostname
        return Status.CONTINUE

    @app.on_eom
    def eom(ctx: EomContext) -> Status:
        ctx.add_header("X-Host", ctx.session.host)
        return Status.CONTINUE

    @app.on_close
    def close(ctx: Context) -> None:
        seen.append((ctx.id, "closed"))

    client = serve(app).client()
    client.negotiate()
    for hostname in ("one", "two", "three"):
        client.connect_info(hostname)
        client.helo()
        end = send_message(client)
        assert [change.value for change in end.changes] == [hostname]  # type: ignore[union-attr]
        client.quit_nc()
    client.close()
    first = seen[0][0]
    assert seen[:5] == [
        (first, "one", None, {}, 0x1FF),
        (first, "closed"),
        (first + 1, "two", None, {}, 0x1FF),
        (first + 1, "closed"),
        (first + 2, "three", None, {}, 0x1FF),
    ]


def test_the_close_after_quit_nc_is_told_once(serve: Serve) -> None:
    app = Milter("test")
    events = recorder(app, "close")
    peer = serve(app)
    client = peer.greeted()
    send_message(client)
    client.quit_nc()
    client.close()
    peer.server.stop()
    assert events == [("close",)]


# ---- A long conversation


def test_many_recipients_that_no_handler_wants_are_remembered_all_the_same(serve: Serve) -> None:
    app = Milter("test")
    seen: list[Sequence[Address]] = []
    app.on_eom(lambda ctx: seen.append(ctx.recipients))
    client = serve(app).greeted()
    client.mail("<ann>")
    recipients = [f"recipient-{number}@mta.example" for number in range(5000)]
    for recipient in recipients:
        client.rcpt(f"<{recipient}>")
    client.data()
    send_content(client)
    assert list(seen[0]) == recipients


def test_messages_that_nobody_wants_leave_nothing_behind(serve: Serve) -> None:
    app = Milter("test")
    seen: list[Any] = []
    app.on_close(lambda ctx: seen.append((ctx.hostname, ctx.sender)))
    client = serve(app).greeted()
    for _ in range(3000):  # some 200 KB of envelopes, more than a log holds
        begin_message(client)
        assert client.end_of_message().answer.verdict is Verdict.CONTINUE
    client.quit()
    client.wait_for_close()
    assert seen == [("client.example", None)]


def test_macros_show_themselves(serve: Serve) -> None:
    app = Milter("test")
    shown: list[str] = []

    @app.on_helo
    def on_helo(ctx: Context, name: str) -> Status:
        shown.append(repr(ctx.macros))
        return Status.CONTINUE

    client = serve(app).client()
    client.negotiate()
    client.connect_info()
    client.macros(b"H", {"j": "mta.example", "{cipher}": "TLS"})
    client.helo()
    assert shown == ["Macros({'j': 'mta.example', '{cipher}': 'TLS'})"]


@pytest.mark.parametrize("sent", [["auth_authen", "tls_version", "{i}"], ["{auth_authen}", "{tls_version}", "i"]])
def test_a_macro_is_found_by_its_name_with_and_without_braces_however_the_mta_has_sent_it(
    serve: Serve, sent: list[str]
) -> None:
    app = Milter("test")
    seen: list[list[str | None]] = []
    names = ["auth_authen", "tls_version", "i", "nothing"]

    @app.on_rcpt(macros=["auth_authen", "{tls_version}", "{i}"])
    def rcpt(ctx: Context, recipient: Address, params: Params) -> Status:
        seen.append([ctx.macros.get(form) for name in names for form in (name, f"{{{name}}}")])
        assert dict(ctx.macros) == {"{auth_authen}": "ann", "{tls_version}": "TLSv1.3", "i": "4bXq"}
        assert ctx.queue_id == "4bXq"
        return Status.CONTINUE

    client = serve(app).greeted()
    pairs = [part for pair in zip(sent, ["ann", "TLSv1.3", "4bXq"], strict=True) for part in pair]
    client.send(b"D", b"M" + "".join(f"{part}\0" for part in pairs).encode())
    client.mail("<ann>")
    client.rcpt("<bob>")
    assert seen == [["ann", "ann", "TLSv1.3", "TLSv1.3", "4bXq", "4bXq", None, None]]


@pytest.mark.parametrize("name", ["auth authen", "{auth_authen", "", "{}", "a,b", "{a}{b}", "ä", None, 5])
def test_a_name_that_no_macro_can_have_is_refused_where_it_is_written(serve: Serve, name: Any) -> None:
    app = Milter("test")
    with pytest.raises(ValueError, match="macro"):
        app.on_rcpt(macros=[name])
    failures: list[str] = []

    @app.on_mail
    def mail(ctx: Context, sender: Address, params: Params) -> Status:
        with pytest.raises(ValueError, match="macro") as caught:
            ctx.macros.get(name)
        failures.append(str(caught.value))
        return Status.CONTINUE

    serve(app).greeted().mail("<ann>")
    assert len(failures) == 1


@pytest.mark.parametrize("names", ["auth_authen", ["auth authen"]])
def test_names_of_macros_that_cannot_be_asked_for_end_the_negotiation(
    serve: Serve, caplog: pytest.LogCaptureFixture, names: Any
) -> None:
    app = Milter("test")
    app.on_negotiate(lambda ctx: ctx.request_macros(Stage.MAIL, names))
    client = serve(app).client()
    with pytest.raises(PeerClosed):
        client.negotiate()
    assert "macro" in caplog.text
