# SPDX-License-Identifier: GPL-3.0-or-later
"""Actions at the end of a message: what the MTA gets, and what is refused before anything is sent."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from milter import ActionError, Actions, Context, ContextError, EomContext, Milter, StageError, Status
from milter.testing import (
    AddHeader,
    AddRecipient,
    EndOfMessage,
    InsertHeader,
    Quarantine,
    RemoveRecipient,
    ReplaceBody,
    ReplaceHeader,
    ReplaceSender,
    Verdict,
)
from tests.conftest import Serve, begin_message, send_content, send_message

Act = Callable[[EomContext], object]


def at_end(serve: Serve, act: Act, **offer: int) -> EndOfMessage:
    """What comes at the end of a message from a filter that does this."""
    app = Milter("test")

    @app.on_eom
    def eom(ctx: EomContext) -> Status:
        act(ctx)
        return Status.CONTINUE

    return send_message(serve(app).greeted(**offer))


@pytest.mark.parametrize(
    ("act", "sent"),
    [
        (lambda ctx: ctx.add_header("X-A", "b"), AddHeader("X-A", "b")),
        (lambda ctx: ctx.add_header("X-A", ""), AddHeader("X-A", "")),
        (lambda ctx: ctx.add_header("X-A", "one\r\n two\n\tthree"), AddHeader("X-A", "one\n two\n\tthree")),
        (lambda ctx: ctx.add_header("X-A", "é \udcff"), AddHeader("X-A", "é \udcff")),
        (lambda ctx: ctx.insert_header(0, "X-A", "b"), InsertHeader(0, "X-A", "b")),
        (lambda ctx: ctx.insert_header(7, "X-A", "b"), InsertHeader(7, "X-A", "b")),
        (lambda ctx: ctx.replace_header("Subject", 1, "b"), ReplaceHeader(1, "Subject", "b")),
        (lambda ctx: ctx.replace_header("Subject", 2, None), ReplaceHeader(2, "Subject", "")),
        (lambda ctx: ctx.replace_header("Subject", 2, ""), ReplaceHeader(2, "Subject", "")),
        (lambda ctx: ctx.replace_sender("a@b"), ReplaceSender("<a@b>")),
        (lambda ctx: ctx.replace_sender("<a@b>", "RET=HDRS"), ReplaceSender("<a@b>", "RET=HDRS")),
        (lambda ctx: ctx.replace_sender(""), ReplaceSender("<>")),
        (lambda ctx: ctx.replace_sender("<>"), ReplaceSender("<>")),
        (lambda ctx: ctx.add_recipient("a@b"), AddRecipient("<a@b>")),
        (lambda ctx: ctx.add_recipient("<a@b>", "NOTIFY=NEVER"), AddRecipient("<a@b>", "NOTIFY=NEVER")),
        (lambda ctx: ctx.remove_recipient("bob@mta.example"), RemoveRecipient("<bob@mta.example>")),
        (lambda ctx: ctx.remove_recipient("<bob@mta.example>"), RemoveRecipient("<bob@mta.example>")),
        (lambda ctx: ctx.remove_recipient(ctx.recipients[0]), RemoveRecipient("<bob@mta.example>")),
        (lambda ctx: ctx.remove_recipient("other@mta.example"), RemoveRecipient("<other@mta.example>")),
        (lambda ctx: ctx.replace_body(b"new\r\n"), ReplaceBody(b"new\r\n")),
        (lambda ctx: ctx.replace_body(b""), ReplaceBody(b"")),
        (lambda ctx: ctx.replace_body([]), ReplaceBody(b"")),
        (lambda ctx: ctx.replace_body(bytearray(b"a\0b")), ReplaceBody(b"a\0b")),
        (lambda ctx: ctx.append_body_chunk(memoryview(b"abc")[1:]), ReplaceBody(b"bc")),
        (lambda ctx: ctx.quarantine("100% suspicious"), Quarantine("100% suspicious")),
    ],
)
def test_an_action_reaches_the_mta(serve: Serve, act: Act, sent: object) -> None:
    end = at_end(serve, act)
    assert end.changes == (sent,)
    assert end.answer.verdict is Verdict.CONTINUE


def test_a_recipient_is_removed_as_the_client_wrote_it(serve: Serve) -> None:
    app = Milter("test")
    app.on_eom(lambda ctx: ctx.remove_recipient("<bob@mta.example>"))
    client = serve(app).greeted()
    begin_message(client, recipient="bob@mta.example")
    assert send_content(client).changes == (RemoveRecipient("bob@mta.example"),)


def test_actions_arrive_in_the_order_of_their_calls(serve: Serve) -> None:
    def act(ctx: EomContext) -> None:
        ctx.add_header("X-A", "1")
        ctx.replace_body(part for part in (b"one", b"", b"two"))
        ctx.append_body_chunk(b"three")
        ctx.add_header("X-A", "2")

    assert at_end(serve, act).changes == (
        AddHeader("X-A", "1"),
        ReplaceBody(b"one"),
        ReplaceBody(b"two"),
        ReplaceBody(b"three"),
        AddHeader("X-A", "2"),
    )


@pytest.mark.parametrize("size", [65534, 65535, 65536, 3_000_000])
def test_a_large_body_arrives_whole_in_packets_of_the_protocol(serve: Serve, size: int) -> None:
    body = bytes(range(256)) * (size // 256 + 1)
    chunks = [change.chunk for change in at_end(serve, lambda ctx: ctx.replace_body(body[:size])).changes]  # type: ignore[union-attr]
    assert b"".join(chunks) == body[:size]
    assert max(map(len, chunks)) <= 65535


def test_progress_is_shown(serve: Serve) -> None:
    def act(ctx: EomContext) -> None:
        for _ in range(3):
            ctx.signal_progress()

    end = at_end(serve, act)
    assert end.progress == 3
    assert end.changes == ()


# ---- Refused before it is sent


@pytest.mark.parametrize(
    ("act", "kind", "text"),
    [
        (lambda ctx: ctx.add_header("", "v"), ValueError, "name of a header field"),
        (lambda ctx: ctx.add_header("A B", "v"), ValueError, "name of a header field"),
        (lambda ctx: ctx.add_header("A:", "v"), ValueError, "name of a header field"),
        (lambda ctx: ctx.add_header("Ä", "v"), ValueError, "name of a header field"),
        (lambda ctx: ctx.add_header("A\n", "v"), ValueError, "name of a header field"),
        (lambda ctx: ctx.add_header(b"A", "v"), TypeError, "must be a str"),
        (lambda ctx: ctx.add_header("A", b"v"), TypeError, "must be a str"),
        (lambda ctx: ctx.add_header("A", "v\0"), ValueError, "NUL"),
        (lambda ctx: ctx.add_header("A", "v\r"), ValueError, "CR without LF"),
        (lambda ctx: ctx.add_header("A", "v\nB: injected"), ValueError, "begin another field"),
        (lambda ctx: ctx.add_header("A", "v\r\nB: injected"), ValueError, "begin another field"),
        (lambda ctx: ctx.add_header("A", "v\n"), ValueError, "begin another field"),
        (lambda ctx: ctx.add_header("A", "\ud800"), ValueError, "surrogates not allowed"),
        (lambda ctx: ctx.insert_header(-1, "A", "v"), ValueError, "0 or more"),
        (lambda ctx: ctx.insert_header(2**31, "A", "v"), ValueError, "31 bits"),
        (lambda ctx: ctx.insert_header("0", "A", "v"), TypeError, "must be an int"),
        (lambda ctx: ctx.insert_header(0, "A", "v\nB:"), ValueError, "begin another field"),
        (lambda ctx: ctx.replace_header("A", 0, "v"), ValueError, "1 or more"),
        (lambda ctx: ctx.replace_header("A", 1, "v\nB:"), ValueError, "begin another field"),
        (lambda ctx: ctx.replace_header("A", True, "v"), TypeError, "must be an int"),
        (lambda ctx: ctx.replace_sender("a\r\nDATA"), ValueError, "line end"),
        (lambda ctx: ctx.replace_sender("a\0"), ValueError, "NUL"),
        (lambda ctx: ctx.replace_sender("a@x", "RET=HDRS\n"), ValueError, "line end"),
        (lambda ctx: ctx.replace_sender(None), TypeError, "must be a str"),
        (lambda ctx: ctx.add_recipient(""), ValueError, "empty"),
        (lambda ctx: ctx.add_recipient("<>"), ValueError, "empty"),
        (lambda ctx: ctx.add_recipient("Bob <bob@b>"), ValueError, "without a display name"),
        (lambda ctx: ctx.add_recipient("a\n"), ValueError, "line end"),
        (lambda ctx: ctx.remove_recipient("a\0"), ValueError, "NUL"),
        (lambda ctx: ctx.replace_body("text"), TypeError, "encode it first"),
        (lambda ctx: ctx.replace_body(None), TypeError, "not iterable"),
        (lambda ctx: ctx.replace_body(["text"]), TypeError, "must be bytes"),
        (lambda ctx: ctx.append_body_chunk("text"), TypeError, "encode it first"),
        (lambda ctx: ctx.quarantine(""), ValueError, "empty"),
        (lambda ctx: ctx.quarantine("a\nb"), ValueError, "line end"),
        (lambda ctx: ctx.add_header("A", "v" * 65536), ActionError, "65,535 bytes"),
        (lambda ctx: ctx.quarantine("v" * 65536), ActionError, "65,535 bytes"),
        (lambda ctx: ctx.macros["a b"], ValueError, "not the name of a macro"),
        (lambda ctx: ctx.macros["\0"], ValueError, "not the name of a macro"),
        (lambda ctx: ctx.macros["{nothing}"], KeyError, "nothing"),
    ],
)
def test_an_argument_that_would_break_the_message_is_refused_and_nothing_is_sent(
    serve: Serve, act: Act, kind: type[Exception], text: str
) -> None:
    caught: list[BaseException] = []

    def guarded(ctx: EomContext) -> None:
        with pytest.raises(kind, match=text) as info:
            act(ctx)
        caught.append(info.value)

    end = at_end(serve, guarded)
    assert len(caught) == 1
    assert end.events == ()
    assert end.answer.verdict is Verdict.CONTINUE


@pytest.mark.parametrize(
    ("action", "act"),
    [
        (Actions.ADD_HEADER, lambda ctx: ctx.add_header("A", "v")),
        (Actions.ADD_HEADER, lambda ctx: ctx.insert_header(0, "A", "v")),
        (Actions.REPLACE_HEADER, lambda ctx: ctx.replace_header("A", 1, "v")),
        (Actions.REPLACE_SENDER, lambda ctx: ctx.replace_sender("a@x")),
        (Actions.ADD_RECIPIENT, lambda ctx: ctx.add_recipient("a@x")),
        (Actions.ADD_RECIPIENT_EXT, lambda ctx: ctx.add_recipient("a@x", "NOTIFY=NEVER")),
        (Actions.REMOVE_RECIPIENT, lambda ctx: ctx.remove_recipient("a@x")),
        (Actions.REPLACE_BODY, lambda ctx: ctx.replace_body(b"")),
        (Actions.REPLACE_BODY, lambda ctx: ctx.append_body_chunk(b"")),
        (Actions.QUARANTINE, lambda ctx: ctx.quarantine("why")),
    ],
)
def test_an_action_that_the_mta_did_not_grant_is_an_error_that_says_so(serve: Serve, action: Actions, act: Act) -> None:
    def guarded(ctx: EomContext) -> None:
        assert action not in ctx.actions
        with pytest.raises(ActionError, match="did not grant"):
            act(ctx)

    end = at_end(serve, guarded, actions=Actions.ALL & ~action)
    assert end.events == ()
    assert end.answer.verdict is Verdict.CONTINUE


ACTION_NAMES = (
    "add_header",
    "insert_header",
    "replace_header",
    "replace_sender",
    "add_recipient",
    "remove_recipient",
    "replace_body",
    "append_body_chunk",
    "quarantine",
    "signal_progress",
)


@pytest.mark.parametrize("name", ACTION_NAMES)
def test_an_action_outside_the_end_of_message_says_where_it_belongs(serve: Serve, name: str) -> None:
    app = Milter("test")
    failures: list[str] = []

    @app.on_mail
    def mail(ctx: Context, sender: str, params: Any) -> Status:
        assert not hasattr(ctx, name)
        with pytest.raises(StageError) as caught:
            getattr(ctx, name)("A", "v")
        failures.append(str(caught.value))
        with pytest.raises(AttributeError, match="no attribute 'mispelt'"):
            ctx.mispelt  # type: ignore[attr-defined]  # noqa: B018
        return Status.CONTINUE

    answer = serve(app).greeted().mail("<ann>")
    assert answer is not None
    assert answer.verdict is Verdict.CONTINUE
    assert failures == [f"{name}() is possible only at the end of the message, in on_eom, not in on_mail"]


# ---- A body that is interrupted


def test_another_action_between_two_parts_of_the_body_is_noticed_before_postfix_fails_the_message(serve: Serve) -> None:
    def act(ctx: EomContext) -> None:
        ctx.append_body_chunk(b"one")
        ctx.add_header("X-A", "b")
        ctx.append_body_chunk(b"two")

    end = at_end(serve, act)
    assert end.changes == (ReplaceBody(b"one"), AddHeader("X-A", "b"))
    assert end.answer.verdict is Verdict.TEMPFAIL


def test_progress_is_left_out_within_a_new_body(serve: Serve) -> None:
    def act(ctx: EomContext) -> None:
        ctx.signal_progress()
        ctx.append_body_chunk(b"one")
        ctx.signal_progress()
        ctx.append_body_chunk(b"two")

    end = at_end(serve, act)
    assert end.progress == 1
    assert end.changes == (ReplaceBody(b"one"), ReplaceBody(b"two"))
    assert end.answer.verdict is Verdict.CONTINUE


def test_the_next_message_may_have_a_new_body_again(serve: Serve) -> None:
    app = Milter("test")

    @app.on_eom
    def eom(ctx: EomContext) -> None:
        ctx.replace_body(b"one")
        ctx.add_header("X-A", "b")

    client = serve(app).greeted()
    for _ in range(2):
        end = send_message(client)
        assert len(end.changes) == 2
        assert end.answer.verdict is Verdict.CONTINUE


def test_a_second_new_body_is_refused_since_it_would_be_appended(serve: Serve) -> None:
    def act(ctx: EomContext) -> None:
        ctx.replace_body(b"one")
        with pytest.raises(ActionError, match="replaced already"):
            ctx.replace_body(b"two")

    assert at_end(serve, act).changes == (ReplaceBody(b"one"),)


@pytest.mark.parametrize("policy", [Status.TEMPFAIL, Status.ACCEPT, Status.CONTINUE])
@pytest.mark.parametrize("catches", [True, False])
def test_half_a_body_never_passes_whatever_handler_and_policy_say(serve: Serve, catches: bool, policy: Status) -> None:
    app = Milter("test", on_error=policy)

    def parts() -> Iterator[bytes]:
        yield b"one"
        raise OSError("the disk is gone")

    @app.on_eom
    def eom(ctx: EomContext) -> Status:
        try:
            ctx.replace_body(parts())
        except OSError:
            if not catches:
                raise
        return Status.ACCEPT

    client = serve(app).greeted()
    assert send_message(client).answer.verdict is Verdict.TEMPFAIL
    assert send_message(client).answer.verdict is Verdict.TEMPFAIL


# ---- Contexts that are kept


def test_a_context_used_after_its_handler_is_an_exception_whatever_is_asked(serve: Serve) -> None:
    app = Milter("test")
    kept: list[Any] = []
    app.on_helo(lambda ctx, name: kept.append(ctx))
    app.on_eom(lambda ctx: kept.extend([ctx, ctx.macros]))
    app.on_negotiate(lambda ctx: kept.append(ctx))
    client = serve(app).greeted()
    send_message(client)
    negotiation, helo, eom, macros = kept
    uses: list[Callable[[], object]] = [
        lambda: eom.add_header("A", "v"),
        lambda: eom.replace_body(b"x"),
        lambda: eom.signal_progress(),
        lambda: eom.macros["i"],
        lambda: macros["i"],
        lambda: list(macros),
        lambda: helo.hostname,
        lambda: helo.id,
        lambda: helo.session,
        lambda: helo.transaction,
        lambda: helo.recipients,
        lambda: helo.queue_id,
        lambda: helo.actions,
        lambda: helo.add_header,
        lambda: negotiation.actions,
        lambda: negotiation.request_macros,
        lambda: setattr(negotiation, "leading_space", False),
    ]
    for number, use in enumerate(uses):
        if number == 15:  # a bound method may be had; calling it may not
            continue
        with pytest.raises(ContextError, match="after its handler had returned"):
            use()


def test_a_context_kept_from_one_message_cannot_change_the_next(serve: Serve) -> None:
    app = Milter("test")
    kept: list[EomContext] = []

    @app.on_eom
    def eom(ctx: EomContext) -> None:
        for earlier in kept:
            with pytest.raises(ContextError):
                earlier.add_header("X-Wrong", "message")
        kept.append(ctx)

    client = serve(app).greeted()
    for _ in range(3):
        assert send_message(client).events == ()


def test_another_thread_may_act_while_the_handler_runs_and_not_afterwards(serve: Serve) -> None:
    """The call of an action is caught in the middle: it must see the token of the call that is over."""
    app = Milter("test")
    results: list[Any] = []
    inside, outside, over = threading.Event(), threading.Event(), threading.Event()
    workers: list[threading.Thread] = []

    @app.on_eom
    def eom(ctx: EomContext) -> Status:
        call = ctx._call  # past the checks of the context: what a thread holds that has just begun to act

        def work() -> None:
            ctx.add_header("X-Thread", "in time")
            inside.set()
            over.wait()
            uses: list[Callable[[], object]] = [
                lambda: ctx.add_header("X", "y"),
                lambda: call.add_header(b"X", b"y"),
                lambda: call.macro(b"i"),
            ]
            for use in uses:
                try:
                    use()
                except ContextError as failure:
                    results.append(failure)
            outside.set()

        worker = threading.Thread(target=work)
        worker.start()
        workers.append(worker)
        inside.wait()
        return Status.CONTINUE

    client = serve(app).greeted()
    assert send_message(client).changes == (AddHeader("X-Thread", "in time"),)
    over.set()
    outside.wait()
    workers[0].join()
    assert len(results) == 3
    client.quit()
    client.wait_for_close()


# ---- Macros


def test_macros_are_a_mapping_with_or_without_braces(serve: Serve) -> None:
    app = Milter("test")
    seen: list[Any] = []

    @app.on_mail(macros=["{custom}"])
    def mail(ctx: Context, sender: str, params: Any) -> Status:
        macros = ctx.macros
        seen.append([macros["i"], macros["{i}"], macros["{auth_authen}"], macros["auth_authen"], macros["custom"]])
        seen.append([macros.get("{absent}"), "{absent}" in macros, "j" in macros, ctx.queue_id])
        seen.append(dict(macros))
        seen.append(len(macros))
        return Status.CONTINUE

    client = serve(app).greeted()
    long = "x" * 5000
    client.macros(b"M", {"i": "QID", "{auth_authen}": "ann", "{custom}": long, "{other}": "not known"})
    client.mail("<ann>")
    assert seen == [
        ["QID", "QID", "ann", "ann", long],
        [None, False, False, "QID"],
        {"i": "QID", "{auth_authen}": "ann", "{custom}": long},
        3,
    ]


def test_bytes_of_a_macro_that_are_no_utf_8_arrive(serve: Serve) -> None:
    app = Milter("test")
    seen: list[str] = []
    app.on_helo(lambda ctx, name: seen.append(ctx.macros["i"]))
    client = serve(app).client()
    client.negotiate()
    client.connect_info()
    client.send(b"D", b"H" + b"i\0\xff\xe9\0")
    client.helo()
    assert seen == ["\udcff\udce9"]


def test_with_an_always_defined_macro_in_the_list_the_last_messages_macros_are_gone(serve: Serve) -> None:
    app = Milter("test")
    seen: list[str | None] = []

    @app.on_mail(macros=["{auth_authen}"])
    def mail(ctx: Context, sender: str, params: Any) -> Status:
        seen.append(ctx.macros.get("{auth_authen}"))
        return Status.CONTINUE

    client = serve(app).client()
    requested = client.negotiate().macros[2].split()
    client.connect_info()
    client.helo()
    for authenticated in ({"{auth_authen}": "ann"}, {}):
        defined = {"j": "mta.example", **authenticated}
        client.macros(b"M", {name: value for name, value in defined.items() if name in requested})
        client.mail("<ann>")
        client.abort()
    assert seen == ["ann", None]


def test_an_expired_context_does_not_fool_the_tools_of_python(serve: Serve) -> None:
    app = Milter("test")
    kept: list[Any] = []
    app.on_helo(lambda ctx, name: kept.append(ctx))
    serve(app).greeted()
    # Debuggers and copiers ask whatever they meet for such names, and take no other exception for an answer.
    assert not hasattr(kept[0]._call, "__deepcopy__")
