# SPDX-License-Identifier: GPL-3.0-or-later
"""The MTA's side of a connection to a milter: `Client`.

Tests use it stage by stage, ``milter check`` sends a whole message with `Client.send_message`. It
uses a socket and ``wire``, nothing of the library but ``milter.listener`` for finding an address.

Nothing here waits for ever, unless it is told to: a packet has ``timeout`` seconds to come, the end
of a message `PATIENCE` seconds altogether. Whatever goes wrong is a `WireError` that says at which stage.
"""

import contextlib
import ipaddress
import math
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import partial
from types import MappingProxyType, TracebackType
from typing import Self

from milter.protocol import macro_name
from milter.testing.delivery import Delivery, DeliveryModel, Envelope, Header, Mailbox, Message
from milter.testing.wire import (
    ALL_ACTIONS,
    ALL_STEPS,
    MACRO_STAGES,
    Actions,
    Answer,
    Change,
    Command,
    Decoder,
    Event,
    Family,
    Negotiated,
    Packet,
    Progress,
    Response,
    Steps,
    Verdict,
    WireError,
    command_name,
    decode_text,
    encode_text,
    join_strings,
    pack_offer,
    read_answer,
    read_event,
    read_negotiated,
)

# The most that a packet of body holds (MILTER_CHUNK_SIZE of mfdef.h); both MTAs send just that much.
CHUNK_SIZE = 65535

# Sendmail's usual limit from the end of a message to the verdict, which progress does not extend
# (``T=E:5m`` of INPUT_MAIL_FILTER, cf/README).
PATIENCE = 300.0

# Seconds for the connection itself, where no time is set for what follows.
_TO_CONNECT = 10.0

# A milter that sends more than this for one message is broken.
MAX_CHANGES = 512 * 1024 * 1024


class PeerClosed(WireError):
    """The milter closed the connection."""


class PeerTimeout(WireError):
    """The milter did not answer, or did not read, in time."""


# ---- what a client is told and tells


@dataclass(frozen=True, slots=True)
class ClientAddress:
    """The address of an SMTP client, as CONNECT has it. ``address``: an IP address or a path, by family."""

    family: Family
    address: str = ""
    port: int = 0

    @classmethod
    def of(cls, address: "str | ClientAddress | None", port: int = 0) -> "ClientAddress":
        """From an IP address, a path that starts with ``/``, or None for an unknown one.

        Raises `ValueError` for a text that is neither.

        >>> ClientAddress.of("2001:db8::5").family.name
        'INET6'
        """
        if isinstance(address, ClientAddress):
            return address
        if address is None:
            return cls(Family.UNKNOWN)
        if address.startswith("/"):
            return cls(Family.UNIX, address)
        version = ipaddress.ip_address(address).version
        return cls(Family.INET if version == 4 else Family.INET6, address, port)

    def encode(self) -> bytes:
        """The address as in CONNECT. Raises `WireError` for a port above 65535, or a NUL in the address."""
        if self.family is Family.UNKNOWN:
            return bytes(self.family)
        if not 0 <= self.port <= 0xFFFF:
            raise WireError(f"there is no port {self.port}")
        return self.family + self.port.to_bytes(2, "big") + join_strings(self.address)


@dataclass(frozen=True, slots=True)
class EndOfMessage:
    """A milter's answer to the end of a message: ``events`` in the order they came, then ``answer``."""

    events: tuple[Event, ...]
    answer: Answer

    @property
    def changes(self) -> tuple[Change, ...]:
        """The changes in order, without the signs of progress."""
        return tuple(event for event in self.events if not isinstance(event, Progress))

    @property
    def progress(self) -> int:
        """How many signs of progress came."""
        return len(self.events) - len(self.changes)


@dataclass(frozen=True, slots=True)
class Session:
    """An SMTP session as the MTA sees it.

    ``macros``: more macros, or other values than the usual ones; braces may be left out. What is
    defined here is sent at each stage whose list names it. ``stage_macros`` are sent at their stage,
    whatever its list says. ``unasked``: the lists of a milter that asks for none.
    """

    hostname: str = "client.example"
    address: ClientAddress = field(default=ClientAddress(Family.INET, "192.0.2.1", 49152))
    helo: str = "client.example"
    macros: Mapping[str, str] = field(default_factory=dict)
    stage_macros: Mapping[Command, Mapping[str, str]] = field(default_factory=dict)
    unasked: Mapping[Command, str] = field(default_factory=lambda: POSTFIX_MACROS)


class Outcome(Enum):
    """What became of a message."""

    ACCEPTED = "accepted"
    REJECTED = "rejected"
    TEMPFAILED = "deferred"
    DISCARDED = "discarded"


@dataclass(frozen=True, slots=True)
class StageAnswer:
    """One stage of a session. ``answer`` is None where the milter is not asked, or does not reply."""

    stage: Command
    argument: str
    answer: Answer | None


@dataclass(slots=True)
class Transcript:
    """What a milter answered to a message, stage by stage.

    It grows while the message is sent, so that it tells the story of a failure, too: ``outcome``
    is None until then. ``recipients`` are those that were not refused. ``decision`` is the stage
    that decided; None if the milter never did, or if all recipients were refused.
    """

    envelope: Envelope
    message: Message
    negotiated: Negotiated
    stages: list[StageAnswer] = field(default_factory=list)
    recipients: list[Mailbox] = field(default_factory=list)
    end: EndOfMessage | None = None
    decision: StageAnswer | None = None
    outcome: Outcome | None = None
    queue_id: str = ""
    """The MTA's name of the message, once a recipient was taken."""

    @property
    def accepted_envelope(self) -> Envelope:
        """The envelope with the recipients that were not refused."""
        return replace(self.envelope, recipients=tuple(self.recipients))

    def of(self, stage: Command) -> list[StageAnswer]:
        """All answers of one stage, in order."""
        return [entry for entry in self.stages if entry.stage is stage]

    def delivery(self, mta: DeliveryModel) -> Delivery:
        """What this MTA delivers.

        Raises `ValueError` unless the message was accepted, `ModificationError` if the MTA refuses
        it because of the changes.
        """
        if self.outcome is not Outcome.ACCEPTED:
            raise ValueError("nothing is delivered: the message was not accepted")
        return mta.deliver(self.accepted_envelope, self.message, self.end.events if self.end else ())


def _outcome_of(answer: Answer | None) -> Outcome | None:
    """What an answer decides, None if the conversation goes on."""
    if answer is None:
        return None
    if answer.rejects:
        return Outcome.REJECTED
    if answer.tempfails:
        return Outcome.TEMPFAILED
    return {Verdict.ACCEPT: Outcome.ACCEPTED, Verdict.DISCARD: Outcome.DISCARDED}.get(answer.verdict)


# ---- one connection


_UNNEGOTIATED = Negotiated(6, Actions(0), Steps(0), MappingProxyType({}))


class Client:
    """One connection to a milter, from the MTA's side.

    Each stage is a method that sends it and returns the milter's `Answer`, or None: where the
    milter declined the stage (it is not sent), does not reply to it (nothing is waited for), or
    has skipped the rest of the body. What is sent is up to the caller, also in a wrong order.

    A context manager: leaving it closes the socket, with no word to the milter. `finish` says QUIT.

    >>> import socket, threading
    >>> here, there = socket.socketpair()
    >>> client = Client(here)
    >>> there.sendall(Packet(Response.CONTINUE).encode())
    >>> client.helo("client.example").verdict
    <Verdict.CONTINUE: 'continue'>
    >>> client.close(); there.close()
    """

    def __init__(self, sock: socket.socket, timeout: float | None = 10.0) -> None:
        """``sock``: connected; the client owns it from now on. ``timeout``: seconds for each packet, None: no limit."""
        self.timeout = timeout
        self.negotiated = _UNNEGOTIATED
        self.transcript: Transcript | None = None
        """What `send_message` did last, whole or up to where it failed."""
        self._socket = sock
        self._decoder = Decoder()
        self._last = "nothing"
        self._body_skipped = False
        self._introduced: set[Command] = set()
        """CONNECT and HELO, once they were said."""
        self._conversation: _Conversation | None = None

    @classmethod
    def connect(cls, spec: str, timeout: float | None = 10.0) -> Self:
        """Connect to ``inet:port@host``, ``inet6:port@host``, ``unix:path`` or a bare path.

        Raises what `milter.listener.connect` does when there is no such address, or nobody there.
        """
        from milter.listener import connect

        return cls(connect(spec, _TO_CONNECT if timeout is None else timeout), timeout)

    def close(self) -> None:
        """Close the socket, as an MTA does that has died; `finish` is the polite way."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- packets

    def send(self, command: bytes, data: bytes = b"") -> None:
        """Send a packet: any letter, any data. Raises `WireError` if the milter does not take it."""
        packet = Packet(command, data).encode()
        self._last = command_name(command)
        try:
            self._socket.settimeout(self.timeout)
            self._socket.sendall(packet)
        except TimeoutError:
            raise PeerTimeout(f"the milter did not read {self._last} in time") from None
        except OSError as error:
            raise PeerClosed(f"the milter is gone, {self._last} could not be sent: {error}") from None

    def receive(self) -> Packet:
        """The next packet of the milter. Raises `WireError`: `PeerTimeout`, `PeerClosed`, or bad bytes."""
        return self._receive_before(self._deadline())

    def _deadline(self) -> float:
        return math.inf if self.timeout is None else time.monotonic() + self.timeout

    def _receive_before(self, deadline: float) -> Packet:
        while (packet := self._decoder.next()) is None:
            data = self._read(deadline)
            if not data:
                raise PeerClosed(f"the milter closed the connection after {self._last}{self._cut_off()}")
            self._decoder.feed(data)
        return packet

    def _read(self, deadline: float) -> bytes:
        """Some bytes, none at the end of the stream."""
        try:
            return self._recv_within(deadline - time.monotonic())
        except TimeoutError:
            raise PeerTimeout(f"the milter did not answer {self._last} in time{self._cut_off()}") from None
        except OSError as error:
            raise PeerClosed(f"the connection to the milter broke after {self._last}: {error}") from None

    def _recv_within(self, seconds: float) -> bytes:
        # A timeout of 0 would make the socket non-blocking, and one who dribbles would never be late.
        if seconds <= 0:  # pragma: no cover (it is over between two packets, or in the middle of one)
            raise TimeoutError
        self._socket.settimeout(None if seconds == math.inf else seconds)
        return self._socket.recv(65536)

    def _cut_off(self) -> str:
        return f", in the middle of a packet ({self._decoder.pending} bytes)" if self._decoder.pending else ""

    def wait_for_close(self) -> None:
        """Wait until the milter has closed the connection, as it does after QUIT.

        Raises `WireError` if it sends something instead, or does neither in time.
        """
        deadline = self._deadline()
        with contextlib.suppress(PeerClosed):
            data = self._read(deadline)
            if data or self._decoder.pending:
                raise WireError(f"the milter sent something after {self._last}: {data[:60]!r}")

    # -- the beginning of a connection

    def negotiate(self, version: int = 6, actions: int = ALL_ACTIONS, steps: int = ALL_STEPS) -> Negotiated:
        """Offer a version, actions and steps; by default all, as Postfix and Sendmail do.

        Raises `WireError` if the milter asks for more than was offered, which both MTAs, or one of
        them, answer with 451.
        """
        self.send(Command.NEGOTIATE, pack_offer(version, actions, steps))
        negotiated = read_negotiated(self.receive())
        if not 2 <= negotiated.version <= version:
            raise WireError(f"the milter wants version {negotiated.version}, offered were 2 to {version}")
        if negotiated.actions & ~actions:
            raise WireError(f"the milter wants actions {negotiated.actions!r}, offered were {actions:#x}")
        if negotiated.steps & ~steps:
            raise WireError(f"the milter wants steps {negotiated.steps!r}, offered were {steps:#x}")
        self.negotiated = negotiated
        return negotiated

    def macros(self, stage: bytes, values: Mapping[str, str]) -> None:
        """Send the macros of the stage that comes next, replacing those sent for it before.

        Names longer than a letter go out in braces, given with or without them: ``i``, ``{auth_authen}``.
        """
        pairs = [text for name, value in values.items() for text in (macro_name(name), value)]
        self.send(Command.MACRO, bytes(stage) + join_strings(*pairs))

    def connect_info(
        self, hostname: str = "client.example", address: ClientAddress | str | None = "192.0.2.1"
    ) -> Answer | None:
        """Tell who connects. ``address``: what `ClientAddress.of` takes; None is an unknown family."""
        data = join_strings(hostname) + ClientAddress.of(address).encode()
        self._introduced.add(Command.CONNECT)
        return self._stage(Command.CONNECT, data)

    def helo(self, name: str = "client.example") -> Answer | None:
        """HELO or EHLO."""
        self._introduced.add(Command.HELO)
        return self._stage(Command.HELO, join_strings(name))

    # -- a message

    def mail(self, sender: str, *params: str) -> Answer | None:
        """MAIL. ``sender``: as the client wrote it, usually in brackets; ``params``: ``"SIZE=100"``."""
        self._body_skipped = False
        return self._stage(Command.MAIL, join_strings(sender, *params))

    def rcpt(self, recipient: str, *params: str) -> Answer | None:
        """RCPT, with its arguments as the client wrote them."""
        return self._stage(Command.RCPT, join_strings(recipient, *params))

    def data(self) -> Answer | None:
        """DATA; not sent in versions below 4."""
        return self._stage(Command.DATA)

    def header(self, name: str, value: str) -> Answer | None:
        """One header field. ``value``: with its leading space only if that was negotiated; folds are LF."""
        return self._stage(Command.HEADER, join_strings(name, value))

    def eoh(self) -> Answer | None:
        """The end of the headers."""
        return self._stage(Command.EOH)

    def body(self, chunk: bytes) -> Answer | None:
        """A piece of the body; not sent once the milter has answered SKIP.

        Raises `ValueError` for an empty one: no MTA sends it, and libmilter hangs up on it.
        """
        if not chunk:
            raise ValueError("a piece of the body has a byte at least")
        if self._body_skipped:
            return None
        answer = self._stage(Command.BODY, chunk)
        self._body_skipped = answer is not None and answer.verdict is Verdict.SKIP
        return answer

    def end_of_message(self) -> EndOfMessage:
        """The end of the message: collect the changes, and the answer.

        Raises `WireError`, also if it takes more than `PATIENCE` seconds, or `MAX_CHANGES` bytes.
        """
        self.send(Command.END_OF_MESSAGE)
        self._body_skipped = False
        events: list[Event] = []
        for packet in self._packets():
            event = read_event(packet)
            if event is None:
                return EndOfMessage(tuple(events), read_answer(packet))
            events.append(event)
        raise WireError(f"the milter sent more than {MAX_CHANGES} bytes of changes")

    def abort(self) -> None:
        """End the message, not the connection."""
        self._body_skipped = False
        self.send(Command.ABORT)

    def quit(self) -> None:
        """End the connection; the milter closes it (`wait_for_close`)."""
        self.send(Command.QUIT)

    def quit_nc(self) -> None:
        """End the connection and begin another one on the same socket, with what was negotiated."""
        self._introduced.clear()
        self.send(Command.QUIT_NC)

    def unknown(self, command: str) -> Answer | None:
        """An SMTP command that the MTA does not know; not sent in version 2."""
        return self._stage(Command.UNKNOWN, join_strings(command))

    def _stage(self, command: Command, data: bytes = b"") -> Answer | None:
        if self.negotiated.declines(command):
            return None
        self.send(command, data)
        if self.negotiated.silences(command):
            return None
        return self._answer()

    def _answer(self) -> Answer:
        # Postfix takes progress at any stage.
        for packet in self._packets():
            if packet.letter != Response.PROGRESS:
                return read_answer(packet)
        raise WireError(f"the milter answered {self._last} with nothing but progress")

    def _packets(self) -> Iterator[Packet]:
        """The packets that come, until there are too many; each in time, and all of them."""
        last_call = math.inf if self.timeout is None else time.monotonic() + PATIENCE
        received = 0
        while received <= MAX_CHANGES:
            packet = self._receive_before(min(self._deadline(), last_call))
            received += len(packet.data) + 5
            yield packet

    # -- whole sessions

    def send_message(self, envelope: Envelope, message: Message, session: Session | None = None) -> Transcript:
        """Send a message as Postfix does, from the negotiation on if that is due, and record the answers.

        A second message goes into the same SMTP session; ``session`` counts for the first only, and
        there for CONNECT and HELO unless they were said already. The
        connection stays open after it (`finish`), unless the milter decided on the whole session.

        Raises `WireError`, `ValueError` for an envelope without recipients.
        """
        if not envelope.recipients:
            raise ValueError("an envelope needs a recipient")
        if self._conversation is None:
            self._conversation = _Conversation(self, session or Session())
        return self._conversation.message(envelope, message)

    def finish(self) -> None:
        """End the session as Postfix does, and close the socket. Never raises `WireError`."""
        # The milter may be gone, or may go first: either is its right once it has decided.
        with contextlib.suppress(WireError):
            if self._conversation is not None:
                self._conversation.reset()
            self.quit()
        self.close()


# ---- a session, the way of Postfix


# The macros of each stage as Postfix sends them unasked (its parameters milter_*_macros).
POSTFIX_MACROS: Mapping[Command, str] = {
    Command.CONNECT: "j {daemon_name} {daemon_addr} v _",
    Command.HELO: "{tls_version} {cipher} {cipher_bits} {cert_subject} {cert_issuer}",
    Command.MAIL: "{auth_type} {auth_authen} {auth_author} {mail_addr} {mail_host} {mail_mailer}",
    Command.RCPT: "i {rcpt_addr} {rcpt_host} {rcpt_mailer}",
    Command.DATA: "i",
    Command.HEADER: "i",
    Command.EOH: "i",
    Command.BODY: "i",
    Command.END_OF_MESSAGE: "i",
}

# Where the milter's own list of macros is looked up; Postfix uses that of the end for the body.
_LIST_OF: Mapping[Command, int] = {stage: number for number, stage in MACRO_STAGES.items()} | {Command.BODY: 5}

# Postfix cuts longer fields when milters are used.
_HEADER_LIMIT = 60000

# Postfix removes these before a milter sees the message.
_HIDDEN_HEADERS = ("bcc", "return-path")

# Replies after which Postfix closes the SMTP session.
_CLOSING_CODES = (421, 521)


class _Conversation:
    """An SMTP session as Postfix relates it to a milter: what is said when, and when no more is said."""

    def __init__(self, client: Client, session: Session) -> None:
        self._client = client
        self._session = session
        self._values = _session_macros(session)
        self._greeted = False
        self._messages = 0
        self._ending: StageAnswer | None = None
        """The stage that took the milter out of the session, if one did."""

    def message(self, envelope: Envelope, message: Message) -> Transcript:
        """Send one message."""
        if not self._greeted and self._client.negotiated is _UNNEGOTIATED:
            self._client.negotiate()
        transcript = Transcript(
            envelope,
            _as_postfix_shows(message),
            self._client.negotiated,
            recipients=list(envelope.recipients),
        )
        self._client.transcript = transcript
        steps = (
            self._greet,
            self._mail,
            self._rcpts,
            self._data,
            self._headers,
            self._eoh,
            self._body,
            self._end,
        )
        for step in steps:  # pragma: no branch (the last one decides)
            step(transcript)
            if transcript.outcome is not None:
                break
        if self._ending is None:
            with contextlib.suppress(PeerClosed):
                self.reset()
        return transcript

    def reset(self) -> None:
        """Tell the milter that a message has ended; Postfix does so after any, and before QUIT."""
        if self._greeted and self._ending is None:
            self._client.abort()

    # -- stages

    def _greet(self, transcript: Transcript) -> None:
        if self._ending is not None:
            transcript.decision, transcript.outcome = self._ending, _outcome_of(self._ending.answer)
            return
        if self._greeted:
            return
        session, said = self._session, frozenset(self._client._introduced)
        if Command.CONNECT not in said:
            self._introduce(
                transcript,
                Command.CONNECT,
                f"{session.hostname} [{session.address.address or 'unknown'}]",
                partial(self._client.connect_info, session.hostname, session.address),
            )
        if self._ending is None and Command.HELO not in said:
            self._introduce(transcript, Command.HELO, session.helo, partial(self._client.helo, session.helo))
        self._greeted = True

    def _introduce(
        self, transcript: Transcript, stage: Command, argument: str, ask: Callable[[], Answer | None]
    ) -> None:
        """CONNECT or HELO: any decision counts for the whole session; DISCARD is ignored."""
        entry = self._tell(transcript, stage, argument, ask)
        outcome = _outcome_of(entry.answer)
        if outcome not in (None, Outcome.DISCARDED):
            transcript.decision, transcript.outcome = entry, outcome
            self._leave(entry)

    def _mail(self, transcript: Transcript) -> None:
        self._messages += 1
        sender = transcript.envelope.sender
        self._values.pop("i", None)
        self._values |= _address_macros("mail", sender.address)
        self._decide(transcript, Command.MAIL, str(sender), partial(self._client.mail, sender.path, *sender.params))

    def _rcpts(self, transcript: Transcript) -> None:
        for mailbox in transcript.envelope.recipients:
            entry = self._rcpt(transcript, mailbox)
            outcome = _outcome_of(entry.answer)
            if outcome in (Outcome.REJECTED, Outcome.TEMPFAILED) and not _closes(entry):
                transcript.recipients.remove(mailbox)
            elif outcome is not None:
                self._settle(transcript, entry)
                return
            else:
                self._values["i"] = self._queue_id()
                transcript.queue_id = self._session.macros.get("i", self._values["i"])
            if entry.answer is not None and entry.answer.verdict is Verdict.SKIP:
                break
        if not transcript.recipients:
            refusals = [_outcome_of(entry.answer) for entry in transcript.of(Command.RCPT)]
            deferred = Outcome.TEMPFAILED in refusals
            transcript.outcome = Outcome.TEMPFAILED if deferred else Outcome.REJECTED

    def _rcpt(self, transcript: Transcript, mailbox: Mailbox) -> StageAnswer:
        self._values |= _address_macros("rcpt", mailbox.address)
        return self._tell(
            transcript,
            Command.RCPT,
            str(mailbox),
            partial(self._client.rcpt, mailbox.path, *mailbox.params),
        )

    def _data(self, transcript: Transcript) -> None:
        self._values["{nrcpts}"] = str(len(transcript.recipients))
        self._decide(transcript, Command.DATA, "", self._client.data)

    def _headers(self, transcript: Transcript) -> None:
        for header in transcript.message.headers:
            value = header.text if transcript.negotiated.steps & Steps.LEADING_SPACE else header.value
            entry = self._decide(
                transcript,
                Command.HEADER,
                header.raw,
                partial(self._client.header, header.name, value),
            )
            if _stops(transcript, entry):
                return

    def _eoh(self, transcript: Transcript) -> None:
        self._decide(transcript, Command.EOH, "", self._client.eoh)

    def _body(self, transcript: Transcript) -> None:
        body = transcript.message.body
        for start in range(0, len(body), CHUNK_SIZE):
            chunk = body[start : start + CHUNK_SIZE]
            entry = self._decide(
                transcript,
                Command.BODY,
                f"{len(chunk)} bytes",
                partial(self._client.body, chunk),
            )
            if _stops(transcript, entry):
                return

    def _end(self, transcript: Transcript) -> None:
        message_id = next((h.value for h in transcript.message.headers if h.name.lower() == "message-id"), None)
        if message_id is not None:
            self._values["{msg_id}"] = message_id
        self._send_macros(Command.END_OF_MESSAGE)
        transcript.end = self._client.end_of_message()
        entry = StageAnswer(Command.END_OF_MESSAGE, "", transcript.end.answer)
        transcript.stages.append(entry)
        self._settle(transcript, entry)
        transcript.outcome = transcript.outcome or Outcome.ACCEPTED

    # -- what stages have in common

    def _decide(
        self, transcript: Transcript, stage: Command, argument: str, ask: Callable[[], Answer | None]
    ) -> StageAnswer:
        """A stage that decides on the message."""
        entry = self._tell(transcript, stage, argument, ask)
        self._settle(transcript, entry)
        return entry

    def _tell(
        self, transcript: Transcript, stage: Command, argument: str, ask: Callable[[], Answer | None]
    ) -> StageAnswer:
        self._send_macros(stage)
        entry = StageAnswer(stage, argument, ask())
        transcript.stages.append(entry)
        return entry

    def _settle(self, transcript: Transcript, entry: StageAnswer) -> None:
        outcome = _outcome_of(entry.answer)
        if outcome is not None:
            transcript.decision, transcript.outcome = entry, outcome
        if _closes(entry):
            with contextlib.suppress(WireError):
                self.reset()
                self._client.quit()
            self._leave(entry)

    def _leave(self, entry: StageAnswer) -> None:
        self._ending = entry
        self._client.close()

    def _send_macros(self, stage: Command) -> None:
        content = (Command.HEADER, Command.EOH, Command.BODY)
        if stage in content and self._client.negotiated.declines(stage):
            return
        # An empty list leaves the MTA's own in place.
        requested = self._client.negotiated.macros.get(_LIST_OF.get(stage, -1), "")
        names = requested.strip() or self._session.unasked.get(stage)
        more = self._session.stage_macros.get(stage, {})
        if names is None and not more:
            return
        values = self._values | {macro_name(name): value for name, value in self._session.macros.items()}
        listed = {name: values[name] for name in (names or "").split() if name in values}
        self._client.macros(stage, {**listed, **more})

    def _queue_id(self) -> str:
        return f"4Fz{self._messages:05d}Qx1"


def _stops(transcript: Transcript, entry: StageAnswer) -> bool:
    """Whether no more is told of this stage: the message is decided on, or the milter skips the rest."""
    skipped = entry.answer is not None and entry.answer.verdict is Verdict.SKIP
    return skipped or transcript.outcome is not None


def _closes(entry: StageAnswer) -> bool:
    return entry.answer is not None and entry.answer.code in _CLOSING_CODES


def _session_macros(session: Session) -> dict[str, str]:
    """What Postfix knows of a client when it has connected."""
    address = session.address.address
    name = "unknown" if session.hostname.startswith("[") else session.hostname
    return {
        "j": "mta.example",
        "v": "Postfix 3.7.11",
        "_": f"{name} [{address}]",
        "{daemon_name}": "mta.example",
        "{daemon_addr}": "192.0.2.25",
        "{daemon_port}": "25",
        "{client_addr}": address,
        "{client_name}": name,
        "{client_port}": str(session.address.port),
        "{client_ptr}": name,
        "{client_connections}": "1",
    }


def _address_macros(prefix: str, address: str) -> dict[str, str]:
    host = address.rpartition("@")[2] or "mta.example"
    return {f"{{{prefix}_addr}}": address, f"{{{prefix}_host}}": host, f"{{{prefix}_mailer}}": "smtp"}


def _as_postfix_shows(message: Message) -> Message:
    """The message as Postfix hands it to milters, and delivers it."""
    shown = [header for header in message.headers if header.name.lower() not in _HIDDEN_HEADERS]
    return replace(message, headers=tuple(_cut(header) for header in shown))


def _cut(header: Header) -> Header:
    """A field up to its first NUL, no longer than Postfix's limit in bytes, without white space before the colon."""
    raw = encode_text(f"{header.name}:{header.text}".partition("\0")[0])
    return Header(decode_text(raw[:_HEADER_LIMIT]))
