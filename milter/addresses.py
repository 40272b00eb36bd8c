# SPDX-License-Identifier: GPL-3.0-or-later
"""Mail addresses: what a client wrote, as the servers read it, so that addresses can be compared.

A client may write one mailbox in many ways: ``<boss@mta.example>``, ``<Boss@MTA.Example.>``, ``<"boss"@mta.example>``.
Postfix and Sendmail deliver all of them to the same person. So an :class:`Address` is the reading, and has the
client's own text beside it. The grammar is that of RFC 5321 (section 4.1.2) and RFC 5322 (section 3.4), with the
liberties that both servers take; tests/spellings.py has what each of them was seen to do.

The work is linear in the length of the text, and nothing that a client sends raises.
"""

import re
from collections.abc import Iterable, Sequence
from encodings.idna import nameprep
from functools import lru_cache
from ipaddress import ip_address

from milter.envelope import Params

__all__ = ["Address", "Mailboxes"]


class Address(str):
    """A sender or recipient, as the server reads it: a ``str``, ``""`` for the null sender of a bounce.

    Brackets, comments, white space, source routes and needless quotes are gone. The domain is in lower case, as DNS
    has it (``xn--…``), without a final dot. The local part keeps its case. An Address is equal to its text, and has
    its hash; to compare it with other addresses use :meth:`matches`, or :attr:`canonical` for tables.

    >>> sender = Address.from_arguments(['< "Ann" @EXAMPLE.org.>(me)', "SIZE=100"])
    >>> sender, sender.raw, sender.params["SIZE"]
    ('Ann@example.org', '< "Ann" @EXAMPLE.org.>(me)', '100')
    >>> sender.matches("ann@example.org"), sender.matches("example.org"), sender.matches(".org", "ann@example.net")
    (True, True, True)
    >>> Address("< >") == ""
    True
    """

    __slots__ = ("_arguments", "_domain", "_from_server", "_local", "_params")
    _arguments: Sequence[str]
    _from_server: bool
    _local: str
    _domain: str
    _params: Params | None

    def __new__(cls, raw: str = "") -> "Address":
        """Of the text of a client, in any spelling."""
        usual = _USUAL.fullmatch(raw)
        if usual is not None:  # nearly all are
            local, domain = usual["local"], usual["domain"].lower()
            address = super().__new__(cls, f"{local}@{domain}")
        else:
            local, domain = _read(raw)
            address = super().__new__(cls, _text(local, domain))
        address._arguments = (raw,)
        address._from_server = False
        address._local = local
        address._domain = domain
        address._params = None
        return address

    @classmethod
    def from_arguments(cls, arguments: Sequence[str]) -> "Address":
        """Make one of the arguments of a MAIL or RCPT command, the address first."""
        address = cls(arguments[0] if arguments else "")
        address._arguments = arguments
        address._from_server = True
        return address

    @property
    def raw(self) -> str:
        """The address exactly as the client wrote it."""
        return self._arguments[0] if self._arguments else ""

    @property
    def from_server(self) -> bool:
        """Was it told by a server, in a command? Then it can be given back as it is, however odd."""
        return self._from_server

    @property
    def params(self) -> Params:
        """The ESMTP parameters that came with it."""
        if self._params is None:
            self._params = Params(self._arguments[1:])
        return self._params

    @property
    def local(self) -> str:
        """The local part, without quotes and backslashes; its case is the client's.

        >>> Address('<"ann smith"@example.org>').local
        'ann smith'
        """
        return self._local

    @property
    def domain(self) -> str:
        """The domain, in lower case and as DNS has it; ``""`` if there is none. An address literal keeps its brackets.

        >>> Address("<ann@Bücher.Example.>").domain, Address("<ann@[IPv6:2001:DB8:0::1]>").domain
        ('xn--bcher-kva.example', '[IPv6:2001:db8::1]')
        """
        return self._domain

    @property
    def canonical(self) -> str:
        """The same text for all spellings of a mailbox, upper and lower case included: a key for tables.

        RFC 5321 (section 2.4) allows local parts that differ in case alone; Postfix and Sendmail deliver both to the
        same mailbox.
        """
        return _text(self._local.casefold(), self._domain)

    @property
    def complete(self) -> bool:
        """Does it say by itself whose mailbox it is? Otherwise only the server knows.

        False without a domain, since the server adds its own; ``postmaster`` alone is complete (RFC 5321, section
        4.5.1). False if the local part contains ``%``, ``!`` or ``@``: if the domain is the server's own, it takes that
        for a route to another one. Where the mail goes then, Postfix and Sendmail tell in the macros ``{rcpt_addr}``
        and ``{mail_addr}``. The null sender is complete.

        >>> Address("<ann%example.net@example.org>").complete, Address("<ann>").complete, Address("<>").complete
        (False, False, True)
        """
        if not self._domain:
            return self._local.lower() in ("", "postmaster")
        return _ROUTE.search(self._local) is None

    def matches(self, *patterns: str) -> bool:
        """Is it one of these? False for the null sender, and for an address without a domain.

        Arguments:
            patterns: a mailbox, ``"boss@example.org"``; a domain, ``"example.org"`` or ``"@example.org"``; or all
                domains below one, ``".example.org"``. In any spelling.

        Raises ``ValueError`` for a pattern that is none of these.

        >>> boss = Address("<BOSS@Mail.Example.org>")
        >>> boss.matches("example.org"), boss.matches(".example.org"), boss.matches("boss@mail.example.org")
        (False, True, True)
        """
        kinds = [_pattern(pattern) for pattern in patterns]  # all of them, so that a wrong one is always noticed
        return any(_fits(self, kind, text) for kind, text in kinds)


# ---- How a text is read

# What needs no reading: a dot-atom at a domain of ASCII, with or without brackets.
_ATOM = r"[\w#$&'*+/=?^`{|}~-]+"
_USUAL = re.compile(
    rf"(?P<bracket><)?(?P<local>{_ATOM}(?:\.{_ATOM})*)@(?P<domain>[a-z0-9-]+(?:\.[a-z0-9-]+)*)(?(bracket)>)",
    re.ASCII | re.IGNORECASE,
)
_ROUTE = re.compile("[%!@]")
_SPACE = " \t\n\v\f\r"
_BOUNDARIES = frozenset([*"@.,:;<>%!", '""'])

# A quoted string, a quoted pair, an address literal, or one character; unfinished ones are single characters.
_TOKEN = re.compile(r'"(?:\\.|[^"\\])*"|\\.|\[[^\[\]\\"()<>]*\]|[ \t-\r]+|.', re.DOTALL)
_PAIR = re.compile(r"\\(.)", re.DOTALL)


def _read(raw: str) -> tuple[str, str]:
    """Local part and domain; both empty for the null sender."""
    words = _bare(_words(raw))
    if len(words) == 1 and words[0][0] == '"' and len(words[0]) > 1:
        words = _bare(_words(_meaning(words)))  # `"boss@mta.example"` as a whole; Sendmail reads a sender otherwise
    if "@" not in words:
        words = ["@" if word == r"\@" else word for word in words]  # so does Postfix
    if "@" in words:
        place = len(words) - 1 - words[::-1].index("@")
        local, domain = _meaning(words[:place]), _meaning(words[place + 1 :])
    else:
        local, domain = _rewritten(_meaning(words))
    return local, _domain(domain)


def _words(text: str) -> list[str]:
    """The tokens of a text, without its comments. White space between two words is a dot, as Sendmail reads it."""
    words: list[str] = []
    depth = 0
    gap = False
    for token in _TOKEN.findall(text):
        if depth or token == "(":
            depth += _depth(token)
        elif token[0] in _SPACE:
            gap = True
        else:
            if gap and words and words[-1] not in _BOUNDARIES and token not in _BOUNDARIES:
                words.append(".")
            words.append(token)
            gap = False
    return words


def _depth(token: str) -> int:
    """How much deeper in comments: there a quote means nothing."""
    if token[0] in '"[' and len(token) > 1:
        unescaped = _PAIR.sub("", token)
        return unescaped.count("(") - unescaped.count(")")
    return (token == "(") - (token == ")")


def _bare(words: list[str]) -> list[str]:
    """What stands in the innermost brackets, behind routes and the name of a group."""
    if "<" in words:
        words = words[len(words) - words[::-1].index("<") :]
    if ">" in words:
        place = words.index(">")
        outside = [word for word in words[place + 1 :] if word not in (",", ";", ">")]
        words = words[:place] if place or not outside else outside  # `<>x` is x for Postfix
    begin, end = 0, len(words)
    grouped = end > 0 and words[-1] == ";"
    while end > 0 and words[end - 1] in (",", ";", "@"):
        end -= 1
    while begin < end and words[begin] in (",", ";", ":"):
        begin += 1
    words = words[begin:end]
    colons = [place for place, word in enumerate(words) if word == ":"]
    begin = 0
    for colon in colons:  # `@relay.example:ann@mta.example`, `friends:ann@mta.example;`
        if begin < len(words) and (words[begin] in ("@", ",", ":") or grouped):
            begin = colon + 1
    while begin < len(words) and words[begin] in (",", ":"):
        begin += 1
    return words[begin:]


def _meaning(words: list[str]) -> str:
    return "".join([_PAIR.sub(r"\1", word[1:-1] if word[0] == '"' and len(word) > 1 else word) for word in words])


def _rewritten(local: str) -> tuple[str, str]:
    """Without a domain both servers take ``mta.example!boss`` and ``boss%mta.example`` for ``boss@mta.example``."""
    host, bang, user = local.partition("!")
    if bang and host and user:
        return user, host
    user, percent, host = local.rpartition("%")
    return (user, host) if percent and host and user else (local, "")


# ---- Domains

_DOTS = re.compile("[\u3002\uff0e\uff61]")  # RFC 3490, section 3.1
# The old standard for names in DNS maps these to others, the present one does not (UTS 46, section 7).
_DEVIATIONS = re.compile("([\u00df\u03c2\u200c\u200d])")
_LONGEST_DOMAIN = 1000
_LONGEST_LABEL = 63  # RFC 1035, section 2.3.4


def _domain(text: str) -> str:
    """In lower case, as DNS has it, without final dots. What cannot be a name there stays as it is."""
    domain = text.lower().rstrip(".")
    if not domain.isascii() and len(domain) <= _LONGEST_DOMAIN:
        domain = ".".join([_label(label) for label in _DOTS.sub(".", domain).split(".")]).rstrip(".")
    return _literal(domain) if domain[:1] == "[" else domain


def _label(label: str) -> str:
    if label.isascii() or len(label) > _LONGEST_LABEL:
        return label
    try:
        parts = _DEVIATIONS.split(label)
        mapped = "".join([part if _DEVIATIONS.fullmatch(part) else nameprep(part) for part in parts]).lower()
        return mapped if mapped.isascii() else f"xn--{mapped.encode('punycode').decode('ascii')}"
    except UnicodeError:
        return label


def _literal(text: str) -> str:
    """``[192.0.2.1]`` and ``[IPv6:2001:db8::1]``, the latter in one spelling (RFC 5952)."""
    kind, colon, address = text[1:-1].partition(":")
    try:
        return f"[IPv6:{ip_address(address)}]" if colon and kind == "ipv6" else text
    except ValueError:
        return text


# ---- The text of an address, and patterns

_ATEXT = r'[^"(),:;<>@\[\\\].\x00-\x20\x7f]+'
_DOT_ATOM = re.compile(rf"{_ATEXT}(?:\.{_ATEXT})*")
_QUOTED = re.compile(r'(["\\])')


def _text(local: str, domain: str) -> str:
    if not local and not domain:
        return ""
    if not _DOT_ATOM.fullmatch(local):
        local = '"' + _QUOTED.sub(r"\\\1", local) + '"'
    return f"{local}@{domain}" if domain else local


_NAME = re.compile(rf"{_ATEXT}(?:\.{_ATEXT})*|\[[^\s\[\]]+\]")


@lru_cache(maxsize=1024)
def _pattern(pattern: str) -> tuple[str, str]:
    """Its kind and its canonical text."""
    name = pattern.removeprefix("@")
    if "@" in name:
        address = Address(name)
        if address.local and address.complete:
            return "mailbox", address.canonical
    else:
        below = name.startswith(".")
        domain = _domain(name.removeprefix("."))
        if _NAME.fullmatch(domain):
            return ("below", f".{domain}") if below else ("domain", domain)
    raise ValueError(
        f"{pattern!r} is no pattern for addresses; write a mailbox (boss@example.org), a domain (example.org), or a "
        "dot and a domain for all below it (.example.org)"
    )


def _fits(address: Address, kind: str, text: str) -> bool:
    if kind == "mailbox":
        return address.canonical == text
    return address.domain == text if kind == "domain" else address.domain.endswith(text)


# ---- Many addresses


class Mailboxes:
    """Addresses that are found in any spelling and taken out, each in the same time, however many there are.

    >>> mailboxes = Mailboxes(map(Address, ["bob@mta.example", "Bob@mta.example", "BOB@mta.example"]))
    >>> mailboxes.take("Bob@mta.example"), mailboxes.take("boB@mta.example"), "bob@mta.example" in mailboxes
    (['Bob@mta.example'], ['bob@mta.example', 'BOB@mta.example'], False)
    """

    __slots__ = ("_spellings",)

    def __init__(self, addresses: Iterable[Address]) -> None:
        # By the canonical text, and then by the text: one mailbox can be written in very many ways.
        self._spellings: dict[str, dict[str, list[Address]]] = {}
        for address in addresses:
            self.add(address)

    def add(self, address: Address) -> None:
        self._spellings.setdefault(address.canonical, {}).setdefault(address, []).append(address)

    def __contains__(self, address: str) -> bool:
        return Address(address).canonical in self._spellings

    def take(self, address: str) -> list[Address]:
        """Take out those with this text; if there are none, those with another spelling of it."""
        reading = Address(address)
        spellings = self._spellings.get(reading.canonical, {})
        same = spellings.pop(reading, None)
        if same is None or not spellings:
            self._spellings.pop(reading.canonical, None)
        return same if same is not None else [each for others in spellings.values() for each in others]
