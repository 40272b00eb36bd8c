# SPDX-License-Identifier: GPL-3.0-or-later
"""The command line of ``milter check``: what can be asked for, and what was: an `Order`."""

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from milter.checker.offers import OFFERS, Offer
from milter.testing.client import ClientAddress, Session
from milter.testing.delivery import Envelope, Mailbox, Postfix, Sendmail
from milter.testing.wire import Command

_RULES: Mapping[str, type[Postfix | Sendmail]] = {"postfix": Postfix, "sendmail": Sendmail}

# As the output of ``milter check`` names them.
_MACRO_STAGES = {
    "connect": Command.CONNECT,
    "helo": Command.HELO,
    "mail": Command.MAIL,
    "rcpt": Command.RCPT,
    "data": Command.DATA,
    "header": Command.HEADER,
    "eoh": Command.EOH,
    "body": Command.BODY,
    "end": Command.END_OF_MESSAGE,
}

_DESCRIPTION = """\
Play the MTA: send messages to a running filter, the way Postfix does, and show what the filter answers at each
stage, and what would be delivered. Nothing is sent anywhere else.
"""

_EPILOG = """\
The exit code is what an SMTP client would be told: 0 accepted (discarded and quarantined count as that), 75 deferred,
1 rejected, 2 no verdict: the filter was not reached or broke the protocol, or a message could not be read. Of
several messages it is the worst, in this order. 130 after Ctrl-C; then what was found so far is shown.

A file may have LF or CRLF line ends, and any bytes. docs/check.md says what becomes of NUL and of a CR without LF,
and what --json prints.
"""


@dataclass(frozen=True)
class Order:
    """What a command line asks for. ``loose_macros`` are those that were given without a stage."""

    socket: str
    timeout: float
    paths: tuple[str, ...]
    envelope: Envelope
    session: Session
    loose_macros: Mapping[str, str]
    offer: Offer
    rules: type[Postfix | Sendmail]
    json: bool
    brief: bool
    delivered: bool
    repeat: int
    connections: int

    @property
    def measures(self) -> bool:
        """Whether rates and latencies are wanted, rather than each result."""
        return self.repeat > 1 or self.connections > 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line of ``milter check``."""
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    parser.add_argument("socket", help="where the filter listens: inet:port@host, inet6:port@host, unix:path")
    parser.add_argument(
        "messages",
        nargs="*",
        metavar="message",
        help="a file, a directory (all *.eml below it), or - for standard input [a sample]",
    )
    _add_envelope(parser.add_argument_group("the message's envelope"))
    _add_client(parser.add_argument_group("the SMTP client"))
    _add_mta(parser.add_argument_group("the MTA"))
    _add_output(parser.add_argument_group("the output"))
    _add_load(parser.add_argument_group("measuring", "Instead of each result, rates and latencies are shown."))


def _add_envelope(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--from",
        dest="sender",
        default="ann@client.example",
        metavar="ADDRESS",
        help="the sender, <> for none [%(default)s]",
    )
    group.add_argument(
        "--to",
        dest="recipients",
        action="append",
        metavar="ADDRESS",
        help="a recipient; repeat for more [bob@mta.example]",
    )
    group.add_argument(
        "--mail-param",
        dest="mail_params",
        action="append",
        type=_param,
        default=[],
        metavar="NAME=VALUE",
        help="an ESMTP parameter of the sender, say SIZE=1000; repeat for more",
    )
    group.add_argument(
        "--rcpt-param",
        dest="rcpt_params",
        action="append",
        type=_param,
        default=[],
        metavar="NAME=VALUE",
        help="an ESMTP parameter of each recipient, say NOTIFY=NEVER; repeat for more",
    )


def _add_client(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--helo", default="client.example", metavar="NAME", help="what the client calls itself [%(default)s]"
    )
    group.add_argument(
        "--client",
        type=parse_client,
        default="client.example[192.0.2.1]",
        metavar="NAME[ADDRESS]",
        help="who connects: an IP address, or a name with the address in brackets [%(default)s]",
    )
    group.add_argument("--tls", action="store_true", help="the client uses TLS: its macros are sent at HELO")
    group.add_argument("--auth", metavar="USER", help="the client has logged in: the macros of that are sent at MAIL")
    group.add_argument(
        "--macro",
        dest="macros",
        action="append",
        type=parse_macro,
        default=[],
        metavar="[STAGE:]NAME=VALUE",
        help="a macro, or another value of a usual one. Without a stage it is sent at each stage where the filter or "
        "the MTA wants it, or else at connect. Stages: " + ", ".join(_MACRO_STAGES),
    )


def _add_mta(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--mta", choices=sorted(_RULES), default="postfix", help="whose replies and delivery to show [%(default)s]"
    )
    group.add_argument(
        "--offer",
        choices=sorted(OFFERS),
        help="what the filter is offered in the negotiation, and which macros it gets unasked; v2 is the old version 2 "
        "of the protocol [that of --mta]",
    )
    group.add_argument(
        "--timeout", type=_seconds, default=30.0, metavar="SECONDS", help="for each answer [%(default)g]"
    )


def _add_output(group: "argparse._ArgumentGroup") -> None:
    form = group.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="one JSON document a line, for each message")
    form.add_argument("--brief", action="store_true", help="one line for each message: the verdict and the file")
    form.add_argument("--delivered", action="store_true", help="show all of what would be delivered, not the diff")


def _add_load(group: "argparse._ArgumentGroup") -> None:
    group.add_argument("--repeat", type=_count, default=1, metavar="N", help="send each message so often [1]")
    group.add_argument("--connections", type=_count, default=1, metavar="C", help="send over so many at once [1]")


def read_order(args: argparse.Namespace) -> Order:
    """What the parsed command line asks for."""
    offer = OFFERS[args.offer or args.mta]
    hostname, address = args.client
    loose = {name: value for stage, name, value in args.macros if stage is None}
    # Later ones count: what the person typed is stronger than what an option stands for.
    usual = {
        **offer.macros,
        **(offer.tls if args.tls else {}),
        **({**offer.auth, "{auth_authen}": args.auth} if args.auth is not None else {}),
    }
    return Order(
        socket=args.socket,
        timeout=args.timeout,
        paths=tuple(args.messages),
        envelope=_envelope(args.sender, args.recipients or ["bob@mta.example"], args.mail_params, args.rcpt_params),
        session=Session(hostname, address, args.helo, {**usual, **loose}, _by_stage(args.macros), offer.unasked),
        loose_macros=loose,
        offer=offer,
        rules=_RULES[args.mta],
        json=args.json,
        brief=args.brief,
        delivered=args.delivered,
        repeat=args.repeat,
        connections=args.connections,
    )


def _envelope(
    sender: str, recipients: Sequence[str], mail_params: Sequence[str], rcpt_params: Sequence[str]
) -> Envelope:
    return Envelope(
        Mailbox(Mailbox.of(sender).address, tuple(mail_params)),
        tuple(Mailbox(Mailbox.of(recipient).address, tuple(rcpt_params)) for recipient in recipients),
    )


def _by_stage(macros: Sequence[tuple[Command | None, str, str]]) -> dict[Command, dict[str, str]]:
    stages: dict[Command, dict[str, str]] = {}
    for stage, name, value in macros:
        if stage is not None:
            stages.setdefault(stage, {})[name] = value
    return stages


# ---- what one argument means


def parse_client(text: str) -> tuple[str, ClientAddress]:
    """The client's name and address from ``name[address]``, or from an address without a name.

    A client without a name has its address in brackets for one, as with Postfix and Sendmail.

    >>> parse_client("mail.client.example[192.0.2.8]")[0], parse_client("192.0.2.8")[0]
    ('mail.client.example', '[192.0.2.8]')
    """
    match = re.fullmatch(r"([^\[\]]*)\[([^\[\]]+)\]", text)
    name, address = (match[1], match[2]) if match else ("", text)
    try:
        return name or f"[{address}]", ClientAddress.of(address, 49152)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error}: write 192.0.2.8 or name[192.0.2.8]") from None


def parse_macro(text: str) -> tuple[Command | None, str, str]:
    """The stage, the name as the protocol has it, and the value.

    >>> parse_macro("i=4F00"), parse_macro("mail:auth_type=PLAIN")[1:]
    ((None, 'i', '4F00'), ('{auth_type}', 'PLAIN'))
    """
    match = re.fullmatch(r"(?:([a-z]+):)?(?:\{([^{}=\s]+)\}|([^{}=:\s]+))=(.*)", text, re.DOTALL)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no macro: write name=value or stage:name=value")
    stage, name = match[1], match[2] or match[3]
    if stage is not None and stage not in _MACRO_STAGES:
        raise argparse.ArgumentTypeError(f"there is no stage {stage!r} for a macro: {', '.join(_MACRO_STAGES)}")
    return _MACRO_STAGES[stage] if stage else None, name if len(name) == 1 else f"{{{name}}}", match[4]


def _param(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9-]*(=[^=\s\0-\x1f\x7f]+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no ESMTP parameter: write NAME or NAME=VALUE, without spaces")
    return text


def _seconds(text: str) -> float:
    seconds = float(text)  # argparse words the ValueError
    if not 0 < seconds < 1e6:
        raise argparse.ArgumentTypeError(f"{text} is no time to wait: write a number of seconds above 0")
    return seconds


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on")
    return int(text)
