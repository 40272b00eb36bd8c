# SPDX-License-Identifier: GPL-3.0-or-later
"""Plays a scenario on a real server, and says what differs from what is written.

`Outcome` is what happened; `play` makes it on a server, `model` on the models of `milter.testing`.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from .filter_pool import Running
from .notation import escape
from .scenario import OWN_TRACE, Act, Expected, Mail, Scenario, Script, Sent, mailbox
from .server import DOMAIN, MailServer
from .sink import Delivery
from .smtp import Answer, SmtpClient

HUNG_UP = Answer(0, ("the server hung up",))

# What the next hop is told only if the client or the filter has said it (RFC 3461).
PASSED_ON = ("RET", "ENVID", "NOTIFY", "ORCPT")
_TRACE = re.compile(rb"Received: [^\r]*(?:\r\n[ \t][^\r]*)*\r\n")


@dataclass(frozen=True)
class Outcome:
    """What happened: the replies that were due, in order, as far as they came; mails in order of their envelopes."""

    replies: tuple[Answer, ...]
    delivered: tuple[Mail, ...]
    held: tuple[Mail, ...]
    seen: tuple[str, ...]


# ---- on a server


def play(script: Script, server: MailServer, port: int, filters: Sequence[Running]) -> Outcome:
    """Say what the client says, and gather what comes of it."""
    replies = tuple(_converse(script, port))
    if script.submitted:
        _submit(server, script.submitted)
    delivered = tuple(sorted(map(_delivered, server.deliveries()), key=_envelope))
    held = [Mail(0, f"<{m.sender}>", tuple(f"<{r}>" for r in m.recipients), b"", m.reason) for m in server.queue()]
    seen = [
        escape(f"{stage} {text}".rstrip(" ").encode("utf-8", "surrogateescape"))
        for running in (filters if script.watched else ())
        for stage, text in running.seen()
        if stage in script.watched
    ]
    return Outcome(replies, delivered, tuple(held), tuple(seen))


def _converse(script: Script, port: int) -> Iterator[Answer]:
    """The reply for each that is due; the last one may be `HUNG_UP`."""
    if not script.steps:
        return
    client = SmtpClient(port)
    answers = iter([client.greeting])
    said = b""
    try:
        for step in script.steps:
            match step:
                case Sent(raw):
                    said += raw
                case Expected():
                    client.write(said)
                    said = b""
                    yield next(answers, None) or client.answer()
                case Act("tls"):
                    client.start_tls()
                case Act("drop"):
                    client.write(said)
                    client.drop()
                    return
                case Act("wait"):
                    yield client.answer()
        client.write(said)
        client.command("QUIT")
    except ConnectionError:
        yield HUNG_UP
    finally:
        client.drop()


def _submit(server: MailServer, mail: Mail) -> None:
    recipients = [recipient.strip("<>") for recipient in mail.recipients]
    server.submit(mail.sender.strip("<>"), recipients, mail.content)


def _delivered(delivery: Delivery) -> Mail:
    recipients = zip(delivery.recipients, delivery.rcpt_params, strict=True)
    return Mail(
        0,
        mailbox(delivery.sender, _passed_on(delivery.mail_params, delivery.sender)),
        tuple(sorted(mailbox(address, _passed_on(params, address)) for address, params in recipients)),
        marked(delivery.content),
    )


def _passed_on(params: frozenset[str], address: str) -> list[str]:
    """Without what a server adds by itself: sizes, and the address itself as the original one."""
    own = re.compile(f"ORCPT=(rfc822|utf-8);{re.escape(_xtext(address))}")
    return [param for param in params if param.partition("=")[0] in PASSED_ON and not own.fullmatch(param)]


def _xtext(address: str) -> str:
    """As parameters write it (RFC 3461, section 4)."""
    return "".join(
        chr(byte) if 33 <= byte <= 126 and byte not in b"+=" else f"+{byte:02X}"
        for byte in address.encode("utf-8", "surrogateescape")
    )


def marked(content: bytes) -> bytes:
    """The content with `OWN_TRACE` for the server's own field, which names times and ports."""
    for match in _TRACE.finditer(content):
        if b"by " + DOMAIN.encode() in match[0]:
            return content[: match.start()] + OWN_TRACE.encode() + b"\r\n" + content[match.end() :]
    return content


def _envelope(mail: Mail) -> tuple[str, tuple[str, ...]]:
    return mail.sender, mail.recipients


# ---- what differs


def differences(scenario: Scenario, script: Script, outcome: Outcome) -> list[str]:
    """Each thing that is not as written, with its place."""
    found = [
        *_reply_differences(script, outcome),
        *mail_differences("delivered", script.delivered, outcome.delivered),
        *mail_differences("held", script.held, outcome.held),
        *_seen_differences(script, outcome),
    ]
    return [f"{_shown_path(scenario.path)}:{number}: {problem}" for number, problem in found]


def _shown_path(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def _reply_differences(script: Script, outcome: Outcome) -> Iterator[tuple[int, str]]:
    due = [step for step in script.steps if isinstance(step, Expected)]
    for expected, reply in zip_longest(due, outcome.replies):
        if expected is None:
            if reply != HUNG_UP or not any(step == Act("wait") for step in script.steps):
                yield 0, f"one more reply came: {shown(reply)}"
        elif reply is None:
            yield expected.number, f"expected {expected}, and there was no reply"
            return
        elif not is_as_expected(expected, reply):
            yield expected.number, f"expected {expected}, got {shown(reply)}"
            return


def is_as_expected(expected: Expected, reply: Answer) -> bool:
    return any(due.code == reply.code and due.lines in (None, reply.lines) for due in (expected, *expected.others))


def shown(reply: Answer) -> str:
    return escape(" / ".join(f"{reply.code} {line}" for line in reply.lines).encode("utf-8", "surrogateescape"))


def mail_differences(kind: str, expected: Sequence[Mail], found: Sequence[Mail]) -> Iterator[tuple[int, str]]:
    for wanted, mail in zip_longest(sorted(expected, key=_envelope), sorted(found, key=_envelope)):
        if wanted is None:
            yield 0, f"{kind} besides: {describe(mail)}"
        elif mail is None:
            yield wanted.number, f"not {kind}: {describe(wanted)}"
        elif not _same(kind, wanted, mail):
            yield wanted.number, f"{kind} differently:\n{describe(mail)}\nand not:\n{describe(wanted)}"


def _same(kind: str, wanted: Mail, mail: Mail) -> bool:
    if _envelope(wanted) != _envelope(mail):
        return False
    if kind == "held":
        # Postfix tells nobody why; the models do.
        return not (mail.reason and wanted.reason) or wanted.reason == mail.reason
    trace = OWN_TRACE.encode() + b"\r\n"
    content = mail.content if trace in wanted.content else mail.content.replace(trace, b"", 1)
    return content == wanted.content


def describe(mail: Mail) -> str:
    """A message as a scenario writes it."""
    because = f" because {mail.reason}" if mail.reason else ""
    lines = [f"{mail.sender} -> {', '.join(mail.recipients)}{because}"]
    lines += [f"| {escape(line)}".rstrip(" ") for line in mail.content.removesuffix(b"\r\n").split(b"\r\n")]
    return "\n".join(lines)


def _seen_differences(script: Script, outcome: Outcome) -> Iterator[tuple[int, str]]:
    if script.seen != outcome.seen:
        yield 0, "the filter was shown:\n" + "\n".join(f"F: {line}" for line in outcome.seen)
