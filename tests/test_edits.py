# SPDX-License-Identifier: GPL-3.0-or-later
"""Edits of a message become actions, and the actions become what the handler saw, in Postfix and in Sendmail.

The random tests edit a message through its public interface, and beside it a plain list, in the most simple-minded
way. The models of the two MTAs then deliver the message with the actions applied; it must be the list.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from milter.addresses import Address
from milter.edits import Change, Numbering, changes, needed
from milter.message import MemoryContent, Message, freeze
from milter.protocol import Actions
from milter.testing import delivery
from milter.testing.delivery import DeliveryModel, Envelope, Header, Mailbox, Postfix, Sendmail
from milter.testing.wire import Event, Packet, Steps, join_strings, read_event

NUMBERING: dict[type[DeliveryModel], Callable[[], Numbering]] = {
    Postfix: lambda: Numbering.POSTFIX,
    Sendmail: lambda: Numbering.SENDMAIL,
}


# ---- A message as the MTA has it, and as a handler gets it


@dataclass(frozen=True)
class Wire:
    """How values travel: with their leading space or without, and whether the handler wants to see it."""

    space: bool
    seen: bool

    def text_sent(self, header: Header) -> str:
        return header.text if self.space else header.value

    def shown(self, header: Header) -> str:
        return header.text if self.space and self.seen else header.value


WIRES = (Wire(space=True, seen=False), Wire(space=True, seen=True), Wire(space=False, seen=False))


def received(sent: delivery.Message, envelope: Envelope, wire: Wire) -> Message:
    fields = [(encoded(header.name), encoded(wire.text_sent(header))) for header in sent.headers]
    sender, *recipients = (
        Address.from_arguments([mailbox.path, *mailbox.params]) for mailbox in (envelope.sender, *envelope.recipients)
    )
    content = MemoryContent(fields, sent.body)
    return Message(content, sender, recipients, wire_space=wire.space, leading_space=wire.seen)


def encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def event(change: Change) -> Event:
    """The change as the MTA reads it from the wire."""
    arguments = list(change.arguments)
    if change.letter == "b":
        data = arguments[0]
    else:
        index = int(arguments.pop(0)).to_bytes(4, "big") if change.letter in "im" else b""
        data = index + join_strings(*(argument.decode("utf-8", "surrogateescape") for argument in arguments))
    result = read_event(Packet(change.letter.encode(), data))
    assert result is not None
    return result


def delivered(
    mta: DeliveryModel, sent: delivery.Message, envelope: Envelope, sending: Iterable[Change]
) -> delivery.Delivery:
    return mta.deliver(envelope, sent, [event(change) for change in sending])


def mtas(wire: Wire) -> list[DeliveryModel]:
    steps = Steps.LEADING_SPACE if wire.space else 0
    return [Postfix(steps), Sendmail(steps)]


# ---- Random messages and edits

NAMES = ("X-Dup", "x-dup", "X-Dup", "Subject", "Received", "date", "Return-Path", "Resent-From")
TEXTS = (" v", " w", "", " ", "v", "  v", "\tv", " a\n b\n\tc", " caf\u00e9", " \udcff\udce9", "\n v")
VALUES = ("v", "w", "", " v", "\tv", "a\n b\n\tc", "caf\u00e9", "\udcff\udce9")

sent_headers = st.lists(
    st.builds(lambda name, text: Header(f"{name}:{text}"), st.sampled_from(NAMES), st.sampled_from(TEXTS)), max_size=12
)
names, values = st.sampled_from(NAMES), st.sampled_from(VALUES)
header_edits = st.lists(
    st.one_of(
        st.tuples(st.just("set"), names, values),
        st.tuples(st.just("add"), names, values),
        st.tuples(st.just("setdefault"), names, values),
        st.tuples(st.just("insert"), st.integers(0, 13), names, values),
        st.tuples(st.just("replace"), names, st.integers(1, 3), st.none() | values),
        st.tuples(st.just("del"), names),
    ),
    max_size=8,
)


class Field:
    """A field of the plain list; `header`: as received, if it was."""

    def __init__(self, name: str, value: str, header: Header | None = None) -> None:
        self.name, self.value, self.header = name, value, header


def edit_list(fields: list[Field], edit: tuple[Any, ...]) -> None:
    """One edit, as simply as can be. Assumes nothing of how Headers does it."""
    match edit:
        case ("set", name, value):
            named = of_name(fields, name)
            if named:
                named[0].value = value
            else:
                fields.append(Field(name, value))
            fields[:] = [field for field in fields if field not in named[1:]]
        case ("add", name, value):
            fields.append(Field(name, value))
        case ("setdefault", name, value):
            if not of_name(fields, name):
                fields.append(Field(name, value))
        case ("insert", index, name, value):
            fields.insert(index, Field(name, value))
        case ("replace", name, index, None):
            fields.remove(of_name(fields, name)[index - 1])
        case ("replace", name, index, value):
            of_name(fields, name)[index - 1].value = value
        case ("del", name):
            named = of_name(fields, name)
            if not named:
                raise KeyError(name)
            fields[:] = [field for field in fields if field not in named]


def of_name(fields: Sequence[Field], name: str) -> list[Field]:
    return [field for field in fields if field.name.lower() == name.lower()]


def edit_message(message: Message, edit: tuple[Any, ...]) -> None:
    headers = message.headers
    match edit:
        case ("set", name, value):
            headers[name] = value
        case ("add", name, value):
            headers.add(name, value)
        case ("setdefault", name, value):
            headers.setdefault(name, value)
        case ("insert", index, name, value):
            headers.insert(index, name, value)
        case ("replace", name, index, value):
            headers.replace(name, value, index)
        case ("del", name):
            del headers[name]


def edit_both(message: Message, fields: list[Field], edits: Sequence[tuple[Any, ...]]) -> None:
    for edit in edits:
        try:
            edit_list(fields, edit)
        except (IndexError, KeyError):
            with pytest.raises(KeyError):
                edit_message(message, edit)
        else:
            edit_message(message, edit)


# ---- What each MTA makes of it

# Sendmail's configuration has a place for these, above the message's fields.
OWN = ("resent-from", "date")


def expected_everywhere(
    headers: Sequence[Header], wire: Wire, fields: Sequence[Field], result: Sequence[Header]
) -> None:
    """The list itself; and a field that is as it was is as it was byte for byte."""
    assert [(header.name, wire.shown(header)) for header in result] == [(f.name, f.value) for f in fields]
    for header, field in zip(result, fields, strict=True):
        if field.header is not None and field.value == wire.shown(field.header):
            assert header.raw == field.header.raw


def expected_of_sendmail(
    headers: Sequence[Header], wire: Wire, fields: Sequence[Field], result: Sequence[Header]
) -> None:
    """The list without what Sendmail does not print; of each OWN name that was not there one field has moved up."""
    resent = any(header.name.lower().startswith("resent-") for header in headers)
    printed = [f for f in fields if f.name != "Return-Path" and (resent or not f.name.startswith("Resent-"))]
    there = {header.name.lower() for header in headers}
    moved = [name for name in OWN if name not in there and of_name(printed, name)]
    if not moved:
        expected_everywhere(headers, wire, printed, result)
        return
    listed = [(field.name.lower(), field.value) for field in printed]
    got = [(header.name.lower(), wire.shown(header)) for header in result]
    assert any(
        without(listed, chosen) == without(got, slots)
        and all(listed[c] == got[s] for c, s in zip(chosen, slots, strict=True))
        for chosen in choices(listed, moved)
        for slots in choices(got, moved)
        if not any(header is old for header in result[: max(slots)] for old in headers)
    )


def choices(fields: Sequence[tuple[str, str]], keys: Sequence[str]) -> list[tuple[int, ...]]:
    """All ways to choose one field of each name."""
    places = ([place for place, (name, _) in enumerate(fields) if name == key] for key in keys)
    return list(itertools.product(*places))


def without(fields: Sequence[tuple[str, str]], places: Iterable[int]) -> list[tuple[str, str]]:
    left_out = set(places)
    return [field for place, field in enumerate(fields) if place not in left_out]


EXPECTED = {Postfix: expected_everywhere, Sendmail: expected_of_sendmail}
ENVELOPE = Envelope.of("ann@client.example", "bob@mta.example")

random = settings(derandomize=True, deadline=None, max_examples=1000, suppress_health_check=list(HealthCheck))


@random
@given(headers=sent_headers, edits=header_edits, wire=st.sampled_from(WIRES))
def test_the_header_fields_arrive_as_edited(headers: list[Header], edits: list[Any], wire: Wire) -> None:
    sent = delivery.Message(tuple(headers), b"Hello.\r\n")
    message = received(sent, ENVELOPE, wire)
    fields = [Field(header.name, wire.shown(header), header) for header in headers]
    edit_both(message, fields, edits)
    assert message.headers.items() == [(field.name, field.value) for field in fields]
    assert message.headers.raw == tuple((encoded(h.name), encoded(wire.shown(h))) for h in headers)
    for mta in mtas(wire):
        sending = changes(message, NUMBERING[type(mta)])
        result = delivered(mta, sent, ENVELOPE, sending).without_trace()
        EXPECTED[type(mta)](headers, wire, fields, result.headers)
        assert result.body == sent.body


@random
@given(headers=sent_headers, edits=header_edits, wire=st.sampled_from(WIRES))
def test_header_edits_that_are_undone_are_no_edits(headers: list[Header], edits: list[Any], wire: Wire) -> None:
    message = received(delivery.Message(tuple(headers)), ENVELOPE, wire)
    before = message.headers.items()
    edit_both(message, [Field(header.name, wire.shown(header)) for header in headers], edits)
    for name in set(message.headers.keys()):
        if name in message.headers:  # not gone with another spelling
            del message.headers[name]
    for name, value in before:
        message.headers.add(name, value)
    assert message.headers.items() == before
    assert both(message) == ([], [])


def both(message: Message) -> tuple[list[Change], list[Change]]:
    return changes(message, lambda: Numbering.POSTFIX), changes(message, lambda: Numbering.SENDMAIL)


# ---- Envelope and body

ADDRESSES = ("bob@mta.example", "BOB@mta.example", "eve@mta.example", "new@mta.example")
PARAMS = ("", "NOTIFY=NEVER", "NOTIFY=NEVER ORCPT=rfc822;x")
addresses = st.sampled_from(ADDRESSES)
bracketed = st.builds(lambda address, brackets: f"<{address}>" if brackets else address, addresses, st.booleans())
params = st.sampled_from(PARAMS)
mailboxes = st.lists(
    st.builds(lambda address, text: Mailbox(address, tuple(text.split())), addresses, params), max_size=5
)
senders = st.sampled_from(("", "<>", "ann@client.example", "<ann@client.example>", "new@client.example"))
envelope_edits = st.lists(
    st.one_of(
        st.tuples(st.just("add"), bracketed, st.none() | params),
        st.tuples(st.sampled_from(("remove", "discard")), bracketed),
        st.tuples(st.just("sender"), senders),
    ),
    max_size=8,
)


def edit_envelope(message: Message, mailboxes: list[Mailbox], edit: tuple[Any, ...]) -> None:
    """One edit of the message, and of the plain list."""
    kind, argument, *rest = edit
    address = argument.strip("<>")
    same = [mailbox for mailbox in mailboxes if mailbox.address.lower() == address.lower()]
    there = [mailbox for mailbox in same if mailbox.address == address] or same
    match kind:
        case "sender":
            message.sender = argument
        case "add":
            message.recipients.add(argument, *rest)
            if not there:
                mailboxes.append(Mailbox(address, tuple((rest[0] or "").split())))
        case "remove" if not there:
            with pytest.raises(ValueError, match="not among the recipients"):
                message.recipients.remove(argument)
        case "remove" | "discard":
            getattr(message.recipients, kind)(argument)
            mailboxes[:] = [mailbox for mailbox in mailboxes if mailbox not in there]


@random
@given(given_recipients=mailboxes, edits=envelope_edits, old_sender=senders)
def test_the_envelope_arrives_as_edited(given_recipients: list[Mailbox], edits: list[Any], old_sender: str) -> None:
    sent = delivery.Message((), b"Hello.\r\n")
    envelope = Envelope(Mailbox(old_sender.strip("<>"), ("SIZE=100", "ENVID=x")), tuple(given_recipients))
    message = received(sent, envelope, WIRES[0])
    expected = list(given_recipients)
    for edit in edits:
        edit_envelope(message, expected, edit)
    wanted = sorted(map(str, expected))
    assert sorted(" ".join((f"<{r}>", *r.params.raw)) for r in message.recipients) == wanted
    for mta in mtas(WIRES[0]):
        sending = changes(message, NUMBERING[type(mta)])
        result = delivered(mta, sent, envelope, sending).envelope
        assert sorted(map(str, result.recipients)) == wanted
        assert (result.sender.address, result.sender.params) == (message.sender, message.sender.params.raw)
        letters = [change.letter.replace("2", "+") for change in sending]
        assert letters == sorted(letters, key="e-+".index)
        untouched = sorted(map(str, given_recipients)) == wanted and message.sender == envelope.sender.address
        assert bool(sending) is not untouched


@random
@given(
    body=st.lists(st.sampled_from((b"", b"a\r\n", b"a\n", b"\0\xff", b".\r\n"))), new=st.lists(st.binary(max_size=3))
)
def test_the_body_arrives_as_edited(body: list[bytes], new: list[bytes]) -> None:
    sent = delivery.Message((Header("X-Dup: 1"),), delivery.normal_body(b"".join(body)))
    message = received(sent, ENVELOPE, WIRES[0])
    message.body = iter(new)
    assert message.body == b"".join(new)
    for mta in mtas(WIRES[0]):
        sending = changes(message, NUMBERING[type(mta)])
        assert bool(sending) is (message.body != sent.body)
        assert delivered(mta, sent, ENVELOPE, sending).message.body == delivery.normal_body(message.body)
    message.body = sent.body
    assert both(message) == ([], [])


# ---- The fewest actions


def message_of(*fields: str, body: bytes = b"Hello.\r\n", wire: Wire = WIRES[0]) -> Message:
    return received(delivery.Message(tuple(map(Header, fields)), body), ENVELOPE, wire)


def test_nothing_edited_is_nothing_sent() -> None:
    message = message_of("Subject: hello", "X-Dup:1")
    assert both(message) == ([], [])
    list(message.headers), message.recipients[0], message.body, message.email(), message.sender
    assert both(message) == ([], [])
    assert needed([]) == 0


@pytest.mark.parametrize("wire", WIRES, ids=str)
def test_what_is_set_to_what_it_was_is_not_sent(wire: Wire) -> None:
    message = message_of("Subject: hello", "X-Dup:1", "X-Folded: a\n b", "X-Empty:", wire=wire)
    for name, value in message.headers.items():
        message.headers[name] = value
        message.headers.replace(name, "other")
        message.headers.replace(name, value.replace("\n", "\r\n"))
    message.body = b"Hello.\r\n"
    message.sender = "<ann@client.example>"
    message.recipients.add("bob@mta.example")
    assert both(message) == ([], [])


def test_one_edit_is_one_action() -> None:
    message = message_of("Subject: hello", "X-Dup: 1", "x-dup: 2")
    message.headers["subject"] = "new"
    message.headers.replace("X-Dup", None, 2)
    message.headers.add("X-New", "v")
    message.headers.insert(1, "X-Mid", "v")
    message.sender = ""
    message.recipients.remove("<bob@mta.example>")
    message.recipients.add("one@mta.example")
    message.recipients.add("two@mta.example", "NOTIFY=NEVER")
    message.body = [b"one\r\n", b"two\r\n"]
    postfix, sendmail = both(message)
    assert postfix == [
        Change("e", (b"<>",)),
        Change("-", (b"<bob@mta.example>",)),
        Change("+", (b"<one@mta.example>",)),
        Change("2", (b"<two@mta.example>", b"NOTIFY=NEVER")),
        Change("h", (b"X-New", b" v")),
        Change("m", (b"2", b"x-dup", b"")),
        Change("i", (b"2", b"X-Mid", b" v")),
        Change("m", (b"1", b"Subject", b" new")),
        Change("b", (b"one\r\ntwo\r\n",)),
    ]
    assert [a == b for a, b in zip(postfix, sendmail, strict=True)].count(False) == 1
    assert sendmail[6] == Change("i", (b"9", b"X-Mid", b" v"))
    assert needed(postfix) == Actions.ALL & ~Actions.QUARANTINE & ~Actions.REQUEST_MACROS
    assert [change.needs for change in postfix][:2] == [Actions.REPLACE_SENDER, Actions.REMOVE_RECIPIENT]


def test_a_field_deleted_and_made_again_in_its_place_is_changed() -> None:
    message = message_of("A: 1", "X-Dup: 1", "X-Dup: 2", "Subject: s")
    before = message.headers.items()
    for name in ("A", "X-Dup", "Subject"):
        del message.headers[name]
    for name, value in before:
        message.headers.add(name, "new" if value == "2" else value)
    assert both(message) == ([Change("m", (b"2", b"X-Dup", b" new"))],) * 2
    message.headers.replace("X-Dup", None, 1)
    assert both(message) == ([Change("m", (b"2", b"X-Dup", b"")), Change("m", (b"1", b"X-Dup", b" new"))],) * 2


def test_of_the_deleted_fields_the_one_that_is_the_same_is_found_again() -> None:
    message = message_of("X-Dup: 1", "X-Dup: 2", "X-Dup: 3")
    del message.headers["X-Dup"]
    message.headers.add("X-Dup", "3")
    assert both(message) == ([Change("m", (b"2", b"X-Dup", b"")), Change("m", (b"1", b"X-Dup", b""))],) * 2


def test_a_field_of_another_spelling_is_another_field() -> None:
    message = message_of("Subject: s")
    del message.headers["Subject"]
    message.headers.add("SUBJECT", "s")
    postfix, sendmail = both(message)
    assert postfix == [Change("h", (b"SUBJECT", b" s")), Change("m", (b"1", b"Subject", b""))]
    assert sendmail == [Change("i", (b"2147483647", b"SUBJECT", b" s")), Change("m", (b"1", b"Subject", b""))]


def test_sendmail_is_asked_to_insert_where_adding_would_not_be_at_the_end() -> None:
    message = message_of("X-Dup: 1", "From: ann")
    for name in ("X-Dup", "X-New", "x-new", "Received", "From", "Date", "Date"):
        message.headers.add(name, "v")
    postfix, sendmail = both(message)
    assert [change.letter for change in postfix] == ["h"] * 7
    assert [change.letter for change in sendmail] == ["i", "h", "i", "i", "i", "h", "i"]


def test_sendmail_gets_a_date_that_was_missing_in_its_own_place() -> None:
    message = message_of("Subject: s")
    message.headers.insert(0, "Date", "new")
    assert changes(message, lambda: Numbering.SENDMAIL) == [Change("h", (b"Date", b" new"))]
    assert changes(message, lambda: Numbering.POSTFIX) == [Change("i", (b"1", b"Date", b" new"))]


def test_sendmail_counts_from_its_own_received_only_above_the_first_field() -> None:
    message = message_of("A: 1", "B: 2")
    for index in (2, 1, 0):
        message.headers.insert(index, f"X-{index}", "v")
    message.headers.add("C", "3")
    assert [change.arguments[0] for change in changes(message, lambda: Numbering.SENDMAIL)] == [
        b"X-2",
        b"C",
        b"9",
        b"1",
    ]
    assert [change.arguments[0] for change in changes(message, lambda: Numbering.POSTFIX)] == [b"X-2", b"C", b"2", b"1"]


def test_a_list_that_is_the_same_again_is_no_edit() -> None:
    message = message_of("X-Dup: 1", "Subject: s", "X-Dup: 1", "Subject: s")
    message.headers.replace("X-Dup", None)
    message.headers.replace("Subject", None)
    message.headers.add("X-Dup", "1")
    message.headers.add("Subject", "s")
    assert both(message) == ([], [])


def test_a_fold_of_crlf_is_the_same_as_one_of_lf() -> None:
    message = message_of("X-Folded: a\r\n b")
    for value in (message.headers["X-Folded"], "a\n b", "a\r\n b"):
        message.headers["X-Folded"] = value
        assert both(message) == ([], [])


def test_a_recipient_that_the_client_gave_twice_is_removed_once() -> None:
    message = Message(MemoryContent([]), Address(""), [Address("bob@mta.example")] * 2)
    message.recipients.remove("bob@mta.example")
    assert both(message) == ([Change("-", (b"bob@mta.example",))],) * 2


@pytest.mark.parametrize("wire", WIRES[1:], ids=str)
def test_asking_for_the_changes_changes_nothing(wire: Wire) -> None:
    message = message_of("X-A: 1", "Subject: s", "X-B: 2", wire=wire)
    message.headers["Subject"] = ""
    message.headers.insert(1, "X-New", "v")
    first = both(message)
    letters = [(change.letter, change.arguments[-2]) for change in first[0]]
    assert letters == [("m", b"Subject"), ("i", b"Subject"), ("i", b"X-New")]
    assert both(message) == first
    assert message.headers["Subject"] == ""
    assert message.headers.keys() == ["X-A", "X-New", "Subject", "X-B"]


@pytest.mark.parametrize("wire", WIRES, ids=str)
def test_an_empty_value_is_no_deletion(wire: Wire) -> None:
    message = message_of("X-A: 1", "Subject: s", "X-B: 2", wire=wire)
    message.headers["Subject"] = ""
    expected = [Change("m", (b"1", b"Subject", b" "))]
    if wire != WIRES[0]:
        expected = [Change("m", (b"1", b"Subject", b"")), Change("i", (b"2", b"Subject", b""))]
    assert changes(message, lambda: Numbering.POSTFIX) == expected


def test_bytes_that_are_no_utf8_go_back_as_they_came() -> None:
    message = message_of("X-A: \udcff", "X-B: b")
    message.headers["X-B"] = message.headers["X-A"]
    assert changes(message, lambda: Numbering.POSTFIX) == [Change("m", (b"1", b"X-B", b" \xff"))]


def test_a_recipient_is_removed_in_the_form_of_the_client() -> None:
    message = Message(MemoryContent([]), Address(""), [Address.from_arguments(["bob@mta.example"])])
    message.recipients.remove("<bob@mta.example>")
    assert changes(message, lambda: Numbering.SENDMAIL) == [Change("-", (b"bob@mta.example",))]


def test_many_deleted_and_new_fields_are_still_right() -> None:
    fields = [Header(f"X-{number}: v") for number in range(200)]
    sent = delivery.Message(tuple(fields))
    message = received(sent, ENVELOPE, WIRES[0])
    for name in message.headers:
        del message.headers[name]
    for field in fields:
        message.headers.add(field.name, "w")
    for mta in mtas(WIRES[0]):
        result = delivered(mta, sent, ENVELOPE, changes(message, NUMBERING[type(mta)])).without_trace()
        assert [header.raw for header in result.headers] == [f"X-{number}: w" for number in range(200)]


def test_the_changes_can_be_had_before_and_after_the_message_is_frozen() -> None:
    message = message_of("Subject: s")
    message.headers.add("X-New", "v")
    before = both(message)
    freeze(message)
    assert both(message) == before


def test_a_server_that_is_neither_postfix_nor_sendmail_is_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        assert Numbering.of("Postcow\x1b 3.7") is Numbering.SENDMAIL
        for version in ("Postfix 3.10.1", "8.18.1", None):
            Numbering.of(version)
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
        "the mail server calls itself Postcow\\x1b 3.7, not Postfix or Sendmail"
    ]
