# SPDX-License-Identifier: GPL-3.0-or-later
"""What an MTA holds of a mail, and what it delivers once a milter has spoken.

Values and pure functions: envelopes, messages, and one class per MTA with its rules for applying
changes and for wording refusals. ``client`` sends these envelopes and messages; tests, and
``milter check``, ask here what arrives at the next hop.

`Postfix` and `Sendmail` differ mostly in how they count header fields. Both were observed (Postfix
3.7, Sendmail 8.17); what the observations left open was read in Postfix's cleanup_milter.c and in
Sendmail's milter.c and headers.c. Left out: what neither lets a milter see or change, that is the
fields an MTA adds to an incomplete message, address rewriting, line length limits.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from milter.testing.wire import (
    AddHeader,
    AddRecipient,
    Answer,
    Command,
    Event,
    InsertHeader,
    Quarantine,
    RemoveRecipient,
    ReplaceBody,
    ReplaceHeader,
    ReplaceSender,
    Steps,
    Verdict,
    decode_text,
    encode_text,
)

# ---- what is sent and delivered


@dataclass(frozen=True, slots=True)
class Mailbox:
    """The argument of a MAIL or RCPT command: an address, without its brackets, and ESMTP parameters."""

    address: str
    params: tuple[str, ...] = ()

    @classmethod
    def of(cls, address: "str | Mailbox") -> "Mailbox":
        """A mailbox from an address with or without brackets."""
        return address if isinstance(address, Mailbox) else cls(bare_address(address))

    @property
    def path(self) -> str:
        """The address in brackets, as in the SMTP command (RFC 5321, section 4.1.1)."""
        return f"<{self.address}>"

    def __str__(self) -> str:
        return " ".join((self.path, *self.params))


@dataclass(frozen=True, slots=True)
class Envelope:
    """The sender and the recipients of a message.

    >>> Envelope.of("ann@client.example", "bob@mta.example", "<eve@mta.example>").recipients[1].address
    'eve@mta.example'
    """

    sender: Mailbox
    recipients: tuple[Mailbox, ...]

    @classmethod
    def of(cls, sender: str | Mailbox, *recipients: str | Mailbox) -> "Envelope":
        """An envelope from plain addresses; ``""`` or ``"<>"`` is the null sender."""
        return cls(Mailbox.of(sender), tuple(Mailbox.of(recipient) for recipient in recipients))


@dataclass(frozen=True, slots=True)
class Header:
    """One header field, byte for byte.

    ``raw`` is all of it without the last line end, folds as LF and white space.

    >>> header = Header("Subject:  two\\n words")
    >>> header.name, header.text, header.value
    ('Subject', '  two\\n words', ' two\\n words')
    """

    raw: str

    @property
    def name(self) -> str:
        """The name, without white space before the colon."""
        return self.raw.partition(":")[0].rstrip(" \t")

    @property
    def text(self) -> str:
        """All that follows the colon."""
        return self.raw.partition(":")[2]

    @property
    def value(self) -> str:
        """What follows the colon and one space: what a milter sees, unless it asked for the space."""
        return self.text.removeprefix(" ")


# A header line starts with printable ASCII and a colon (RFC 5322, section 2.2).
HEADER_START = re.compile(rb"[!-9;-~]+[ \t]*:")


@dataclass(frozen=True, slots=True)
class Message:
    """A message: its header fields in order, and its body in bytes with CRLF line ends."""

    headers: tuple[Header, ...]
    body: bytes = b""

    @classmethod
    def parse(cls, data: bytes) -> "Message":
        """Split a message as it lies in a file, with LF or CRLF line ends.

        The first line that is neither a header nor a continuation begins the body; an empty one
        is dropped. A mailbox's ``From `` line becomes ``X-Mailbox-Line``, as with Postfix. A last
        line without its end gets one.

        >>> message = Message.parse(b"Subject: hello\\n world\\n\\nOne\\nTwo")
        >>> message.headers, message.body
        ((Header(raw='Subject: hello\\n world'),), b'One\\r\\nTwo\\r\\n')
        """
        if data.startswith(b"From ") and not HEADER_START.match(data):
            data = b"X-Mailbox-Line: " + data
        raw_headers, body_start = _split_headers(data)
        headers = tuple(Header(decode_text(raw)) for raw in raw_headers)
        return cls(headers, normal_body(data[body_start:]))

    def as_bytes(self) -> bytes:
        """The message as it is sent after DATA, before dots are doubled."""
        fields = b"".join(encode_text(header.raw).replace(b"\n", b"\r\n") + b"\r\n" for header in self.headers)
        return fields + b"\r\n" + self.body


def _split_headers(data: bytes) -> tuple[list[bytes], int]:
    """The raw header fields of a message, and where its body begins."""
    headers: list[bytes] = []
    position = 0
    while position < len(data):
        end = data.find(b"\n", position) + 1 or len(data)
        line = data[position:end].removesuffix(b"\n").removesuffix(b"\r")
        if not line:
            return headers, end
        if line[:1] in b" \t" and headers:
            headers[-1] += b"\n" + line
        elif HEADER_START.match(line):
            headers.append(line)
        else:
            break
        position = end
    return headers, position


def normal_body(body: bytes) -> bytes:
    """``body`` with CRLF for each LF, and for a missing last line end; a lone CR stays."""
    body = re.sub(rb"(?<!\r)\n", b"\r\n", body)
    return body if not body or body.endswith(b"\r\n") else body + b"\r\n"


_ADDRESS_PART = re.compile(r'(?:"(?:\\.|[^"\\])*"|<[^<>]*>|[^,"<]|["<])+', re.DOTALL)


def addresses(text: str) -> list[str]:
    """The addresses in ``text``, without brackets and display names.

    >>> addresses('"Ann, B" <ann@client.example>, bob@client.example')
    ['ann@client.example', 'bob@client.example']
    """
    parts = (part.strip() for part in _ADDRESS_PART.findall(text))
    return [bare_address(part) for part in parts if part]


def bare_address(text: str) -> str:
    """An address without its brackets and without what stands before them."""
    text = text.strip()
    return text[text.rfind("<") + 1 : -1] if text.endswith(">") and "<" in text else text


# ---- what comes of it


class ModificationError(Exception):
    """The MTA does not accept these changes, and refuses the message. ``reply``: what its client is told."""

    def __init__(self, explanation: str, reply: str) -> None:
        super().__init__(explanation)
        self.reply = reply


@dataclass(frozen=True, slots=True)
class Delivery:
    """What goes on to the next hop.

    ``quarantine`` is the reason why it is held instead, or None. A delivery without recipients goes
    nowhere, although the client was told 250. The MTA's own Received field is among the headers;
    `without_trace` leaves it out.
    """

    envelope: Envelope
    message: Message
    quarantine: str | None
    trace: Header = field(repr=False)

    def without_trace(self) -> Message:
        """The message without the MTA's own Received field."""
        return replace(self.message, headers=tuple(h for h in self.message.headers if h is not self.trace))


DEFAULT_TRACE = "Received: from client.example (client.example [192.0.2.1])\n\tby mta.example"


class DeliveryModel(ABC):
    """How one kind of MTA takes a milter's answers and changes; its subclasses say where they differ."""

    name: str
    """The MTA's name."""

    accepted: str
    """What the client is told of a message that was taken; ``{}`` is the MTA's name of it."""

    fold: str
    """What is put behind a line end in a header value that no white space follows."""

    sender_params: tuple[str, ...] = ("ENVID", "RET")
    """The ESMTP parameters a milter can give with a new sender (RFC 3461)."""

    recipient_params: tuple[str, ...] = ("NOTIFY", "ORCPT")
    """The ESMTP parameters a milter can give with a new recipient (RFC 3461)."""

    def __init__(self, steps: int = 0, trace: str = DEFAULT_TRACE) -> None:
        """``steps``: as negotiated. ``trace``: the MTA's own Received field, without the last line end."""
        self._separator = ":" if steps & Steps.LEADING_SPACE else ": "
        self._trace = Header(trace)

    def deliver(self, envelope: Envelope, message: Message, events: Iterable[Event] = ()) -> Delivery:
        """Apply what a milter sent at the end of a message, in order.

        ``envelope``: with the recipients that were not refused. The verdict is not looked at: of a
        message that is refused or discarded nothing is delivered, whatever was changed.

        Raises `ModificationError` where the MTA refuses the message because of the changes.
        """
        events = list(events)
        self.check(events)
        quarantines = [event.reason for event in events if isinstance(event, Quarantine)]
        changed = Message(self.change_headers(message.headers, events), _changed_body(message.body, events))
        return Delivery(
            self._change_envelope(envelope, events),
            changed,
            quarantines[-1] if quarantines else None,
            self._trace,
        )

    def reply(self, stage: Command, answer: Answer, address: str = "") -> str:
        """What the SMTP client is told when a milter refuses at this stage; lines end in CRLF but the last.

        A refusal at CONNECT and HELO is told at the MAIL command. ``address``: of the MAIL or RCPT
        command, in brackets. Raises `ValueError` if the answer is no refusal.
        """
        if not (answer.rejects or answer.tempfails):
            raise ValueError(f"{answer.verdict.value} is no refusal")
        if answer.verdict is Verdict.REPLY:
            return self.own_reply(stage, answer, address)
        return self.default_reply(stage, answer, address)

    def check(self, events: Sequence[Event]) -> None:  # noqa: B027 (most MTAs take any order)
        """Raise `ModificationError` if the MTA refuses these changes, in this order."""

    @abstractmethod
    def change_headers(self, headers: Sequence[Header], events: Sequence[Event]) -> tuple[Header, ...]:
        """The headers as delivered, the MTA's own among them."""

    @abstractmethod
    def new_sender(self, old: Mailbox, event: ReplaceSender) -> Mailbox:
        """The sender after a change."""

    @abstractmethod
    def add_recipient(self, recipients: list[Mailbox], event: AddRecipient, added: set[Mailbox]) -> None:
        """Add to the recipients in place. ``added``: what milters added so far, to be kept up to date."""

    @abstractmethod
    def own_reply(self, stage: Command, answer: Answer, address: str) -> str:
        """What the client is told for a reply with a text of the milter's."""

    @abstractmethod
    def default_reply(self, stage: Command, answer: Answer, address: str) -> str:
        """What the client is told for REJECT or TEMPFAIL."""

    def write(self, name: str, value: str) -> Header:
        """A header field as the MTA writes it for a milter.

        Value lines stay folded, whatever follows a line end; a CR before it is kept, and delivered
        as CR CR LF.
        """
        return Header(f"{name}{self._separator}" + re.sub(r"\n(?![ \t])", f"\n{self.fold}", value))

    def _change_envelope(self, envelope: Envelope, events: Sequence[Event]) -> Envelope:
        sender, recipients = envelope.sender, list(envelope.recipients)
        added: set[Mailbox] = set()
        for event in events:
            match event:
                case ReplaceSender():
                    sender = self.new_sender(sender, event)
                case AddRecipient():
                    self.add_recipient(recipients, event, added)
                case RemoveRecipient(recipient):
                    # The case must match in both MTAs; one that is there twice goes altogether.
                    gone = bare_address(recipient)
                    recipients = [mailbox for mailbox in recipients if mailbox.address != gone]
                    added = {mailbox for mailbox in added if mailbox.address != gone}
        return Envelope(sender, tuple(recipients))


def _changed_body(body: bytes, events: Sequence[Event]) -> bytes:
    chunks = [event.chunk for event in events if isinstance(event, ReplaceBody)]
    return normal_body(b"".join(chunks)) if chunks else body


def _known(params: str | None, keywords: tuple[str, ...]) -> tuple[str, ...]:
    """The parameters in ``params`` that have one of the keywords, in any case."""
    return tuple(param for param in (params or "").split() if _keyword(param) in keywords)


def _keyword(param: str) -> str:
    return param.partition("=")[0].upper()


# ---- Postfix


class Postfix(DeliveryModel):
    """The rules of Postfix.

    - Positions for inserting count the MTA's own Received as 0: 0 is above it, 1 below it. A
      position beyond the last field is the end.
    - Numbers for changing count the fields of that name from 1 (0 is 1), without the MTA's own
      Received, and move up after a deletion. Beyond the last, a field is added at the end.
    - A changed field has its name as the milter spelled it.
    """

    name = "Postfix"
    accepted = "250 2.0.0 Ok: queued as {}"
    fold = "\t"

    def check(self, events: Sequence[Event]) -> None:
        """Refuse what Postfix does: a body in pieces with something between them, a change without a name."""
        if any(isinstance(event, ReplaceHeader) and not event.name for event in events):
            raise ModificationError("a header without a name was to be changed", POSTFIX_MISCONFIGURED)
        bodies = [position for position, event in enumerate(events) if isinstance(event, ReplaceBody)]
        if bodies and bodies[-1] - bodies[0] >= len(bodies):
            between = next(event for event in events[bodies[0] :] if not isinstance(event, ReplaceBody))
            raise ModificationError(
                f"{type(between).__name__} between two pieces of a new body: "
                "Postfix takes the pieces only one right after the other",
                POSTFIX_MISCONFIGURED,
            )

    def change_headers(self, headers: Sequence[Header], events: Sequence[Event]) -> tuple[Header, ...]:
        """Apply the changes to one list, with the MTA's own Received in it."""
        fields = [self._trace, *headers]
        for event in events:
            match event:
                case AddHeader(name, value):
                    fields.append(self.write(name, value))
                case InsertHeader(index, name, value):
                    fields.insert(index, self.write(name, value))
                case ReplaceHeader(index, name, value):
                    self._replace(fields, index, name, value)
        return tuple(fields)

    def _replace(self, fields: list[Header], index: int, name: str, value: str) -> None:
        wanted = name.lower()
        places = [
            place for place, header in enumerate(fields) if header is not self._trace and header.name.lower() == wanted
        ]
        number = max(index, 1)
        if number > len(places):
            fields.extend([self.write(name, value)] if value else [])
        elif value:
            fields[places[number - 1]] = self.write(name, value)
        else:
            del fields[places[number - 1]]

    def new_sender(self, old: Mailbox, event: ReplaceSender) -> Mailbox:
        """The first address; parameters that Postfix knows replace the old ones, others are ignored."""
        new = _known(event.params, self.sender_params)
        replaced = {_keyword(param) for param in new}
        kept = tuple(param for param in old.params if _keyword(param) not in replaced)
        return Mailbox((addresses(event.sender) or [""])[0], kept + new)

    def add_recipient(self, recipients: list[Mailbox], event: AddRecipient, added: set[Mailbox]) -> None:
        """The first address, even if the client named it too, but not if a milter added it before."""
        for address in addresses(event.recipient)[:1]:
            mailbox = Mailbox(address, _known(event.params, self.recipient_params))
            if address and mailbox not in added:
                added.add(mailbox)
                recipients.append(mailbox)

    def own_reply(self, stage: Command, answer: Answer, address: str) -> str:
        """The text as it is, each doubled ``%`` once and each single one left out."""
        if answer.enhanced and answer.enhanced[0] != str(answer.code)[0]:
            return POSTFIX_MISCONFIGURED
        return re.sub("%(%?)", r"\1", answer.raw)

    def default_reply(self, stage: Command, answer: Answer, address: str) -> str:
        """The same at every stage."""
        if answer.rejects:
            return "550 5.7.1 Command rejected"
        return "451 4.7.1 Service unavailable - try again later"


POSTFIX_MISCONFIGURED = "451 4.3.5 Server configuration problem - try again later"


# ---- Sendmail


@dataclass(slots=True)
class _Slot:
    """A place in Sendmail's list of header fields.

    ``header`` is None when nothing is printed here: a deleted field, or a field that the
    configuration would print only if the message lacked it.
    """

    name: str
    header: Header | None
    from_user: bool


class Sendmail(DeliveryModel):
    """The rules of Sendmail, with the header fields of its usual configuration (cf/m4/proto.m4).

    - Positions for inserting count fields that are not printed: 0 is above the MTA's own Received,
      1 to 8 below it, 9 below the message's first field, and so on. Positions are signed.
    - Numbers for changing count the fields of that name as they were, deleted ones included. Beyond
      the last, or for a new field, the place is above the first of that name, else the end.
    - A changed field keeps the spelling of its name.
    - Some fields are never delivered, whoever made them, and those of a resent message (RFC 5322, section
      3.6.6) only if the client sent one of them.
    """

    name = "Sendmail"
    accepted = "250 2.0.0 {} Message accepted for delivery"
    fold = " "

    _ABOVE = ("Return-Path",)
    _BELOW = ("Resent-Date", "Date", "Resent-From", "From", "Full-Name", "Resent-Message-Id", "Message-Id")
    _NEVER_PRINTED = ("return-path", "bcc", "resent-bcc", "full-name", "content-length")
    _RESENT = ("sender", "from", "reply-to", "to", "cc", "bcc", "message-id", "date")

    def change_headers(self, headers: Sequence[Header], events: Sequence[Event]) -> tuple[Header, ...]:
        """Apply the changes to Sendmail's list, and print what can be printed."""
        slots = [
            *(_Slot(name, None, False) for name in self._ABOVE),
            _Slot(self._trace.name, self._trace, False),
            *(_Slot(name, None, False) for name in self._BELOW),
            *(_Slot(header.name, header, True) for header in headers),
        ]
        for event in events:
            match event:
                case AddHeader(name, value) if name:
                    self._add(slots, name, value)
                case InsertHeader(index, name, value) if name:
                    self._insert(slots, index, name, value)
                case ReplaceHeader(index, name, value) if name:
                    self._replace(slots, index, name, value)
        unprinted = self._unprinted(headers)
        return tuple(slot.header for slot in slots if slot.header and slot.name.lower() not in unprinted)

    def _unprinted(self, headers: Sequence[Header]) -> set[str]:
        """The names, in lower case, of fields that are not delivered, whoever made them."""
        resent = {f"resent-{name}" for name in self._RESENT}
        was_resent = any(header.name.lower() in resent for header in headers)
        return {*self._NEVER_PRINTED, *(() if was_resent else resent)}

    def _is_default(self, slot: _Slot) -> bool:
        return not slot.from_user and slot.header is not self._trace

    def _add(self, slots: list[_Slot], name: str, value: str) -> None:
        named = [slot for slot in slots if slot.name.lower() == name.lower()]
        default = next(filter(self._is_default, named), None)
        if default is not None:
            self._fill(default, value)
        else:
            self._add_above_first(slots, name, value)

    def _add_above_first(self, slots: list[_Slot], name: str, value: str) -> None:
        places = [place for place, slot in enumerate(slots) if slot.name.lower() == name.lower()]
        slots.insert(places[0] if places else len(slots), _Slot(name, self.write(name, value), True))

    def _insert(self, slots: list[_Slot], index: int, name: str, value: str) -> None:
        after = max(_signed(index), 0)
        slots.insert(after + 1, _Slot(name, self.write(name, value), True))

    def _replace(self, slots: list[_Slot], index: int, name: str, value: str) -> None:
        named = [slot for slot in slots if slot.name.lower() == name.lower()]
        number = max(_signed(index), 1)
        found = [slot for slot in named if slot.from_user][number - 1 : number]
        found = found or [slot for slot in named if self._is_default(slot)][-1:]
        if not found:
            if value:
                self._add_above_first(slots, name, value)
        elif value:
            self._fill(found[0], value)
        else:
            found[0].header = None

    def _fill(self, slot: _Slot, value: str) -> None:
        slot.header = self.write(slot.name, value)
        slot.from_user = True

    def new_sender(self, old: Mailbox, event: ReplaceSender) -> Mailbox:
        """Parameters of the milter's replace all the old ones, even if Sendmail does not know them."""
        address = (addresses(event.sender) or [""])[0]
        if event.params is None:
            return replace(old, address=address)
        return Mailbox(address, _known(event.params, self.sender_params))

    def add_recipient(self, recipients: list[Mailbox], event: AddRecipient, added: set[Mailbox]) -> None:
        """All addresses that are not there yet; none if there is a parameter that Sendmail does not know."""
        params = _known(event.params, self.recipient_params)
        if len(params) != len((event.params or "").split()):
            return
        present = {mailbox.address for mailbox in recipients}
        for address in addresses(event.recipient):
            if address not in present:
                present.add(address)
                recipients.append(Mailbox(address, params))

    def own_reply(self, stage: Command, answer: Answer, address: str) -> str:
        """The text with seven bits; the default instead if a single ``%`` is in it, or at CONNECT."""
        if stage is Command.CONNECT or "%" in answer.raw.replace("%%", ""):
            return self.default_reply(stage, answer, address)
        lines = answer.raw.replace("%%", "%").split("\r\n")
        if not answer.enhanced:
            lines = [f"{line[:4]}{line[0]}.0.0 {line[4:]}" for line in lines]
        lines[0] = self._with_address(lines[0], stage, address)
        return "".join(chr(byte & 0x7F) for byte in encode_text("\r\n".join(lines)))

    def default_reply(self, stage: Command, answer: Answer, address: str) -> str:
        """550 before the message's content, 554 from there on."""
        if answer.tempfails:
            return "451 4.3.2 Please try again later"
        if stage in (Command.CONNECT, Command.HELO):
            return "550 5.0.0 Command rejected"
        if stage in (Command.HEADER, Command.EOH, Command.BODY, Command.END_OF_MESSAGE):
            return "554 5.7.1 Command rejected"
        return self._with_address("550 5.7.1 Command rejected", stage, address)

    @staticmethod
    def _with_address(line: str, stage: Command, address: str) -> str:
        """Put the address before the text of 450, 550 and 553 at MAIL and RCPT."""
        if stage not in (Command.MAIL, Command.RCPT) or not line.startswith(("450", "550", "553")):
            return line
        enhanced, _, text = line[4:].partition(" ")
        return f"{line[:4]}{enhanced} {address}... {text}"


def _signed(number: int) -> int:
    """An unsigned number of 32 bits as Sendmail reads it."""
    return number - 2**32 if number >= 2**31 else number
