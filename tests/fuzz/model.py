# SPDX-License-Identifier: GPL-3.0-or-later
"""What libmilter, the library and ``filters/ordered.py`` must answer to any packets.

Three machines, one inside the other: libmilter's table of states and its readers of packets (`Model.packet`), the
library's account of a session and its messages (`_Session`), and the filter's orders (`_order`). Written from what
they promise, so each answer can be compared: a missing one, one too many, or a message accepted against its order.

Where libmilter does not know the session (no negotiation), nothing can be predicted but that nothing is accepted.
"""

import re
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from hashlib import sha256

from milter.testing import Packet
from milter.testing.wire import DECLINE, SILENCE, Actions, Command, Steps

LIMIT = 65535
"""Bytes of data in one packet."""

# What libmilter takes for the offer of a very old MTA, where it finds 0.
_OLD_ACTIONS, _OLD_STEPS = 0x0F, 0x3F
_ALL_SILENCES = 0
for _step in SILENCE.values():
    _ALL_SILENCES |= _step


class Kind(Enum):
    """Of ``filters/ordered.py``."""

    REPLYING = "replying"
    COROUTINES = "coroutines"
    OBSERVING = "observing"

    @property
    def wanted_steps(self) -> int:
        """What the library asks for, from the handlers that there are."""
        if self is Kind.OBSERVING:
            return _ALL_SILENCES & ~Steps.NOREPLY_UNKNOWN
        return Steps.LEADING_SPACE | (Steps.NOREPLY_HEADER if self.answers_together else 0)

    @property
    def answers_together(self) -> bool:
        """What is ordered at a header field is answered at the end of the header."""
        return self is Kind.REPLYING


# ---- What is expected


@dataclass(frozen=True)
class Expected:
    """One answer. `letters`: those possible; `changes`: a judge of the packets before it, which says what is wrong."""

    cause: str
    letters: str
    code: int = 0
    """The class of the code in a reply of one's own: 4 or 5."""
    changes: Callable[[Sequence[Packet]], str] = lambda packets: ""
    data: bytes = b""
    """What the data begins with."""


def _nothing(packets: Sequence[Packet]) -> str:
    return f"changes of a message that was not accepted: {packets!r}" if packets else ""


@dataclass
class Prediction:
    """Of a stream of bytes."""

    answers: list[Expected] = field(default_factory=list)
    closes: bool = False
    """The filter closes the connection by itself."""
    loose: bool = False
    """Nothing is known of what comes after `answers`, but that nothing is accepted."""


# ---- The filter's orders

_ORDER = re.compile(rb"=(\w+)\.(\w+)=")
_LETTERS = {
    b"accept": "a",
    b"reject": "r",
    b"tempfail": "t",
    b"discard": "d",
    b"skip": "s",
    b"reply4": "4",
    b"reply5": "5",
    b"raise": "t",
}
_MEANINGLESS = {"connect": "ds", "helo": "ds", "header": "", "body": "", "unknown": "ads"}


def _order(stage: str, *texts: bytes) -> bytes:
    for text in texts:
        for found in _ORDER.finditer(text):
            if found[1] == stage.encode():
                return found[2]
    return b""


def _verdict(stage: str, order: bytes) -> str:
    """The letter of the answer that is ordered; 4 and 5: a reply of one's own."""
    letter = _LETTERS.get(order, "c")
    return "t" if letter in _MEANINGLESS.get(stage, "s") else letter


# ---- The library


@dataclass
class _Message:
    sender: bytes
    recipients: list[bytes] = field(default_factory=list)
    fields: list[tuple[bytes, bytes]] = field(default_factory=list)
    body: bytes = b""
    skipped: set[str] = field(default_factory=set)


_WITHIN = ("rcpt", "data", "header", "eoh", "body", "eom")


class _Session:
    """One session of the library: from a negotiation, or from the end of the one before on the same connection."""

    def __init__(self, kind: Kind, actions: int, steps: int, failed: bool = False) -> None:
        self.kind = kind
        self.actions = actions
        self.steps = steps
        self.failed = failed
        """Something is unknown: all is refused."""
        self.message: _Message | None = None
        self._owed: dict[str, bool] = {}
        self._verdict_on_header = ""

    def silent(self, stage: str) -> bool:
        return bool(self.steps & _silence(stage))

    def connect(self, hostname: bytes) -> str:
        return self._stage("connect", hostname)

    def helo(self, name: bytes) -> str:
        self.abort()
        self._owed.pop("helo", None)
        return self._stage("helo", name)

    def mail(self, arguments: list[bytes]) -> str:
        self.abort()
        self.message = _Message(arguments[0])
        return self._stage("mail", *arguments)

    def rcpt(self, arguments: list[bytes]) -> str:
        message = self.message
        answer = self._stage("rcpt", *arguments)
        if message is not None and answer not in ("t", "r", "4", "5"):
            message.recipients.append(arguments[0])
        return answer

    def header(self, name: bytes, value: bytes) -> str:
        # An MTA that can show the space after the colon is asked to; handlers do not see it.
        shown = value.removeprefix(b" ") if self.steps & Steps.LEADING_SPACE else value
        if self.message is not None:
            self.message.fields.append((name, shown))
        return self._stage("header", name, shown)

    def body(self, chunk: bytes) -> str:
        if self.message is not None:
            self.message.body += chunk
        return self._stage("body", chunk)

    def bare(self, stage: str) -> str:
        """DATA, and the end of the header."""
        return self._stage(stage, self.message.sender if self.message is not None else b"")

    def unknown(self, command: bytes) -> str:
        return self._stage("unknown", command)

    def abort(self) -> None:
        self._forget_message()

    def end_of_message(self) -> tuple[str, Callable[[Sequence[Packet]], str]]:
        message = self.message
        if message is None:
            return "t", _nothing
        texts = [message.sender, *(part for entry in message.fields for part in entry), message.body]
        order = _order("eom", *texts)
        answer = "t" if self._owed else self._verdict_on_header or self._at_the_end(message, order)
        if self.failed and answer not in ("r", "5", "t", "4"):
            answer = "t"
        changes: Callable[[Sequence[Packet]], str] = lambda packets: ""  # noqa: E731
        if answer in ("c", "a") and not self.failed:
            changes = self._judge(message)
        elif self._owed:
            changes = _nothing
        self.abort()
        return answer, changes

    # -- within

    def _stage(self, stage: str, *texts: bytes) -> str:
        """The answer, or "" where the library says nothing."""
        if stage in _WITHIN and self.message is None:
            return "" if self.silent(stage) else "t"
        answer = self._handled(stage, *texts)
        if self.silent(stage):
            return ""
        if self.failed and answer not in ("r", "5", "t", "4"):
            answer = "t"
        if answer == "s":
            self._skip(stage)
            answer = "c"  # no filter here asks for SKIP: on_message wants all of the body
        if self._decides(stage, answer):
            self._forget_message()
        return answer

    def _handled(self, stage: str, *texts: bytes) -> str:
        order = _order(stage, *texts)
        if stage != "unknown" and self.kind is Kind.OBSERVING:
            # An observer that is given any order but "skip nothing" raises, or breaks its promise.
            if order in _LETTERS or order == b"continue":
                self._owe(stage)
            return "c"
        if self._owed:
            return "t"
        if self._verdict_on_header:
            return self._verdict_on_header
        if self.message is not None and stage in self.message.skipped:
            return "c"
        answer = _verdict(stage, order)
        if stage == "header" and self.kind.answers_together:
            if answer == "s":
                self._skip(stage)
            elif answer != "c" and self.message is not None:
                self._verdict_on_header = answer
        return answer

    def _owe(self, stage: str) -> None:
        if stage in ("connect", "helo"):
            self._owed[stage] = True
        elif self.message is not None:
            self._owed["message"] = True

    def _skip(self, stage: str) -> None:
        if self.message is not None:
            self.message.skipped.add(stage)

    def _decides(self, stage: str, answer: str) -> bool:
        if self.message is None or stage == "unknown" or answer == "c":
            return False
        return answer in ("a", "d") if stage == "rcpt" else True

    def _forget_message(self) -> None:
        self.message = None
        self._verdict_on_header = ""
        self._owed.pop("message", None)

    # -- the end

    def _at_the_end(self, message: _Message, order: bytes) -> str:
        if order == b"half":
            return "t"
        if order == b"act" and self._actions_needed(message) & ~self.actions:
            return "t"
        if order == b"act" and any(len(r) + 5 > LIMIT for r in message.recipients):
            return "t"
        if order == b"edit" and self.kind is not Kind.OBSERVING and self._edits_needed(message) & ~self.actions:
            return "t"
        return _verdict("eom", order)

    def _actions_needed(self, message: _Message) -> int:
        needed = int(~Actions.REMOVE_RECIPIENT & ~Actions.REQUEST_MACROS & 0x1FF)
        if any(_removable(recipient) for recipient in message.recipients):
            needed |= Actions.REMOVE_RECIPIENT
        return needed

    def _edits_needed(self, message: _Message) -> int:
        needed = int(Actions.ADD_HEADER)
        names = [name.lower() for name, _ in message.fields]
        subjects = [value for name, value in message.fields if name.lower() == b"subject"]
        if b"x-remove" in names or subjects not in ([], [b"edited"]):
            needed |= Actions.REPLACE_HEADER
        if _without_brackets(message.sender) != b"new@filter.example":
            needed |= Actions.REPLACE_SENDER
        if b"added@filter.example" not in map(_without_brackets, message.recipients):
            needed |= Actions.ADD_RECIPIENT
        if message.body != b"edited\r\n":
            needed |= Actions.REPLACE_BODY
        return needed

    def _judge(self, message: _Message) -> Callable[[Sequence[Packet]], str]:
        """Of the changes: the digest shows that the filter saw exactly what was sent."""
        due = self._digest(message) if self.actions & Actions.ADD_HEADER else None

        def judge(packets: Sequence[Packet]) -> str:
            digests = [
                packet.data.split(b"\0")[-2].strip()
                for packet in packets
                if packet.letter in (b"h", b"i") and b"X-Digest\0" in packet.data
            ]
            return "" if digests == ([due] if due else []) else f"the digests are {digests}, not {due!r}"

        return judge

    def _digest(self, message: _Message) -> bytes:
        parts = [message.sender, *message.recipients]
        parts += [part for entry in message.fields for part in entry]
        parts.append(message.body)
        return sha256(b"".join(b"%d:%b" % (len(part), part) for part in parts)).hexdigest().encode()


def _silence(stage: str) -> int:
    return int(SILENCE.get(_COMMANDS.get(stage, b""), 0))


def _without_brackets(address: bytes) -> bytes:
    return address[1:-1] if address[:1] == b"<" and address[-1:] == b">" else address


def _removable(recipient: bytes) -> bool:
    """What the library's check of an address lets through."""
    bare = _without_brackets(_without_brackets(recipient))
    return bool(bare) and not any(character in bare for character in b"<>\r\n")


_COMMANDS: dict[str, bytes] = {
    "connect": Command.CONNECT,
    "helo": Command.HELO,
    "mail": Command.MAIL,
    "rcpt": Command.RCPT,
    "data": Command.DATA,
    "header": Command.HEADER,
    "eoh": Command.EOH,
    "body": Command.BODY,
    "unknown": Command.UNKNOWN,
}

# ---- libmilter

# Its states: the letter of the command that led there; "-" is the beginning of a connection.
_ORDER_OF_STATES = "-OCHMRTLNBEQAUK"
_NEXT = {
    "-": "O",
    "O": "CU",
    "C": "HMU",
    "H": "HMU",
    "M": "RAU",
    "R": "LNTBERAU",
    "T": "NLA",
    "L": "NLA",
    "N": "BEA",
    "B": "EBA",
    "E": "QMUK",
    "Q": "",
    "A": "",
    "U": "HMRATBUQK",
    "K": "CU",
}
_IN_MESSAGE = "MRTLNB"
_NEEDS_DATA = "DBCHLMORU"
_OF_A_MESSAGE = "RTLNBE"


class Process:
    """libmilter's table of states: one for all connections, in which a declined stage stays declined.

    Arguments:
        redirected: libmilter's system calls are, so that the library knows more of a packet than libmilter tells.
    """

    def __init__(self, redirected: bool) -> None:
        self.redirected = redirected
        self._skipped: set[str] = set()

    def decline(self, steps: int) -> None:
        self._skipped |= {command.decode() for command, step in DECLINE.items() if steps & step}

    def leads(self, old: str, new: str) -> bool:
        position = _ORDER_OF_STATES.index(old)
        while new not in _NEXT[_ORDER_OF_STATES[position]]:
            position += 1
            if position == len(_ORDER_OF_STATES) or _ORDER_OF_STATES[position] not in self._skipped:
                return False
        return True


def packets_of(stream: bytes) -> Iterator[tuple[str, bytes]]:
    """The packets that libmilter reads; the letter "" stands for what ends the connection."""
    position = 0
    while position + 5 <= len(stream):
        size = int.from_bytes(stream[position : position + 4], "big", signed=True) - 1
        if size == -(1 << 31) - 1:
            size = (1 << 31) - 1
        letter = chr(stream[position + 4])
        position += 5
        if size <= 0:
            yield (letter if " " <= letter < "\x80" else ""), b""
            continue
        if size > LIMIT:
            yield "", b""
            return
        if position + size > len(stream):
            break
        yield letter, stream[position : position + size]
        position += size
    yield "", b""  # the end of the stream


class Model:
    """One connection."""

    def __init__(self, process: Process, kind: Kind) -> None:
        self.prediction = Prediction()
        self._process = process
        self._kind = kind
        self._state = "-"
        self._session: _Session | None = None
        # What was negotiated outlives the session where another one follows on the same connection.
        self._negotiated = False
        self._offered = 0
        self._steps = 0
        self._actions = 0

    @property
    def over(self) -> bool:
        return self.prediction.closes or self.prediction.loose

    def stream(self, data: bytes) -> Prediction:
        """All that a connection carries, after which the client says no more."""
        for letter, content in packets_of(data):
            if self.over:
                break
            self.packet(letter, content)
        return self.prediction

    def packet(self, letter: str, data: bytes) -> None:
        if letter == "" or letter not in _ORDER_OF_STATES + "D" or letter == "-":
            self._close()
            return
        if letter != "D" and not self._enter(letter):
            if letter == "Q":
                self._close()
            elif self._process.redirected and self._negotiated and letter in _OF_A_MESSAGE:
                self._answer_ignored(letter)
            return
        if letter in _NEEDS_DATA and not data:
            self._close()
            return
        if letter == "D":
            return
        self._state = letter
        self._read(letter, data)

    def _enter(self, letter: str) -> bool:
        """Does the table lead there, from here or from HELO? Else the command is ignored."""
        if self._process.leads(self._state, letter):
            return True
        if self._state in _IN_MESSAGE and self._session is not None:
            self._session.abort()
        self._state = "H"
        return self._process.leads("H", letter)

    def _answer_ignored(self, letter: str) -> None:
        """libmilter says nothing, and the library in its stead that it is to be tried again."""
        if not self._steps & SILENCE.get(letter.encode(), 0):
            self.prediction.answers.append(Expected(Command(letter.encode()).name, "t"))

    def _read(self, letter: str, data: bytes) -> None:
        if letter == "O":
            self._negotiate(data)
        elif letter in "QK":
            self._leave(letter)
        elif letter == "A":
            if self._session is not None:
                self._session.abort()
        else:
            self._event(letter, data)

    def _leave(self, letter: str) -> None:
        if letter == "Q":
            self._close()
        elif not self._negotiated:
            self.prediction.loose = True
        self._session = None

    def _close(self) -> None:
        self.prediction.closes = True
        self._session = None

    # -- the negotiation

    def _negotiate(self, data: bytes) -> None:
        version = int.from_bytes(data[:4], "big", signed=True)
        if len(data) < 12 or version < 2:
            self._close()
            return
        actions = int.from_bytes(data[4:8], "big") or _OLD_ACTIONS
        offered = int.from_bytes(data[8:12], "big") or _OLD_STEPS
        offered &= ~0x70000000
        steps = self._kind.wanted_steps & (offered | _ALL_SILENCES)
        if not offered & Steps.NO_DATA:
            steps |= Steps.NO_UNKNOWN & offered
        self._actions, self._steps, self._offered = actions & 0x1FF, steps, offered
        self._negotiated = True
        self._process.decline(steps)
        self._session = _Session(self._kind, self._actions, steps)
        shown = steps & ~(_ALL_SILENCES & ~offered)
        answer = b"".join(number.to_bytes(4, "big") for number in (min(6, version), actions & 0x1FF, shown))
        self.prediction.answers.append(Expected("NEGOTIATE", "O", data=answer, changes=_nothing))

    # -- the stages

    def _event(self, letter: str, data: bytes) -> None:
        answer = self._readers[letter](data)
        if answer is not None and not self.over:
            self._answer(letter, answer)

    @property
    def _readers(self) -> dict[str, Callable[[bytes], str | None]]:
        return {
            "C": self._connect,
            "H": self._helo,
            "M": self._mail,
            "R": self._rcpt,
            "T": lambda data: self._session_of().bare("data"),
            "L": self._header,
            "N": lambda data: self._session_of().bare("eoh"),
            "B": lambda data: self._session_of().body(data),
            "E": self._end_of_message,
            "U": self._unknown,
        }

    def _session_of(self, connect: bool = False) -> _Session:
        """libmilter's session. After QUIT_NC a new one, sound only if it begins with CONNECT."""
        if self._session is None:
            if not self._negotiated:
                self.prediction.loose = True
            self._session = _Session(self._kind, self._actions, self._steps, failed=not connect)
        return self._session

    def _connect(self, data: bytes) -> str | None:
        hostname = data.partition(b"\0")[0]
        if not _is_connect(data, self._process.redirected):
            self._close()
            return None
        return self._session_of(connect=True).connect(hostname)

    def _helo(self, data: bytes) -> str | None:
        if data[-1:] != b"\0":
            return None  # libmilter answers nothing
        return self._session_of().helo(data.partition(b"\0")[0])

    def _mail(self, data: bytes) -> str | None:
        if b"\0" not in data:
            self._close()
            return None
        return self._session_of().mail(_arguments(data))

    def _rcpt(self, data: bytes) -> str | None:
        if b"\0" not in data:
            self._close()
            return None
        return self._session_of().rcpt(_arguments(data))

    def _header(self, data: bytes) -> str | None:
        end = data.find(b"\0", 1)
        if data[-1:] != b"\0" or end < 0 or end >= len(data) - 1:
            self._close()
            return None
        return self._session_of().header(data.partition(b"\0")[0], data[end + 1 :].partition(b"\0")[0])

    def _unknown(self, data: bytes) -> str | None:
        if b"\0" not in data:
            # libmilter does not say how long it is. Where the library cannot tell either, garbage may follow.
            self._close()
            self.prediction.loose = not self._process.redirected
            return None
        return self._session_of().unknown(data.partition(b"\0")[0])

    def _end_of_message(self, data: bytes) -> str | None:
        session = self._session_of()
        if data and not self._process.redirected:
            self.prediction.loose = True  # what libmilter makes of it, see docs/libmilter.md
        if self.over:
            return None
        within = session.message is not None
        piece = session.body(data) if data else ""
        decided = within and session.message is None
        answer, changes = (piece, _nothing) if decided else session.end_of_message()
        self._answer("E", answer, changes)
        return None

    def _answer(self, letter: str, answer: str, changes: Callable[[Sequence[Packet]], str] = _nothing) -> None:
        cause = Command(letter.encode()).name
        if answer == "":
            if not self._offered & SILENCE[letter.encode()]:
                self.prediction.answers.append(Expected(cause, "c"))  # libmilter stands in
            return
        code = int(answer) if answer in "45" else 0
        self.prediction.answers.append(Expected(cause, "y" if code else answer, code, changes))
        if answer == "a" or (answer in "rdt45" and letter not in "RU"):
            self._state = "H"


def _arguments(data: bytes) -> list[bytes]:
    """What is behind the last NUL is lost."""
    return data[: data.rindex(b"\0")].split(b"\0")


def _is_connect(data: bytes, redirected: bool) -> bool:
    end = data.find(b"\0")
    if end < 0 or end + 1 >= len(data):
        return False
    family, rest = data[end + 1 : end + 2], data[end + 2 :]
    if family == b"U" or redirected:  # an address that cannot be read is then an unknown one
        return True
    if len(rest) <= 2 or data[-1:] != b"\0":
        return False
    address = rest[2:].partition(b"\0")[0]
    if family == b"L":
        return len(address) < 108
    try:
        if family == b"4":
            socket.inet_aton(address.decode("latin-1"))
        elif family == b"6":
            text = address.decode("latin-1")
            socket.inet_pton(socket.AF_INET6, text[5:] if text[:5].lower() == "ipv6:" else text)
        else:
            return False
    except (OSError, ValueError):
        return False
    return True
