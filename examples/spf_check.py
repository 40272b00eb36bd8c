# SPDX-License-Identifier: GPL-3.0-or-later
"""Check with SPF whether a client may send mail of a domain (RFC 7208); needs ``pip install pyspf dnspython``.

    python examples/spf_check.py inet:3000@localhost

The settings are environment variables:

- ``SPF_NAMESERVER``: the resolver to ask, ``address`` or ``address:port``; by default those of the system.
- ``SPF_TIMEOUT``: seconds that all questions about one message may take; 20.
- ``SPF_ON_FAIL``: what becomes of mail that the domain disowns: ``reject`` (the default) or ``mark``.
- ``SPF_ON_ERROR``: what becomes of mail while DNS does not answer: ``accept`` (open, the default) or ``tempfail``
  (closed).

Messages that pass get the result as a Received-SPF field, above all others. Clients that authenticated, or that come
from private addresses, are not checked.
"""

import ipaddress
import logging
import os
import sys
from dataclasses import dataclass

import dns.exception
import dns.resolver
import spf

from milter import Address, Context, EomContext, InetAddress, Milter, Params, Reply, Status

log = logging.getLogger("spf_check")

PRIVATE = "127.0.0.0/8 10.0.0.0/8 172.16.0.0/12 192.168.0.0/16 ::1/128 fc00::/7"
TRUSTED = [ipaddress.ip_network(text) for text in PRIVATE.split()]


@dataclass(frozen=True)
class Settings:
    nameserver: str = ""
    timeout: float = 20.0
    reject_on_fail: bool = True
    pass_on_error: bool = True

    @classmethod
    def from_environment(cls) -> "Settings":
        return cls(
            nameserver=os.environ.get("SPF_NAMESERVER", cls.nameserver),
            timeout=float(os.environ.get("SPF_TIMEOUT", cls.timeout)),
            reject_on_fail=os.environ.get("SPF_ON_FAIL", "reject") != "mark",
            pass_on_error=os.environ.get("SPF_ON_ERROR", "accept") != "tempfail",
        )


@dataclass
class Checked:
    """What is remembered from MAIL to the end of the message."""

    field: str = ""
    """The value of Received-SPF; empty if nothing was checked."""


@dataclass(frozen=True)
class Result:
    word: str
    """``pass``, ``fail``, ``softfail``, ``neutral``, ``none``, ``temperror`` or ``permerror``."""
    explanation: str
    field: str


def filter_with(settings: Settings) -> Milter[object, Checked]:
    app = Milter("spf_check", session=object, transaction=Checked)

    @app.on_start
    def choose_resolver() -> None:
        if settings.nameserver:
            dns.resolver.default_resolver = resolver_at(settings.nameserver)

    # A plain function: it waits on a thread of its message, without the GIL, and holds up nobody.
    @app.on_mail(macros=["{auth_type}", "j"])
    def check(ctx: Context[object, Checked], sender: Address, params: Params) -> Status | Reply:
        address = ctx.address
        if not isinstance(address, InetAddress) or is_trusted(address) or ctx.macros.get("{auth_type}"):
            return Status.CONTINUE
        result = ask(settings, address, sender, ctx.helo or "", ctx.macros.get("j", "unknown"))
        if result.word == "fail" and settings.reject_on_fail:
            return Reply(550, "5.7.23", f"SPF: {printable(result.explanation)}")
        if result.word == "temperror" and not settings.pass_on_error:
            return Reply(451, "4.7.24", "SPF: DNS does not answer, try again later")
        ctx.transaction.field = result.field
        return Status.CONTINUE

    @app.on_eom
    def tell(ctx: EomContext[object, Checked]) -> Status:
        if ctx.transaction.field:
            ctx.insert_header(0, "Received-SPF", ctx.transaction.field)
        return Status.CONTINUE

    return app


def ask(settings: Settings, address: InetAddress, sender: Address, helo: str, receiver: str) -> Result:
    """The result for this sender; for the null sender of a bounce, that of the HELO name (RFC 7208, section 2.4)."""
    query = spf.query(address.host, mailbox(sender), helo, receiver=receiver, querytime=settings.timeout)
    try:
        word, _, explanation = query.check()
    except (dns.exception.DNSException, UnicodeError) as problem:  # those that the library does not expect
        log.warning("%s, %s: %s", address, sender, problem)
        word, explanation = "temperror", str(problem)
    return Result(word, explanation, printable(query.get_header(word, receiver)))


def mailbox(sender: Address) -> str:
    """The sender as pyspf wants it, which takes all that follows the first ``@`` for the domain."""
    return f"{sender.local.replace('@', '=')}@{sender.domain}" if sender else ""


def resolver_at(nameserver: str) -> dns.resolver.Resolver:
    address, _, port = nameserver.partition(":") if nameserver.count(":") == 1 else (nameserver, "", "")
    resolver = dns.resolver.Resolver(configure=False)
    resolver.nameservers = [address]
    resolver.port = int(port or 53)
    return resolver


def is_trusted(address: InetAddress) -> bool:
    return any(address.ip in network for network in TRUSTED)


def printable(text: str) -> str:
    """ASCII on one line, and not endless: parts of it were written by strangers."""
    return "".join(character if " " <= character <= "~" else "?" for character in text)[:500]


app = filter_with(Settings.from_environment())

if __name__ == "__main__":
    app.run(sys.argv[1])
