# SPDX-License-Identifier: GPL-3.0-or-later
"""The whole message, as a handler of ``on_message`` gets it: to read, and to edit.

Three things lie behind it, in the order in which they come to life:

- the :class:`Content`: what was gathered of the message while it arrived, in memory of which nobody
  in Python owns a byte. It is gone when the handler has returned;
- what was read of it: each part is fetched when it is first asked for, and then belongs to the Message;
- the edits: kept beside what was received, never mixed with it. ``milter.edits`` makes of them what is
  sent to the MTA, once the handler has returned and if the message is accepted.

Nothing here talks to libmilter. The engine makes a Message, and calls :func:`freeze` when the handlers
have returned.
"""

import io
from collections.abc import Iterable, Iterator, Sequence
from email.message import EmailMessage
from typing import overload

from milter import checks
from milter.addresses import Address, Mailboxes
from milter.content import Content, Editable, MemoryContent, memory_file, spooled_file
from milter.headers import Headers
from milter.parsed import parse

__all__ = ["Content", "Headers", "MemoryContent", "Message", "Recipients", "freeze"]

# ---- The message -------------------------------------------------------------------------------

_COMPARED_AT_ONCE = 1 << 20


class Message(Editable):
    """A message at its end, with its envelope.

    Everything can be read. ``sender``, ``recipients``, ``headers`` and ``body`` can be edited, too; reading
    them shows the edits, while ``as_bytes()``, ``email()``, ``open()`` and ``size`` always show what was received.

    The edits are sent to the MTA when the handlers have returned and accept the message: the fewest actions
    that bring them about. With any other verdict nothing is sent. Wrong arguments raise ``ValueError`` or
    ``TypeError`` at once; an edit after the handler has returned raises :class:`ContextError`. What was read
    before that stays valid; what is read first after it raises :class:`ContextError`, too.

    Text is decoded as UTF-8 with ``surrogateescape``: nothing is lost, nothing raises.

    >>> from milter import EomContext, Status
    >>> def tag(ctx: EomContext, message: Message) -> Status:
    ...     if any(recipient.matches("list@mta.example") for recipient in message.recipients):
    ...         message.headers["Subject"] = f"[list] {message.headers.get('Subject', '')}"
    ...         message.headers.add("List-Id", "<list.mta.example>")
    ...         message.sender = "list-bounces@mta.example"
    ...     return Status.CONTINUE

    To try it without an MTA:

    >>> content = MemoryContent([(b"Subject", b" hello")], b"Hi.\\r\\n")
    >>> message = Message(content, Address("ann@client.example"), [Address("list@mta.example")])
    >>> tag(None, message)
    <Status.CONTINUE: 0>
    >>> message.headers
    Headers([('Subject', '[list] hello'), ('List-Id', '<list.mta.example>')])
    >>> message.as_bytes()
    b'Subject: hello\\r\\n\\r\\nHi.\\r\\n'
    """

    __slots__ = (
        "_body",
        "_content",
        "_email",
        "_envelope_recipients",
        "_envelope_sender",
        "_head",
        "_headers",
        "_new_body",
        "_new_sender",
        "_prefix",
        "_recipients",
        "_wire_space",
    )

    def __init__(
        self,
        content: Content,
        sender: Address,
        recipients: Sequence[Address],
        *,
        wire_space: bool = True,
        leading_space: bool = False,
    ) -> None:
        """By the engine.

        Arguments:
            wire_space: whether the values in ``content`` come with whatever followed the colon, and are
                sent in the same way (``SMFIP_HDR_LEADSPC``). If not, the MTA takes one space off a
                value, and puts it before a value.
            leading_space: whether the user wants to see that space.
        """
        self._content = content
        self._envelope_sender = sender
        self._envelope_recipients = recipients
        self._wire_space = wire_space
        # What is taken off a value before it is shown, and put before it when it is sent.
        self._prefix = b" " if wire_space and not leading_space else b""
        self._frozen = False
        self._head: bytes | None = None
        self._headers: Headers | None = None
        self._body: bytes | None = None
        self._email: EmailMessage | None = None
        self._recipients: Recipients | None = None
        self._new_sender: Address | None = None
        self._new_body: bytes | None = None

    # ---- the envelope

    @property
    def sender(self) -> Address:
        """The envelope sender, without brackets; ``""`` is the null sender of a bounce.

        Set it to a mailbox, ``"ann@example.org"``, to give the message another one (``smfi_chgfrom``), or to ``""``.
        The ESMTP parameters stay; ``EomContext.replace_sender`` can give others. ``ValueError`` for what the servers do
        not read as one mailbox.
        """
        return self._envelope_sender if self._new_sender is None else self._new_sender

    @sender.setter
    def sender(self, address: str) -> None:
        self._require_open()
        old, new = self._envelope_sender, _checked(checks.sender(address), self._envelope_sender.params.raw)
        self._new_sender = None if new == old else new

    @property
    def recipients(self) -> "Recipients":
        """The envelope recipients that were accepted, see :class:`Recipients`."""
        if self._recipients is None:
            self._recipients = Recipients(self._envelope_recipients, self._frozen)
        return self._recipients

    # ---- the content

    @property
    def headers(self) -> "Headers":
        """The header fields, see :class:`Headers`."""
        if self._headers is None:
            self._headers = Headers(self._content, self._prefix, self._frozen)
        return self._headers

    @property
    def body(self) -> bytes:
        """The body, byte for byte: CRLF line ends, no dots doubled, ``b""`` if there is none.

        Set it to bytes, or to an iterable of bytes, to give the message another one (``smfi_replacebody``).
        Both MTAs turn a bare LF into CRLF, and end the last line.
        """
        return self._received_body() if self._new_body is None else self._new_body

    @body.setter
    def body(self, body: bytes | Iterable[bytes]) -> None:
        self._require_open()
        new = b"".join(checks.body_parts(body))
        self._new_body = None if self._was_received(new) else new

    @property
    def size(self) -> int:
        """The bytes of ``as_bytes()``: of the message as it was received."""
        return len(self._received_head()) + self._content.size - self._content.header_size

    def as_bytes(self) -> bytes:
        """The message as the MTA sent it, byte for byte, before any edit: what a signature is checked against.

        Three things the MTA itself does not tell: whether a message without a body ended with the empty line
        (here it does); white space between a field's name and the colon; and whether a space followed the
        colon, where the MTA does not offer ``SMFIP_HDR_LEADSPC`` (Sendmail since 8.14 and Postfix since 2.6 do,
        unless they are told to speak an older version of the protocol). There one is put.
        """
        return self._received_head() + self._received_body()

    def email(self) -> EmailMessage:
        """The message as it was received, parsed; made at the first call, the same object at each.

        Never raises, whatever the message is, and takes time in proportion to its size, as do the object's methods:
        what cannot be parsed is among the object's ``defects``. A field that the standard library fails to parse
        keeps its text, without its structure (``addresses``, ``params`` are empty), and so does one of more than
        8192 characters, or of more than 1000 without a space, which a mere text such as Subject may have. Parts
        are parsed up to the thousandth, and up to 20 within one another; what is beyond is one part of the type
        application/octet-stream. Each of these limits leaves a :class:`LimitDefect <milter.parsed.LimitDefect>` among
        the ``defects`` of the part. ``bytes(email)`` has the fields as they were received, not folded anew; text of an
        unknown charset is read as ASCII. Changing the object edits nothing.
        """
        if self._email is None:
            self._email = parse(self.as_bytes())
        return self._email

    def open(self) -> io.BufferedReader:
        """A binary file over what ``as_bytes()`` returns: for parsers and scanners that read files.

        A large message is read from the spool file, piece by piece, and never lies in memory as a whole. The
        file stays valid when the handler has returned; close it, or use it in a ``with`` statement.
        """
        head = self._received_head()
        descriptor = self._content.spool_file() if self._body is None else None
        if descriptor is None:
            return memory_file(head, self._received_body())
        return spooled_file(head, descriptor, self._content.header_size, self._content.size)

    def __repr__(self) -> str:
        size = self._content.size - self._content.header_size
        return f"<Message from {str(self.sender)!r} to {len(self.recipients)} recipients, body of {size} bytes>"

    # ---- what was received

    def _received_head(self) -> bytes:
        """The header fields and the empty line, as they stood in the message."""
        if self._head is None:
            area = self._content.read(0, self._content.header_size)
            if b"\n" in area:
                area = area.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
            texts = area.split(b"\0")
            fields = len(texts) // 2
            pieces = [b"\r\n"] * (4 * fields + 1)
            pieces[0:-1:4] = texts[0:-1:2]
            pieces[1:-1:4] = [b":" if self._wire_space else b": "] * fields
            pieces[2:-1:4] = texts[1::2]
            self._head = b"".join(pieces)
        return self._head

    def _received_body(self) -> bytes:
        if self._body is None:
            start = self._content.header_size
            self._body = self._content.read(start, self._content.size - start)
        return self._body

    def _was_received(self, body: bytes) -> bool:
        """Whether this is the body as received; compared in pieces, since it may lie in a file."""
        start = self._content.header_size
        if len(body) != self._content.size - start:
            return False
        if self._body is not None:
            return body == self._body
        return all(
            self._content.read(start + offset, min(_COMPARED_AT_ONCE, len(body) - offset))
            == body[offset : offset + _COMPARED_AT_ONCE]
            for offset in range(0, len(body), _COMPARED_AT_ONCE)
        )


def freeze(message: Message) -> None:
    """By the engine, when the handlers have returned and :func:`milter.edits.changes` has been asked."""
    for part in (message, message._headers, message._recipients):
        if part is not None:
            part._frozen = True


# ---- The recipients ----------------------------------------------------------------------------


class Recipients(Editable, Sequence[Address]):
    """The envelope recipients of a message: a sequence of :class:`Address <milter.Address>`, to read and to edit.

    Addresses are found in any spelling, see :meth:`Address.matches <milter.Address.matches>`. A loop over them may
    edit: it goes through those that were there when it began.

    >>> message = Message(MemoryContent([]), Address(""), [Address("bob@mta.example"), Address("eve@mta.example")])
    >>> message.recipients.add("<archive@mta.example>", "NOTIFY=NEVER")
    >>> message.recipients.remove("eve@mta.example")
    >>> message.recipients
    Recipients(['bob@mta.example', 'archive@mta.example'])
    """

    __slots__ = ("_added", "_gone", "_known", "_mailboxes", "_now", "_received", "_removed")

    def __init__(self, received: Sequence[Address], frozen: bool) -> None:
        """By a Message. No part of a message refers to it: a cycle would keep it in memory for a while."""
        self._frozen = frozen
        self._received = received
        self._known: dict[str, list[Address]] | None = None
        self._now: Sequence[Address] | None = None  # None after an edit
        self._removed: set[str] = set()
        self._gone = 0  # so many of the received ones are among the removed
        self._added: dict[str, Address] = {}
        self._mailboxes: Mailboxes | None = None
        """The recipients that there are; made when somebody looks for one."""

    def add(self, address: str, params: str | None = None) -> None:
        """Add a recipient (``smfi_addrcpt``, with parameters ``smfi_addrcpt_par``).

        Arguments:
            address: one mailbox, ``"ann@example.org"``, with or without angle brackets. ``ValueError`` for what the
                servers do not read as one: a list, a display name, a route, no domain.
            params: ESMTP parameters, separated by spaces, such as ``"NOTIFY=NEVER"``. Sendmail does not
                add the recipient when it does not know one of them, Postfix ignores such a one.

        One that is there already stays as it is, for Postfix would deliver to it twice; to give it other
        parameters remove it first.
        """
        self._require_open()
        encoded = checks.recipient(address)
        checks.parameters(params)
        parameters = (params or "").split()
        if address in self:
            return
        self._now = None
        new = _checked(encoded, parameters)
        received = self._received_as(new) if new in self._removed else []
        if len(received) == 1 and list(received[0].params.raw) == parameters:
            self._removed.remove(new)
            self._gone -= 1
            self._found().add(received[0])
        else:
            self._added[new] = new
            self._found().add(new)

    def remove(self, address: str) -> None:
        """Remove a recipient (``smfi_delrcpt``); ``ValueError`` if there is none of this address.

        One that the client gave twice is removed altogether.
        """
        self._require_open()
        taken = self._found().take(address)
        if not taken:
            named = list(map(str, self._received[:20]))
            raise ValueError(f"{address!r} is not among the recipients; the client has named {named!r}")
        self._now = None
        for known in taken:
            if self._added.pop(known, None) is None:
                self._removed.add(known)
                self._gone += 1

    def discard(self, address: str) -> None:
        """Remove a recipient if it is there."""
        self._require_open()
        if isinstance(address, str) and address in self:
            self.remove(address)

    @overload
    def __getitem__(self, index: int) -> Address: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Address]: ...
    def __getitem__(self, index: int | slice) -> Address | Sequence[Address]:
        return self._current()[index]

    def __len__(self) -> int:
        return len(self._received) - self._gone + len(self._added)

    def __iter__(self) -> Iterator[Address]:
        return iter(self._current())

    def __contains__(self, address: object) -> bool:
        if not isinstance(address, str):
            return False
        return address in self._found()

    def _found(self) -> Mailboxes:
        if self._mailboxes is None:
            self._mailboxes = Mailboxes(self._received)
        return self._mailboxes

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Recipients | list | tuple):
            return list(self) == list(other)
        return NotImplemented

    __hash__ = None  # type: ignore[assignment]  # it changes

    def __repr__(self) -> str:
        return f"Recipients({list(map(str, self))!r})"

    def _received_as(self, bare: str) -> Sequence[Address]:
        """Those of this address that the client gave."""
        if self._known is None:
            self._known = {}
            for recipient in self._received:
                self._known.setdefault(recipient, []).append(recipient)
        return self._known.get(bare, ())

    def _current(self) -> Sequence[Address]:
        if not self._removed and not self._added:
            return self._received
        if self._now is None:
            self._now = [known for known in self._received if known not in self._removed] + list(self._added.values())
        return self._now


def _checked(encoded: bytes, params: Sequence[str]) -> Address:
    """The address that a check has made fit to be sent."""
    return Address.from_arguments([encoded.decode("utf-8", "surrogateescape"), *params])
