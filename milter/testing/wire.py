# SPDX-License-Identifier: GPL-3.0-or-later
"""The milter protocol on the wire: packets, their letters, and what the packets of a milter say.

Bytes in, values out: nothing here touches a socket. ``client`` sends and receives with it,
``delivery`` applies the changes it reads, and tests feed it by hand.

A packet is a length (32 bits, big-endian, counting the letter), a letter and data. Strings in the
data end in NUL; here they are ``str``, UTF-8 with ``surrogateescape``, so that every byte comes
back as it was. Letters and bits are those of libmilter's ``mfdef.h`` and ``mfapi.h``. They are
written out once more, although ``milter.protocol`` has names for most of them: what plays the MTA
in a test must not share a mistake with what it tests.
"""

import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum, IntFlag
from types import MappingProxyType

# Generous: libmilter never sends over 65,535 bytes of data at once, other milters were seen to send 2 MB.
MAX_PACKET = 64 * 1024 * 1024


class WireError(Exception):
    """The other side broke the milter protocol, or what is to be sent would."""


class Command(bytes, Enum):
    """Letters from the MTA to the milter (``SMFIC_*`` of ``mfdef.h``)."""

    ABORT = b"A"
    BODY = b"B"
    CONNECT = b"C"
    MACRO = b"D"
    END_OF_MESSAGE = b"E"
    HELO = b"H"
    QUIT_NC = b"K"
    HEADER = b"L"
    MAIL = b"M"
    EOH = b"N"
    NEGOTIATE = b"O"
    QUIT = b"Q"
    RCPT = b"R"
    DATA = b"T"
    UNKNOWN = b"U"


class Response(bytes, Enum):
    """Letters from the milter to the MTA (``SMFIR_*`` of ``mfdef.h``)."""

    ADD_RECIPIENT = b"+"
    REMOVE_RECIPIENT = b"-"
    ADD_RECIPIENT_EXT = b"2"
    SHUTDOWN = b"4"
    ACCEPT = b"a"
    REPLACE_BODY = b"b"
    CONTINUE = b"c"
    DISCARD = b"d"
    REPLACE_SENDER = b"e"
    CONN_FAIL = b"f"
    ADD_HEADER = b"h"
    INSERT_HEADER = b"i"
    REPLACE_HEADER = b"m"
    NEGOTIATE = b"O"
    PROGRESS = b"p"
    QUARANTINE = b"q"
    REJECT = b"r"
    SKIP = b"s"
    TEMPFAIL = b"t"
    REPLY = b"y"


class Family(bytes, Enum):
    """Letters of the client's address in CONNECT (``SMFIA_*`` of ``mfdef.h``)."""

    INET = b"4"
    INET6 = b"6"
    UNIX = b"L"
    UNKNOWN = b"U"


class Actions(IntFlag):
    """What a milter may do to a message (``SMFIF_*`` of ``mfapi.h``)."""

    ADD_HEADER = 0x001
    REPLACE_BODY = 0x002
    ADD_RECIPIENT = 0x004
    REMOVE_RECIPIENT = 0x008
    REPLACE_HEADER = 0x010
    QUARANTINE = 0x020
    REPLACE_SENDER = 0x040
    ADD_RECIPIENT_EXT = 0x080
    REQUEST_MACROS = 0x100


class Steps(IntFlag):
    """Steps to leave out, answers to leave out, and abilities (``SMFIP_*`` of ``mfdef.h``)."""

    NO_CONNECT = 0x000001
    NO_HELO = 0x000002
    NO_MAIL = 0x000004
    NO_RCPT = 0x000008
    NO_BODY = 0x000010
    NO_HEADER = 0x000020
    NO_EOH = 0x000040
    NOREPLY_HEADER = 0x000080
    NO_UNKNOWN = 0x000100
    NO_DATA = 0x000200
    SKIP = 0x000400
    REJECTED_RCPT = 0x000800
    NOREPLY_CONNECT = 0x001000
    NOREPLY_HELO = 0x002000
    NOREPLY_MAIL = 0x004000
    NOREPLY_RCPT = 0x008000
    NOREPLY_DATA = 0x010000
    NOREPLY_UNKNOWN = 0x020000
    NOREPLY_EOH = 0x040000
    NOREPLY_BODY = 0x080000
    LEADING_SPACE = 0x100000


ALL_ACTIONS = Actions(0x1FF)
ALL_STEPS = Steps(0x1FFFFF)

# The step that keeps the MTA from sending a stage, and the one that keeps it from waiting for an answer.
DECLINE: Mapping[bytes, Steps] = MappingProxyType(
    {
        Command.CONNECT: Steps.NO_CONNECT,
        Command.HELO: Steps.NO_HELO,
        Command.MAIL: Steps.NO_MAIL,
        Command.RCPT: Steps.NO_RCPT,
        Command.DATA: Steps.NO_DATA,
        Command.HEADER: Steps.NO_HEADER,
        Command.EOH: Steps.NO_EOH,
        Command.BODY: Steps.NO_BODY,
        Command.UNKNOWN: Steps.NO_UNKNOWN,
    }
)
SILENCE: Mapping[bytes, Steps] = MappingProxyType(
    {
        Command.CONNECT: Steps.NOREPLY_CONNECT,
        Command.HELO: Steps.NOREPLY_HELO,
        Command.MAIL: Steps.NOREPLY_MAIL,
        Command.RCPT: Steps.NOREPLY_RCPT,
        Command.DATA: Steps.NOREPLY_DATA,
        Command.HEADER: Steps.NOREPLY_HEADER,
        Command.EOH: Steps.NOREPLY_EOH,
        Command.BODY: Steps.NOREPLY_BODY,
        Command.UNKNOWN: Steps.NOREPLY_UNKNOWN,
    }
)

# The numbers of the stages in a milter's lists of macros (``SMFIM_*`` of ``mfapi.h``).
MACRO_STAGES: Mapping[int, Command] = MappingProxyType(
    {
        0: Command.CONNECT,
        1: Command.HELO,
        2: Command.MAIL,
        3: Command.RCPT,
        4: Command.DATA,
        5: Command.END_OF_MESSAGE,
        6: Command.EOH,
    }
)


def command_name(letter: bytes) -> str:
    """The name of a command's letter, for messages to people: ``CONNECT``, or ``'Z'`` for an unknown one."""
    try:
        return Command(letter).name
    except ValueError:
        return repr(letter.decode("latin-1"))


def response_name(letter: bytes) -> str:
    """The name of an answer's letter, for messages to people: ``CONTINUE``, or ``'Z'`` for an unknown one."""
    try:
        return Response(letter).name
    except ValueError:
        return repr(letter.decode("latin-1"))


# ---- packets


@dataclass(frozen=True, slots=True)
class Packet:
    """One packet in either direction: a letter and its data.

    >>> Packet(Command.HELO, b"client.example\\0").encode()
    b'\\x00\\x00\\x00\\x10Hclient.example\\x00'
    """

    letter: bytes
    data: bytes = b""

    def encode(self) -> bytes:
        """The packet as it goes over the wire.

        Raises `WireError` if the letter is not one byte, or the data too long for the length.
        """
        if len(self.letter) != 1:
            raise WireError(f"a packet has a letter of one byte, not {bytes(self.letter)!r}")
        if len(self.data) >= 0xFFFFFFFF:
            raise WireError(f"{len(self.data)} bytes do not fit into one packet")
        return b"".join((struct.pack("!I", len(self.data) + 1), self.letter, self.data))


class Decoder:
    """Cuts a stream of bytes into packets, however the stream was cut on its way.

    >>> decoder = Decoder()
    >>> decoder.feed(b"\\0\\0\\0")
    >>> decoder.next() is None
    True
    >>> decoder.feed(b"\\1c")
    >>> decoder.next()
    Packet(letter=b'c', data=b'')
    """

    def __init__(self, limit: int = MAX_PACKET) -> None:
        """``limit``: the longest packet in bytes, letter included; a longer one is refused unread."""
        self._limit = limit
        self._buffer = bytearray()

    @property
    def pending(self) -> int:
        """How many bytes wait for the rest of their packet, or for `next`."""
        return len(self._buffer)

    def feed(self, data: bytes) -> None:
        """Take in what has come from the stream."""
        self._buffer += data

    def next(self) -> Packet | None:
        """The next whole packet, or None while bytes of it are missing.

        Raises `WireError` for a length of 0 or above the limit; the stream cannot be read on after that.
        """
        if len(self._buffer) < 4:
            return None
        (length,) = struct.unpack_from("!I", self._buffer)
        if not 1 <= length <= self._limit:
            raise WireError(f"a packet of {length} bytes was announced; 1 to {self._limit} are possible")
        if len(self._buffer) < 4 + length:
            return None
        packet = Packet(bytes(self._buffer[4:5]), bytes(self._buffer[5 : 4 + length]))
        del self._buffer[: 4 + length]
        return packet


# ---- strings and numbers inside a packet


def encode_text(text: str) -> bytes:
    """``text`` as UTF-8, bytes smuggled in by ``surrogateescape`` as they were.

    Raises `WireError` for surrogates that stand for no byte.
    """
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise WireError(f"{text!r} has no form in UTF-8: {error.reason}") from None


def decode_text(data: bytes) -> str:
    """``data`` read as UTF-8; bytes that are not become lone surrogates, and lose nothing."""
    return data.decode("utf-8", "surrogateescape")


def join_strings(*strings: str) -> bytes:
    """The strings, each ended by NUL. Raises `WireError` if one contains a NUL itself."""
    for string in strings:
        if "\0" in string:
            raise WireError(f"a string in a packet ends at its first NUL, so it cannot contain one: {string!r}")
    return b"".join(encode_text(string) + b"\0" for string in strings)


def split_strings(data: bytes) -> list[str]:
    """The NUL-terminated strings in ``data``. Raises `WireError` if the last one is not terminated.

    >>> split_strings(b"Subject\\0hello\\0")
    ['Subject', 'hello']
    """
    if not data:
        return []
    if not data.endswith(b"\0"):
        raise WireError(f"a string without its final NUL: {data[-60:]!r}")
    return [decode_text(string) for string in data[:-1].split(b"\0")]


def _split_number(data: bytes) -> tuple[int, bytes]:
    if len(data) < 4:
        raise WireError(f"a number of four bytes is due, not {data!r}")
    return int.from_bytes(data[:4], "big"), data[4:]


# ---- negotiation


# The versions that brought a stage (Postfix's milter8.c and Sendmail's milter.c agree).
_SINCE: Mapping[bytes, int] = {Command.UNKNOWN: 3, Command.DATA: 4}


@dataclass(frozen=True, slots=True)
class Negotiated:
    """What a milter answered to the MTA's offer.

    ``macros`` maps the number of a stage (see `MACRO_STAGES`) to the list of macros the milter asks
    for there, names separated by spaces, as it came.
    """

    version: int
    actions: Actions
    steps: Steps
    macros: Mapping[int, str]

    def declines(self, stage: bytes) -> bool:
        """Whether the MTA leaves out this stage: by a ``NO_*`` step, or because the version lacks it."""
        return self.version < _SINCE.get(stage, 0) or bool(self.steps & DECLINE.get(stage, Steps(0)))

    def silences(self, stage: bytes) -> bool:
        """Whether the milter does not answer this stage: it asked for its ``NOREPLY_*`` step."""
        return bool(self.steps & SILENCE.get(stage, Steps(0)))


def pack_offer(version: int, actions: int, steps: int) -> bytes:
    """The data of the MTA's NEGOTIATE. Raises `WireError` for a number that does not fit into 32 bits."""
    try:
        return struct.pack("!III", version, actions, steps)
    except struct.error as error:
        raise WireError(f"version {version}, actions {actions:#x}, steps {steps:#x}: {error}") from None


def read_negotiated(packet: Packet) -> Negotiated:
    """The milter's answer to NEGOTIATE. Raises `WireError` if it is another packet, or malformed."""
    if packet.letter != Response.NEGOTIATE:
        raise WireError(f"the milter answered {response_name(packet.letter)} to the negotiation")
    if len(packet.data) < 12:
        raise WireError(f"a negotiation takes 12 bytes, the milter sent {len(packet.data)}: {packet.data!r}")
    version, actions, steps = struct.unpack_from("!III", packet.data)
    return Negotiated(version, Actions(actions), Steps(steps), _read_macro_lists(packet.data[12:]))


def _read_macro_lists(data: bytes) -> dict[int, str]:
    lists: dict[int, str] = {}
    while data:
        stage, data = _split_number(data)
        names, terminator, data = data.partition(b"\0")
        if not terminator:
            raise WireError(f"the list of macros for stage {stage} has no final NUL: {names!r}")
        lists[stage] = decode_text(names)
    return lists


# ---- answers


class Verdict(Enum):
    """What a milter says to a stage."""

    CONTINUE = "continue"
    ACCEPT = "accept"
    REJECT = "reject"
    TEMPFAIL = "tempfail"
    DISCARD = "discard"
    SKIP = "skip"
    REPLY = "reply"


@dataclass(frozen=True, slots=True)
class Answer:
    """A milter's answer to one stage.

    The other fields are set with ``Verdict.REPLY`` only: ``code`` (400 to 599), ``enhanced``
    (``"5.7.1"``, or ``""``) as its first line has it, and the text of each line without either.
    ``raw`` is the whole reply as it was sent, lines separated by CRLF. A ``%`` is doubled in
    ``lines`` and ``raw`` if the milter did so, as libmilter's ``smfi_setreply`` demands.
    """

    verdict: Verdict
    code: int = 0
    enhanced: str = ""
    lines: tuple[str, ...] = ()
    raw: str = ""

    @property
    def rejects(self) -> bool:
        """Refused for good: REJECT, or a reply of 5xx."""
        return self.verdict is Verdict.REJECT or self.code >= 500

    @property
    def tempfails(self) -> bool:
        """Refused for now: TEMPFAIL, or a reply of 4xx."""
        return self.verdict is Verdict.TEMPFAIL or 400 <= self.code < 500

    def __str__(self) -> str:
        return " / ".join(self.raw.split("\r\n")) if self.raw else self.verdict.value


_PLAIN: Mapping[bytes, Verdict] = {
    Response.CONTINUE: Verdict.CONTINUE,
    Response.ACCEPT: Verdict.ACCEPT,
    Response.REJECT: Verdict.REJECT,
    Response.TEMPFAIL: Verdict.TEMPFAIL,
    Response.DISCARD: Verdict.DISCARD,
    Response.SKIP: Verdict.SKIP,
}


def read_answer(packet: Packet) -> Answer:
    """The answer in a milter's packet.

    Raises `WireError` for a packet that is no answer (a change, an unknown letter, SHUTDOWN and
    CONN_FAIL, which libmilter does not send), or one with data that it should not have.
    """
    if packet.letter == Response.REPLY:
        return _read_reply(packet.data)
    verdict = _PLAIN.get(packet.letter)
    if verdict is None:
        raise WireError(f"the milter sent {response_name(packet.letter)} where an answer was due")
    if packet.data:
        raise WireError(f"the milter sent {packet.data[:60]!r} with a plain {verdict.value}")
    return Answer(verdict)


_REPLY_LINE = re.compile(r"([45][0-9][0-9])([ -])(?:([245]\.[0-9]{1,3}\.[0-9]{1,3})(?: |$))?(.*)", re.DOTALL)


def _read_reply(data: bytes) -> Answer:
    strings = split_strings(data)
    if len(strings) != 1:
        raise WireError(f"a reply is one string, the milter sent {data[:60]!r}")
    matches = [_match_reply_line(line) for line in strings[0].split("\r\n")]
    separators = [match[2] for match in matches]
    if separators != ["-"] * (len(matches) - 1) + [" "]:
        raise WireError(f"every line of a reply but the last has '-' behind its code: {strings[0]!r}")
    texts = tuple(match[4] for match in matches)
    return Answer(Verdict.REPLY, int(matches[0][1]), matches[0][3] or "", texts, strings[0])


def _match_reply_line(line: str) -> re.Match[str]:
    match = _REPLY_LINE.fullmatch(line)
    if match is None:
        raise WireError(f"a reply starts with a code of 4xx or 5xx and a space, not {line[:60]!r}")
    return match


# ---- changes at the end of a message


@dataclass(frozen=True, slots=True)
class AddHeader:
    """Add a header field. ``value``: after the colon, as it was sent; folds are LF and white space."""

    name: str
    value: str


@dataclass(frozen=True, slots=True)
class InsertHeader:
    """Insert a header field at a position, an unsigned number of 32 bits that the MTAs count differently."""

    index: int
    name: str
    value: str


@dataclass(frozen=True, slots=True)
class ReplaceHeader:
    """Change the ``index``-th field of a name, counted from 1; the empty value deletes it."""

    index: int
    name: str
    value: str


@dataclass(frozen=True, slots=True)
class ReplaceSender:
    """Replace the envelope's sender.

    ``params``: ESMTP parameters separated by spaces, None if none were sent.
    """

    sender: str
    params: str | None = None


@dataclass(frozen=True, slots=True)
class AddRecipient:
    """Add a recipient. ``params``: as with `ReplaceSender`."""

    recipient: str
    params: str | None = None


@dataclass(frozen=True, slots=True)
class RemoveRecipient:
    """Remove a recipient from the envelope."""

    recipient: str


@dataclass(frozen=True, slots=True)
class ReplaceBody:
    """A piece of the new body; the pieces are joined in the order they came."""

    chunk: bytes


@dataclass(frozen=True, slots=True)
class Quarantine:
    """Hold the message instead of delivering it."""

    reason: str


@dataclass(frozen=True, slots=True)
class Progress:
    """No change: the milter asks the MTA for patience."""


Change = (
    AddHeader | InsertHeader | ReplaceHeader | ReplaceSender | AddRecipient | RemoveRecipient | ReplaceBody | Quarantine
)
Event = Change | Progress


def read_event(packet: Packet) -> Event | None:
    """The change or sign of progress in a milter's packet, None if it is another kind of packet.

    Raises `WireError` if it is malformed.
    """
    reader = _EVENTS.get(packet.letter)
    if reader is None:
        return None
    try:
        return reader(packet.data)
    except WireError as error:
        raise WireError(f"a malformed {response_name(packet.letter)}: {error}") from None


def _strings(data: bytes, least: int, most: int) -> list[str]:
    strings = split_strings(data)
    if not least <= len(strings) <= most:
        due = str(least) if least == most else f"{least} or {most}"
        raise WireError(f"{due} strings are due, not {len(strings)}")
    return strings


def _read_add_header(data: bytes) -> AddHeader:
    name, value = _strings(data, 2, 2)
    return AddHeader(name, value)


def _read_insert_header(data: bytes) -> InsertHeader:
    index, rest = _split_number(data)
    name, value = _strings(rest, 2, 2)
    return InsertHeader(index, name, value)


def _read_replace_header(data: bytes) -> ReplaceHeader:
    index, rest = _split_number(data)
    name, value = _strings(rest, 2, 2)
    return ReplaceHeader(index, name, value)


def _read_progress(data: bytes) -> Progress:
    if data:
        raise WireError(f"no data is due, not {data[:60]!r}")
    return Progress()


_EVENTS: Mapping[bytes, Callable[[bytes], Event]] = {
    Response.ADD_HEADER: _read_add_header,
    Response.INSERT_HEADER: _read_insert_header,
    Response.REPLACE_HEADER: _read_replace_header,
    Response.REPLACE_SENDER: lambda data: ReplaceSender(*_strings(data, 1, 2)),
    Response.ADD_RECIPIENT: lambda data: AddRecipient(*_strings(data, 1, 1)),
    Response.ADD_RECIPIENT_EXT: lambda data: AddRecipient(*_strings(data, 1, 2)),
    Response.REMOVE_RECIPIENT: lambda data: RemoveRecipient(*_strings(data, 1, 1)),
    Response.REPLACE_BODY: ReplaceBody,
    Response.QUARANTINE: lambda data: Quarantine(*_strings(data, 1, 1)),
    Response.PROGRESS: _read_progress,
}
