# SPDX-License-Identifier: GPL-3.0-or-later
"""What Postfix and Sendmail deliver after a milter's changes, as both were seen to."""

import pytest

from milter.testing.delivery import (
    DeliveryModel,
    Envelope,
    Header,
    Mailbox,
    Message,
    ModificationError,
    Postfix,
    Sendmail,
    addresses,
)
from milter.testing.wire import (
    AddHeader,
    AddRecipient,
    Answer,
    Command,
    Event,
    InsertHeader,
    Packet,
    Progress,
    Quarantine,
    RemoveRecipient,
    ReplaceBody,
    ReplaceHeader,
    ReplaceSender,
    Steps,
    Verdict,
    read_answer,
)

ENVELOPE = Envelope.of(Mailbox("ann@client.example", ("ENVID=old", "SIZE=100")), "bob@mta.example", "eve@mta.example")
MESSAGE = Message.parse(
    b"From: ann\nTo: bob\nDate: today\nMessage-ID: <1@x>\nSubject: hello\n"
    b"X-Dup: 1\nX-Other: o\nX-Dup: 2\nx-dup: 3\n\nHello.\n"
)
ORIGINAL = ["From", "To", "Date", "Message-ID", "Subject", "X-Dup:1", "X-Other", "X-Dup:2", "x-dup:3"]
BOTH = pytest.mark.parametrize("mta", [Postfix(), Sendmail()], ids=lambda mta: mta.name)


def layout(mta: DeliveryModel, *events: Event) -> list[str]:
    """The delivered headers: names, R for the MTA's own Received, values where they tell fields apart."""
    delivery = mta.deliver(ENVELOPE, MESSAGE, events)
    return ["R" if header is delivery.trace else label(header) for header in delivery.message.headers]


def label(header: Header) -> str:
    known = {"ann", "bob", "today", "<1@x>", "hello", "o"}
    return header.name if header.value in known else f"{header.name}:{header.value}"


def recipients(mta: DeliveryModel, *events: Event) -> list[str]:
    return [str(mailbox) for mailbox in mta.deliver(ENVELOPE, MESSAGE, events).envelope.recipients]


def body(mta: DeliveryModel, *chunks: bytes) -> bytes:
    return mta.deliver(ENVELOPE, MESSAGE, [ReplaceBody(chunk) for chunk in chunks]).message.body


# ---- messages


def test_a_message_is_split_into_fields_and_a_body_with_crlf() -> None:
    message = Message.parse(b"A: 1\r\nB:  2\n\tfold \nX-Space : v\n\n\nline\r\nlast")
    assert [header.raw for header in message.headers] == ["A: 1", "B:  2\n\tfold ", "X-Space : v"]
    assert message.headers[1].value == " 2\n\tfold "
    assert message.headers[2].name == "X-Space"
    assert message.body == b"\r\nline\r\nlast\r\n"


@pytest.mark.parametrize(
    ("data", "fields", "body"),
    [
        (b"", 0, b""),
        (b"A: 1", 1, b""),
        (b"A: 1\n\n", 1, b""),
        (b"A: 1\nno field\nB: 2\n", 1, b"no field\r\nB: 2\r\n"),
        (b" leading fold\nA: 1\n", 0, b" leading fold\r\nA: 1\r\n"),
        (b"\nA: 1\n", 0, b"A: 1\r\n"),
        (b"A: 1\n\na\rb\0\xff\n", 1, b"a\rb\0\xff\r\n"),
        (b"Subj\xc3\xa9ct: x\n", 0, b"Subj\xc3\xa9ct: x\r\n"),
    ],
)
def test_the_first_line_that_is_no_header_begins_the_body(data: bytes, fields: int, body: bytes) -> None:
    message = Message.parse(data)
    assert len(message.headers) == fields
    assert message.body == body


def test_a_mailbox_line_becomes_a_field() -> None:
    message = Message.parse(b"From ann Thu Jan  1 12:00:00 2026\nA: 1\n\nbody\n")
    assert [header.name for header in message.headers] == ["X-Mailbox-Line", "A"]


def test_every_byte_of_a_message_comes_back() -> None:
    data = b"A: \xff\xe4\r\n\tfold\r\nB:\r\n\r\n\x00\xff.\r\n"
    assert Message.parse(data).as_bytes() == data


def test_addresses_lose_brackets_names_and_nothing_else() -> None:
    assert addresses('"Ann, <B>" <ann@x>, bob@x,, <>') == ["ann@x", "bob@x", ""]
    assert addresses('"a b"@x') == ['"a b"@x']
    assert addresses("") == []


# ---- headers


@BOTH
def test_without_changes_the_message_goes_on_below_the_trace(mta: DeliveryModel) -> None:
    delivery = mta.deliver(ENVELOPE, MESSAGE)
    assert layout(mta) == ["R", *ORIGINAL]
    assert delivery.without_trace() == MESSAGE
    assert delivery.envelope == ENVELOPE
    assert delivery.quarantine is None


@BOTH
def test_new_fields_are_added_at_the_end(mta: DeliveryModel) -> None:
    events = [AddHeader(f"X-{number}", "v") for number in range(100)]
    assert layout(mta, *events) == ["R", *ORIGINAL, *(f"X-{number}:v" for number in range(100))]


def test_postfix_adds_a_known_name_at_the_end_sendmail_above_the_first_of_it() -> None:
    events = [AddHeader("X-Dup", "n1"), AddHeader("X-Dup", "n2")]
    assert layout(Postfix(), *events)[-2:] == ["X-Dup:n1", "X-Dup:n2"]
    assert layout(Sendmail(), *events)[6:9] == ["X-Dup:n2", "X-Dup:n1", "X-Dup:1"]


@BOTH
@pytest.mark.parametrize(
    ("indexes", "first"),
    [
        ((0,), ["X-a:v", "R", "From"]),
        ((1,), ["R", "X-a:v", "From"]),
        ((0, 0, 0), ["X-c:v", "X-b:v", "X-a:v", "R"]),
        ((1, 1, 1), ["R", "X-c:v", "X-b:v", "X-a:v", "From"]),
        ((1, 2, 3), ["R", "X-a:v", "X-b:v", "X-c:v", "From"]),
    ],
)
def test_both_insert_alike_above_and_below_the_trace(
    mta: DeliveryModel, indexes: tuple[int, ...], first: list[str]
) -> None:
    events = [InsertHeader(index, f"X-{name}", "v") for index, name in zip(indexes, "abc", strict=False)]
    assert layout(mta, *events)[: len(first)] == first


@pytest.mark.parametrize(
    ("mta", "index", "above"),
    [
        (Postfix(), 2, "To"),
        (Postfix(), 3, "Date"),
        (Sendmail(), 2, "From"),
        (Sendmail(), 8, "From"),
        (Sendmail(), 9, "To"),
        (Sendmail(), 10, "Date"),
        (Sendmail(), 0xFFFFFFFF, "R"),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_each_counts_positions_its_own_way(mta: DeliveryModel, index: int, above: str) -> None:
    fields = layout(mta, InsertHeader(index, "X-New", "v"))
    assert fields[fields.index("X-New:v") + 1] == above


@pytest.mark.parametrize(("mta", "index"), [(Postfix(), 100), (Postfix(), 0xFFFFFFFF), (Sendmail(), 100)])
def test_a_position_beyond_the_last_field_is_the_end(mta: DeliveryModel, index: int) -> None:
    assert layout(mta, InsertHeader(index, "X-New", "v"))[-1] == "X-New:v"


def test_sendmail_drops_an_inserted_return_path_postfix_does_not() -> None:
    event = InsertHeader(1, "Return-Path", "v")
    assert layout(Postfix(), event)[1] == "Return-Path:v"
    assert layout(Sendmail(), event) == ["R", *ORIGINAL]


@pytest.mark.parametrize("name", ["Return-Path", "bcc", "Full-Name", "Content-Length", "Resent-From", "resent-date"])
def test_sendmail_does_not_deliver_some_fields_wherever_they_come_from(name: str) -> None:
    message = Message((Header(f"{name}: 1"), Header("Resent-Other: 2")))
    events = [InsertHeader(1, name, "v"), InsertHeader(100, name, "v")]
    kept = [header.raw for header in Sendmail().deliver(ENVELOPE, message, events).without_trace().headers]
    was_resent = name.lower().startswith("resent-")  # fields of the same kind may then be added
    assert kept == (
        [f"{name}: v", f"{name}: 1", "Resent-Other: 2", f"{name}: v"] if was_resent else ["Resent-Other: 2"]
    )
    assert "Resent-From" not in layout(Sendmail(), InsertHeader(1, "Resent-From", "v"))
    assert len(Postfix().deliver(ENVELOPE, message, events).without_trace().headers) == 4


@pytest.mark.parametrize("index", [0, 1])
def test_a_changed_field_stays_in_its_place_and_only_postfix_takes_the_new_spelling(index: int) -> None:
    event = ReplaceHeader(index, "SUBJECT", "new")
    assert layout(Postfix(), event)[5] == "SUBJECT:new"
    assert layout(Sendmail(), event)[5] == "Subject:new"


@BOTH
def test_fields_of_one_name_are_counted_whatever_their_spelling(mta: DeliveryModel) -> None:
    assert layout(mta, ReplaceHeader(2, "X-Dup", "new"))[8] == "X-Dup:new"


def test_a_change_beyond_the_last_is_a_new_field() -> None:
    event = ReplaceHeader(4, "X-Dup", "new")
    assert layout(Postfix(), event)[-1] == "X-Dup:new"
    assert layout(Sendmail(), event)[6] == "X-Dup:new"


@BOTH
@pytest.mark.parametrize("index", [1, 2])
def test_a_change_of_a_field_that_is_not_there_adds_it_at_the_end(mta: DeliveryModel, index: int) -> None:
    assert layout(mta, ReplaceHeader(index, "X-None", "new")) == ["R", *ORIGINAL, "X-None:new"]


def test_the_highest_index_is_the_end_for_postfix_and_the_first_field_for_sendmail() -> None:
    event = ReplaceHeader(0xFFFFFFFF, "X-Dup", "new")
    assert layout(Postfix(), event)[-1] == "X-Dup:new"
    assert layout(Sendmail(), event)[6] == "X-Dup:new"
    assert "X-Dup:1" not in layout(Sendmail(), event)


@pytest.mark.parametrize(
    ("mta", "indexes", "left"),
    [
        (Postfix(), (1, 2, 3), ["X-Dup:2"]),
        (Postfix(), (3, 2, 1), []),
        (Postfix(), (1, 1, 1), []),
        (Sendmail(), (1, 2, 3), []),
        (Sendmail(), (3, 2, 1), []),
        (Sendmail(), (1, 1, 1), ["X-Dup:2", "x-dup:3"]),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_numbers_move_up_after_a_deletion_in_postfix_only(
    mta: DeliveryModel, indexes: tuple[int, ...], left: list[str]
) -> None:
    events = [ReplaceHeader(index, "X-Dup", "") for index in indexes]
    assert [name for name in layout(mta, *events) if name.lower().startswith("x-dup")] == left


def test_after_a_deletion_the_same_number_is_the_next_field_in_postfix_and_the_old_place_in_sendmail() -> None:
    events = [ReplaceHeader(1, "X-Dup", ""), ReplaceHeader(1, "X-Dup", "new")]
    assert layout(Postfix(), *events)[6:] == ["X-Other", "X-Dup:new", "x-dup:3"]
    assert layout(Sendmail(), *events)[6:] == ["X-Dup:new", "X-Other", "X-Dup:2", "x-dup:3"]


def test_a_field_deleted_and_added_is_at_the_end_in_postfix_and_in_its_place_in_sendmail() -> None:
    events: list[Event] = [ReplaceHeader(1, "Subject", ""), AddHeader("Subject", "new")]
    assert layout(Postfix(), *events)[-1] == "Subject:new"
    assert layout(Sendmail(), *events)[5] == "Subject:new"


@BOTH
def test_deleting_what_is_not_there_does_nothing(mta: DeliveryModel) -> None:
    events = [ReplaceHeader(1, "X-None", ""), ReplaceHeader(4, "X-Dup", ""), ReplaceHeader(1, "Received", "")]
    assert layout(mta, *events) == ["R", *ORIGINAL]


@BOTH
def test_what_was_just_added_can_be_changed_and_deleted(mta: DeliveryModel) -> None:
    added = AddHeader("X-New", "v")
    assert layout(mta, added, ReplaceHeader(1, "X-New", "w")) == ["R", *ORIGINAL, "X-New:w"]
    assert layout(mta, added, ReplaceHeader(1, "X-New", "")) == ["R", *ORIGINAL]


def test_the_trace_cannot_be_changed() -> None:
    event = ReplaceHeader(1, "Received", "new")
    assert layout(Postfix(), event) == ["R", *ORIGINAL, "Received:new"]
    assert layout(Sendmail(), event) == ["Received:new", "R", *ORIGINAL]


def test_sendmail_prints_a_field_of_its_configuration_once_a_milter_adds_it() -> None:
    added = AddHeader("Date", "new")
    assert layout(Sendmail(), added)[:3] == ["R", "Date:new", "From"]
    assert layout(Sendmail(), added, AddHeader("Date", "newer"))[:3] == ["R", "Date:newer", "Date:new"]
    assert layout(Sendmail(), ReplaceHeader(2, "Date", "new"))[:3] == ["R", "Date:new", "From"]


@BOTH
def test_a_space_is_put_before_the_value_unless_leading_space_was_negotiated(mta: DeliveryModel) -> None:
    event = AddHeader("X-New", " v")
    assert mta.deliver(ENVELOPE, MESSAGE, [event]).message.headers[-1].raw == "X-New:  v"
    exact = type(mta)(Steps.LEADING_SPACE)
    assert exact.deliver(ENVELOPE, MESSAGE, [event]).message.headers[-1].raw == "X-New: v"


@BOTH
@pytest.mark.parametrize(
    ("value", "written"),
    [
        ("one\n two", b"one\r\n two"),
        ("one\r\n two", b"one\r\r\n two"),
        ("one\nX-Smuggled: two", b"one\r\nFX-Smuggled: two"),
        ("one\n", b"one\r\nF"),
        ("\udcff", b"\xff"),
    ],
)
def test_no_value_leaves_its_field(mta: DeliveryModel, value: str, written: bytes) -> None:
    delivered = mta.deliver(ENVELOPE, MESSAGE, [AddHeader("X-New", value)]).message.as_bytes()
    due = written.replace(b"F", mta.fold.encode())
    assert b"\r\nX-New: " + due + b"\r\n\r\nHello.\r\n" in delivered


# ---- envelope


@BOTH
@pytest.mark.parametrize("sender", ["new@client.example", "<new@client.example>"])
def test_the_last_new_sender_wins_with_or_without_brackets(mta: DeliveryModel, sender: str) -> None:
    events = [ReplaceSender("<>"), ReplaceSender(sender)]
    delivered = mta.deliver(ENVELOPE, MESSAGE, events).envelope.sender
    assert delivered == Mailbox("new@client.example", ("ENVID=old", "SIZE=100"))
    assert mta.deliver(ENVELOPE, MESSAGE, events[:1]).envelope.sender.path == "<>"


@pytest.mark.parametrize(
    ("mta", "params", "left"),
    [
        (Postfix(), "RET=HDRS envid=new", ("SIZE=100", "RET=HDRS", "envid=new")),
        (Postfix(), "SIZE=5 X=1", ("ENVID=old", "SIZE=100")),
        (Sendmail(), "RET=HDRS ENVID=new", ("RET=HDRS", "ENVID=new")),
        (Sendmail(), "X=1", ()),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_parameters_of_a_new_sender(mta: DeliveryModel, params: str, left: tuple[str, ...]) -> None:
    event = ReplaceSender("<new@client.example>", params)
    assert mta.deliver(ENVELOPE, MESSAGE, [event]).envelope.sender.params == left


@BOTH
@pytest.mark.parametrize("new", ["new@mta.example", "<new@mta.example>", "New <new@mta.example>"])
def test_a_recipient_is_added_once_in_any_form(mta: DeliveryModel, new: str) -> None:
    old = ["<bob@mta.example>", "<eve@mta.example>"]
    assert recipients(mta, AddRecipient(new), AddRecipient(new)) == [*old, "<new@mta.example>"]


def test_a_recipient_that_is_there_is_added_by_postfix_only() -> None:
    event = AddRecipient("bob@mta.example")
    assert recipients(Postfix(), event).count("<bob@mta.example>") == 2
    assert recipients(Sendmail(), event).count("<bob@mta.example>") == 1


def test_of_two_addresses_in_one_postfix_adds_the_first_and_sendmail_both() -> None:
    event = AddRecipient("new@mta.example, two@mta.example")
    assert recipients(Postfix(), event)[2:] == ["<new@mta.example>"]
    assert recipients(Sendmail(), event)[2:] == ["<new@mta.example>", "<two@mta.example>"]


@BOTH
def test_notify_and_orcpt_go_with_a_new_recipient(mta: DeliveryModel) -> None:
    event = AddRecipient("<new@mta.example>", "NOTIFY=NEVER ORCPT=rfc822;x")
    assert recipients(mta, event)[2:] == ["<new@mta.example> NOTIFY=NEVER ORCPT=rfc822;x"]


def test_an_unknown_parameter_is_dropped_by_postfix_and_drops_the_recipient_in_sendmail() -> None:
    event = AddRecipient("<new@mta.example>", "X=1")
    assert recipients(Postfix(), event)[2:] == ["<new@mta.example>"]
    assert recipients(Sendmail(), event)[2:] == []


@BOTH
def test_a_recipient_is_removed_with_or_without_brackets_but_in_the_same_case(mta: DeliveryModel) -> None:
    assert recipients(mta, RemoveRecipient("bob@mta.example")) == ["<eve@mta.example>"]
    assert recipients(mta, RemoveRecipient("<bob@mta.example>")) == ["<eve@mta.example>"]
    assert len(recipients(mta, RemoveRecipient("<BOB@mta.example>"))) == 2
    assert len(recipients(mta, RemoveRecipient("<x@mta.example>"))) == 2


@BOTH
def test_a_recipient_named_twice_is_removed_altogether(mta: DeliveryModel) -> None:
    envelope = Envelope.of("ann@client.example", "bob@mta.example", "bob@mta.example")
    delivery = mta.deliver(envelope, MESSAGE, [RemoveRecipient("bob@mta.example")])
    assert delivery.envelope.recipients == ()


@BOTH
def test_the_last_of_adding_and_removing_a_recipient_counts(mta: DeliveryModel) -> None:
    add, remove = AddRecipient("new@mta.example"), RemoveRecipient("new@mta.example")
    assert "<new@mta.example>" not in recipients(mta, add, remove)
    assert recipients(mta, add, remove, add).count("<new@mta.example>") == 1
    remove_old, add_old = RemoveRecipient("bob@mta.example"), AddRecipient("bob@mta.example")
    assert recipients(mta, remove_old, add_old) == ["<eve@mta.example>", "<bob@mta.example>"]


# ---- body, quarantine


@BOTH
def test_a_new_body_is_its_pieces_joined_with_crlf_line_ends(mta: DeliveryModel) -> None:
    assert body(mta, b"one\ntw", b"o\r", b"\n.\r\n\0\xffx\ry") == b"one\r\ntwo\r\n.\r\n\0\xffx\ry\r\n"
    assert body(mta, b"") == b""
    assert body(mta) == b"Hello.\r\n"


def test_postfix_refuses_anything_between_two_pieces_of_a_body() -> None:
    piece = ReplaceBody(b"x\r\n")
    for between in (Progress(), AddHeader("X-New", "v")):
        events = [piece, between, piece]
        with pytest.raises(ModificationError, match=type(between).__name__) as caught:
            Postfix().deliver(ENVELOPE, MESSAGE, events)
        assert caught.value.reply.startswith("451 4.3.5 ")
        assert Sendmail().deliver(ENVELOPE, MESSAGE, events).message.body == b"x\r\nx\r\n"
    Postfix().deliver(ENVELOPE, MESSAGE, [Progress(), piece, piece, Progress(), AddHeader("X-New", "v")])


def test_a_change_of_a_field_without_a_name_is_refused_by_postfix_and_ignored_by_sendmail() -> None:
    event = ReplaceHeader(1, "", "v")
    with pytest.raises(ModificationError, match="without a name"):
        Postfix().deliver(ENVELOPE, MESSAGE, [event])
    assert layout(Sendmail(), event) == ["R", *ORIGINAL]


@BOTH
def test_the_last_reason_for_quarantine_counts(mta: DeliveryModel) -> None:
    assert mta.deliver(ENVELOPE, MESSAGE, [Quarantine("one"), Quarantine("two")]).quarantine == "two"


# ---- replies


REJECT, TEMPFAIL = Answer(Verdict.REJECT), Answer(Verdict.TEMPFAIL)


@pytest.mark.parametrize(
    ("stage", "answer", "postfix", "sendmail"),
    [
        (Command.CONNECT, REJECT, "550 5.7.1 Command rejected", "550 5.0.0 Command rejected"),
        (Command.MAIL, REJECT, "550 5.7.1 Command rejected", "550 5.7.1 <a@x>... Command rejected"),
        (Command.DATA, REJECT, "550 5.7.1 Command rejected", "550 5.7.1 Command rejected"),
        (Command.BODY, REJECT, "550 5.7.1 Command rejected", "554 5.7.1 Command rejected"),
        (
            Command.RCPT,
            TEMPFAIL,
            "451 4.7.1 Service unavailable - try again later",
            "451 4.3.2 Please try again later",
        ),
    ],
)
def test_each_has_its_own_words_for_a_refusal(stage: Command, answer: Answer, postfix: str, sendmail: str) -> None:
    assert Postfix().reply(stage, answer, "<a@x>") == postfix
    assert Sendmail().reply(stage, answer, "<a@x>") == sendmail


@pytest.mark.parametrize(
    ("stage", "sent", "postfix", "sendmail"),
    [
        (Command.DATA, "550 5.7.1 100%% sure", "550 5.7.1 100% sure", "550 5.7.1 100% sure"),
        (Command.DATA, "550 5.7.1 a %%s b %%%% c", "550 5.7.1 a %s b %% c", "550 5.7.1 a %s b %% c"),
        (Command.DATA, "550 5.7.1 a %s b %d c %n", "550 5.7.1 a s b d c n", "550 5.7.1 Command rejected"),
        (Command.DATA, "550 5.7.1 all%", "550 5.7.1 all", "550 5.7.1 Command rejected"),
        (
            Command.DATA,
            "550-5.7.1 one\r\n550 5.7.1 two",
            "550-5.7.1 one\r\n550 5.7.1 two",
            "550-5.7.1 one\r\n550 5.7.1 two",
        ),
        (Command.DATA, "550 plain", "550 plain", "550 5.0.0 plain"),
        (Command.RCPT, "550 5.7.1 no", "550 5.7.1 no", "550 5.7.1 <a@x>... no"),
        (Command.RCPT, "550 5.7.1", "550 5.7.1", "550 5.7.1 <a@x>... "),
        (Command.MAIL, "450 4.7.1 no", "450 4.7.1 no", "450 4.7.1 <a@x>... no"),
        (Command.RCPT, "553 5.7.1 no", "553 5.7.1 no", "553 5.7.1 <a@x>... no"),
        (Command.RCPT, "552 5.7.1 no", "552 5.7.1 no", "552 5.7.1 no"),
        (Command.CONNECT, "550 5.7.1 no", "550 5.7.1 no", "550 5.0.0 Command rejected"),
        (
            Command.DATA,
            "550 5.7.1 erw\udcc3\udcbcnscht",
            "550 5.7.1 erw\udcc3\udcbcnscht",
            "550 5.7.1 erwC<nscht",
        ),
        (
            Command.DATA,
            "550 4.7.1 no",
            "451 4.3.5 Server configuration problem - try again later",
            "550 4.7.1 no",
        ),
    ],
)
def test_the_words_of_a_milter_reach_the_client(stage: Command, sent: str, postfix: str, sendmail: str) -> None:
    answer = read_answer(Packet(b"y", sent.encode("utf-8", "surrogateescape") + b"\0"))
    assert Postfix().reply(stage, answer, "<a@x>").encode("utf-8", "surrogateescape") == postfix.encode(
        "utf-8", "surrogateescape"
    )
    assert Sendmail().reply(stage, answer, "<a@x>") == sendmail


@BOTH
def test_there_is_no_reply_to_what_is_no_refusal(mta: DeliveryModel) -> None:
    with pytest.raises(ValueError, match="no refusal"):
        mta.reply(Command.DATA, Answer(Verdict.ACCEPT))
