# SPDX-License-Identifier: GPL-3.0-or-later
"""Who talks to the MTA, and what it says of a message: client addresses, mail addresses, parameters.

Plain values, made by the engine from what libmilter tells, in UTF-8 with ``surrogateescape``: no
byte is lost, and ``text.encode("utf-8", "surrogateescape")`` gives the bytes back.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import TypeAlias

__all__ = ["Address", "ClientAddress", "InetAddress", "Params", "UnixAddress"]


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


class Params(Mapping[str, str | None]):
    """The ESMTP parameters of a MAIL or RCPT command (RFC 5321, section 4.1.2).

    Keywords are matched without regard to case; a parameter without ``=`` has the value None.

    >>> params = Params(["size=2048", "SMTPUTF8"])
    >>> params["SIZE"], params["smtputf8"], "BODY" in params
    ('2048', None, False)
    >>> params.raw
    ('size=2048', 'SMTPUTF8')
    """

    __slots__ = ("_raw",)

    def __init__(self, raw: Sequence[str] = ()) -> None:
        self._raw = tuple(raw)

    @property
    def raw(self) -> tuple[str, ...]:
        """The parameters as the client wrote them, in order."""
        return self._raw

    def __getitem__(self, keyword: str) -> str | None:
        wanted = keyword.upper()
        for parameter in self._raw:
            name, equals, value = parameter.partition("=")
            if name.upper() == wanted:
                return value if equals else None
        raise KeyError(keyword)

    def __contains__(self, keyword: object) -> bool:
        return isinstance(keyword, str) and keyword.upper() in iter(self)

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(parameter.partition("=")[0].upper() for parameter in self._raw))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return f"Params({list(self._raw)!r})"


def without_brackets(address: str) -> str:
    return address[1:-1] if address.startswith("<") and address.endswith(">") else address


class Address(str):
    """A sender or recipient: a ``str`` without the angle brackets, ``""`` for the null sender ``<>``.

    >>> sender = Address.from_arguments(["<ann@example.org>", "SIZE=100"])
    >>> sender, sender.raw, sender.params["SIZE"]
    ('ann@example.org', '<ann@example.org>', '100')
    """

    __slots__ = ("_arguments",)
    _arguments: Sequence[str]

    @classmethod
    def from_arguments(cls, arguments: Sequence[str]) -> "Address":
        """Make one of the arguments of a MAIL or RCPT command, the address first."""
        text = arguments[0] if arguments else ""
        address = cls(text[1:-1] if text[:1] == "<" and text[-1:] == ">" else text)
        address._arguments = arguments
        return address

    @property
    def raw(self) -> str:
        """The address exactly as the client wrote it."""
        arguments = getattr(self, "_arguments", ())
        return arguments[0] if arguments else str(self)

    @property
    def params(self) -> Params:
        """The ESMTP parameters that came with it."""
        return Params(getattr(self, "_arguments", ())[1:])

    # Comparison and hash are those of str: an Address is equal to its text.
