# SPDX-License-Identifier: GPL-3.0-or-later
"""Scenarios: what a client says and is told, what a filter does, what is delivered. scenarios/README.md tells how.

This reads the files. What a scenario says depends on the server in the lines that name one; `Scenario.on` gives
what counts for a server.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from .notation import unescape

DIRECTORY = Path(__file__).parent / "scenarios"
SERVERS = ("postfix", "sendmail")
OWN_TRACE = "Received: (the server's own)"
NOBODY = "nobody"
"""The filter that is not there."""

_CONDITION = re.compile(r"(postfix|sendmail)\[([a-z0-9-]+)\]> ?(.*)")
_KEYWORD = re.compile(r"([a-zA-Z]+):(?: (.*))?")
_ORDER = re.compile(r"    ([a-z]+)(?: ([^ :]+))?: (.*)")
_REPLY = re.compile(r"([2-5][0-9][0-9])(?:([ -])(.*))?")
_MAILBOX = re.compile(r'<((?:"[^"]*"|[^">])*)>((?: [^ ]+)*)|((?:"[^"]*"|[^" <>])*)')


class ScenarioError(Exception):
    """A scenario cannot be read: where, and what is wrong."""


@dataclass(frozen=True)
class Line:
    """A line of a file. `server`: the only one for which it counts, if any, and `reason` why."""

    number: int
    text: str
    server: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Sent:
    """What the client sends: bytes, line ends included."""

    raw: bytes


@dataclass(frozen=True)
class Act:
    """What the client does else: ``drop`` the connection, ``tls`` (the handshake), or ``wait`` for its end."""

    name: str


@dataclass(frozen=True)
class Expected:
    """A reply that is due. Without `lines`, the text does not matter."""

    number: int
    code: int
    lines: tuple[str, ...] | None = None
    others: "tuple[Expected, ...]" = ()
    """What other versions of the server say."""

    def __str__(self) -> str:
        return str(self.code) if self.lines is None else " / ".join(f"{self.code} {line}" for line in self.lines)


Step = Sent | Act | Expected


@dataclass(frozen=True)
class Mail:
    """A message as it is delivered, or held. Recipients are in order of their addresses."""

    number: int = field(compare=False)
    sender: str
    recipients: tuple[str, ...]
    content: bytes
    reason: str = ""


@dataclass(frozen=True)
class Order:
    stage: str
    argument: str
    text: str


@dataclass(frozen=True)
class Filter:
    """A filter of `filters/` with its arguments, and the orders for it."""

    command: str
    orders: tuple[Order, ...] = ()


@dataclass(frozen=True)
class Script:
    """A scenario for one server."""

    filters: tuple[Filter, ...] = ()
    settings: tuple[tuple[str, str], ...] = ()
    steps: tuple[Step, ...] = ()
    submitted: Mail | None = None
    delivered: tuple[Mail, ...] = ()
    held: tuple[Mail, ...] = ()
    watched: frozenset[str] = frozenset()
    seen: tuple[str, ...] = ()
    unmodelled: str = ""
    """Why the models do not know what happens here."""


@dataclass(frozen=True)
class Scenario:
    """A file."""

    path: Path
    title: str
    lines: tuple[Line, ...]
    servers: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.path.stem

    def on(self, server: str) -> Script:
        """What counts for this server."""
        lines = [line for line in self.lines if line.server in ("", server)]
        return _Reader(self.path, server).read(lines)


@cache
def all_scenarios() -> tuple[Scenario, ...]:
    return tuple(read(path) for path in sorted(DIRECTORY.glob("*.txt")) if path.name != "differences.txt")


def read(path: Path) -> Scenario:
    """Read a file. Raises `ScenarioError` for whatever is wrong in it, for either server."""
    lines = tuple(_lines(path))
    title = ""
    servers: tuple[str, ...] = SERVERS
    for line in lines:
        if line.text.startswith("title: "):
            title = line.text.removeprefix("title: ")
        elif line.text.startswith("only: "):
            server = line.text.removeprefix("only: ").partition(" ")[0]
            if server not in SERVERS:
                raise ScenarioError(f"{path}:{line.number}: there is no server {server!r}, but {', '.join(SERVERS)}")
            servers = (server,)
    if not title:
        raise ScenarioError(f"{path}:1: a scenario begins with its title: 'title: …'")
    scenario = Scenario(path, title, lines, servers)
    for server in servers:
        scenario.on(server)
    return scenario


def _lines(path: Path) -> Iterator[Line]:
    for number, text in enumerate(path.read_text().splitlines(), 1):
        if text.startswith("#") or not text.strip():
            continue
        match = _CONDITION.fullmatch(text)
        if match:
            yield Line(number, match[3], match[1], match[2])
        elif re.match("(postfix|sendmail)\\S*>", text):
            raise ScenarioError(f"{path}:{number}: a difference needs a reason: 'postfix[reason]> …'")
        else:
            yield Line(number, text)


class _Reader:
    """Reads the lines that count for a server, in order; each kind of line has a method."""

    def __init__(self, path: Path, server: str) -> None:
        self._path = path
        self._server = server
        self._number = 0
        self._filters: list[Filter] = []
        self._settings: list[tuple[str, str]] = []
        self._steps: list[Step] = []
        self._mails: dict[str, list[Mail]] = {"delivered": [], "held": [], "submit": []}
        self._open: list[Mail] | None = None
        self._said_nothing = False
        self._watched: frozenset[str] = frozenset()
        self._seen: list[str] = []
        self._reply: list[str] = []
        self._unmodelled = ""

    def read(self, lines: Sequence[Line]) -> Script:
        for line in lines:
            self._number = line.number
            self._line(line.text)
        if not self._filters:
            self._fail("there is no filter: 'filter: obey'")
        if not (self._mails["delivered"] or self._mails["held"] or self._said_nothing):
            self._fail("nothing says what is delivered: 'delivered: …', or 'delivered: nothing'")
        return Script(
            tuple(self._filters),
            tuple(sorted(self._settings)),
            tuple(self._greeted(self._steps)),
            next(iter(self._mails["submit"]), None),
            tuple(self._mails["delivered"]),
            tuple(self._mails["held"]),
            self._watched,
            tuple(self._seen),
            self._unmodelled,
        )

    def _fail(self, problem: str) -> None:
        raise ScenarioError(f"{self._path}:{self._number}: {problem}")

    def _line(self, text: str) -> None:
        if text.startswith("|"):
            self._content(text[1:].removeprefix(" "))
            return
        if text.startswith("    "):
            self._order(text)
            return
        match = _KEYWORD.fullmatch(text)
        reader = getattr(self, f"_read_{match[1]}", None) if match else None
        if match is None or reader is None:
            self._fail(f"this is no line of a scenario: {text!r}")
            return
        if self._reply and match[1] != "S":
            self._fail("a reply has no last line: a space stands behind the code there")
        reader(match[2] or "")

    # ---- each kind of line

    def _read_title(self, text: str) -> None:
        pass

    def _read_only(self, text: str) -> None:
        if not text.partition(" ")[2]:
            self._fail("a scenario for one server needs a reason: 'only: postfix because …'")

    def _read_unmodelled(self, text: str) -> None:
        servers, because, reason = text.partition(" because ")
        if not because or not set(servers.split(", ")) <= set(SERVERS):
            self._fail("say of which servers, and why: 'unmodelled: postfix, sendmail because …'")
        if self._server in servers:
            self._unmodelled = reason

    def _read_filter(self, text: str) -> None:
        self._filters.append(Filter(text))

    def _order(self, text: str) -> None:
        match = _ORDER.fullmatch(text)
        if match is None or not self._filters:
            self._fail("an order for a filter stands below it: '    stage [argument]: order'")
            return
        last = self._filters.pop()
        order = Order(match[1], match[2] or "", match[3])
        self._filters.append(replace(last, orders=(*last.orders, order)))

    def _setting(self, server: str, text: str) -> None:
        name, equals, value = text.partition("=")
        if not equals:
            self._fail("a setting has a name and a value: 'postfix: name = value'")
        if server == self._server:
            self._settings.append((name.strip(), value.strip()))

    def _read_postfix(self, text: str) -> None:
        self._setting("postfix", text)

    def _read_sendmail(self, text: str) -> None:
        self._setting("sendmail", text)

    def _read_C(self, text: str) -> None:
        match = re.fullmatch(r"\((drop|tls|wait)\)", text)
        self._steps.append(Act(match[1]) if match else Sent(self._bytes(text) + b"\r\n"))

    def _read_S(self, text: str) -> None:
        match = _REPLY.fullmatch(text)
        if match is None:
            self._fail(f"a reply has a code of three digits: {text!r}")
            return
        code, separator, line = match.groups()
        if separator:
            self._reply.append(self._bytes(line).decode("utf-8", "surrogateescape"))
        if separator != "-":
            self._steps.append(Expected(self._number, int(code), tuple(self._reply) or None))
            self._reply = []

    def _read_or(self, text: str) -> None:
        match = _REPLY.fullmatch(text)
        if match is None or not self._steps or not isinstance(due := self._steps[-1], Expected):
            self._fail("another reply stands below a reply: 'or: 500 …'")
            return
        other = Expected(self._number, int(match[1]), (match[3],) if match[3] else None)
        self._steps[-1] = replace(due, others=(*due.others, other))

    def _read_submit(self, text: str) -> None:
        self._mail("submit", text)

    def _read_delivered(self, text: str) -> None:
        if text == "nothing":
            self._said_nothing = True
        else:
            self._mail("delivered", text)

    def _read_held(self, text: str) -> None:
        self._mail("held", text)

    def _mail(self, kind: str, text: str) -> None:
        text, _, reason = text.partition(" because ")
        sender, arrow, recipients = text.partition(" -> ")
        if not arrow:
            self._fail(f"a message goes from one to others: '{kind}: ann@client.test -> bob@sink.test'")
        mailboxes = sorted(self._mailbox(recipient) for recipient in recipients.split(", "))
        self._open = self._mails[kind]
        self._open.append(Mail(self._number, self._mailbox(sender), tuple(mailboxes), b"", reason))

    def _mailbox(self, text: str) -> str:
        """An address in brackets, with its parameters in order."""
        match = _MAILBOX.fullmatch(text)
        if match is None:
            self._fail(f"this is no address, with or without parameters: {text!r}")
            return ""
        return mailbox(match[1] or match[3] or "", (match[2] or "").split())

    def _content(self, text: str) -> None:
        if not self._open:
            self._fail("content stands below the message: 'delivered: …'")
            return
        mail = self._open.pop()
        self._open.append(replace(mail, content=mail.content + self._bytes(text) + b"\r\n"))

    def _read_watch(self, text: str) -> None:
        self._watched = frozenset(text.split())

    def _read_F(self, text: str) -> None:
        stage = text.partition(" ")[0]
        if stage not in self._watched:
            self._fail(f"the stage {stage!r} is not watched: 'watch: {stage}'")
        self._seen.append(text)

    def _bytes(self, text: str) -> bytes:
        try:
            return unescape(text)
        except ValueError as error:
            raise ScenarioError(f"{self._path}:{self._number}: {error}") from None

    def _greeted(self, steps: list[Step]) -> list[Step]:
        """A dialogue that does not begin with the greeting begins with the usual one."""
        if not steps or isinstance(steps[0], Expected):
            return steps
        return [Expected(0, 220), Sent(b"EHLO client.test\r\n"), Expected(0, 250), *steps]


def mailbox(address: str, params: Sequence[str]) -> str:
    """An address and its parameters in one text, in which those that mean the same are equal."""
    return " ".join([f"<{address}>", *sorted(params)])
