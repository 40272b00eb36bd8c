# SPDX-License-Identifier: GPL-3.0-or-later
"""Who talks to the MTA, and what comes with the addresses of a message: client addresses, parameters.

Plain values, made by the engine from what libmilter tells, in UTF-8 with ``surrogateescape``: no
byte is lost, and ``text.encode("utf-8", "surrogateescape")`` gives the bytes back.
"""

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import TypeAlias

__all__ = ["ClientAddress", "InetAddress", "Params", "UnixAddress"]


@dataclass(frozen=True, slots=True)
class InetAddress:
    """The IPv4 or IPv6 address of an SMTP client.

    >>> address = InetAddress("2001:db8::5", 25)
    >>> print(address, address.ip.version)
    [2001:db8::5]:25 6
    """

    host: str
    """The address as text, without brackets."""
    port: int
    """0 when the MTA does not know it (Postfix: mail from its own command line)."""

    @property
    def ip(self) -> IPv4Address | IPv6Address:
        """The address as an object of the standard library, for comparing it with networks."""
        return ip_address(self.host)

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class UnixAddress:
    """The path of the Unix-domain socket from which an SMTP client came."""

    path: str

    def __str__(self) -> str:
        return f"unix:{self.path}"


ClientAddress: TypeAlias = InetAddress | UnixAddress | None


def client_address(family: str, port: str, host: str) -> ClientAddress:
    """Of the strings in the shim's log; the families are told in ``milter_shim.c``."""
    if family == "U":
        return None
    return UnixAddress(host) if family == "L" else InetAddress(host, int(port))


_IN_XTEXT = ("AUTH", "ENVID", "ORCPT")
_HEXCHAR = re.compile(r"(?:\+[0-9A-F]{2})+")
_EMBEDDED = re.compile(r"\\x\{([0-9A-F]{2,6})\}")


def from_xtext(text: str) -> str:
    """What was encoded as xtext (RFC 3461, section 4), or in an ORCPT of type utf-8 (RFC 6533, section 3).

    What is no xtext stays as it is.
    """
    decoded = _HEXCHAR.sub(lambda hexchars: bytes.fromhex(hexchars[0].replace("+", "")).decode(*_UTF_8), text)
    return _EMBEDDED.sub(_character, decoded) if decoded.lower().startswith("utf-8;") else decoded


_UTF_8 = ("utf-8", "surrogateescape")


def _character(embedded: re.Match[str]) -> str:
    number = int(embedded[1], 16)
    return chr(number) if number <= sys.maxunicode else embedded[0]


class Params(Mapping[str, str | None]):
    """The ESMTP parameters of a MAIL or RCPT command (RFC 5321, section 4.1.2).

    Keywords are matched without regard to case; a parameter without ``=`` has the value None. The values of ENVID,
    ORCPT (RFC 3461) and AUTH (RFC 4954) are decoded: clients write them in xtext, ``+2B`` for ``+``.

    >>> params = Params(["size=2048", "SMTPUTF8", "AUTH=ann+2Bx@example.org"])
    >>> params["SIZE"], params["smtputf8"], params["AUTH"], "BODY" in params
    ('2048', None, 'ann+x@example.org', False)
    >>> params.raw
    ('size=2048', 'SMTPUTF8', 'AUTH=ann+2Bx@example.org')
    """

    __slots__ = ("_raw", "_values")

    def __init__(self, raw: Sequence[str] = ()) -> None:
        self._raw = tuple(raw)
        self._values: dict[str, str | None] | None = None

    @property
    def raw(self) -> tuple[str, ...]:
        """The parameters as the client wrote them, in order."""
        return self._raw

    def __getitem__(self, keyword: str) -> str | None:
        try:
            return self._by_keyword()[keyword.upper()]
        except KeyError:
            raise KeyError(keyword) from None

    def __contains__(self, keyword: object) -> bool:
        return isinstance(keyword, str) and keyword.upper() in self._by_keyword()

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_keyword())

    def __len__(self) -> int:
        return len(self._by_keyword())

    def __repr__(self) -> str:
        return f"Params({list(self._raw)!r})"

    def _by_keyword(self) -> dict[str, str | None]:
        """The first of each keyword. Made once: a client may write hundreds."""
        if self._values is None:
            values: dict[str, str | None] = {}
            for parameter in self._raw:
                name, equals, value = parameter.partition("=")
                keyword = name.upper()
                if keyword not in values:
                    decoded = from_xtext(value) if keyword in _IN_XTEXT else value
                    values[keyword] = decoded if equals else None
            self._values = values
        return self._values
