# SPDX-License-Identifier: GPL-3.0-or-later
"""What a handler answers: a :class:`Status`, a :class:`Reply`, or None. Plain values."""

import re
from collections.abc import Iterable
from enum import Enum
from typing import TypeAlias

from milter.protocol import Stage

__all__ = ["Reply", "Status", "Verdict"]

MAX_LINES = 32
MAX_LINE_BYTES = 980

_ENHANCED = re.compile(r"([245])\.(\d{1,3})\.(\d{1,3})", re.ASCII)


class Status(Enum):
    """A verdict without a text of its own (``SMFIS_*``; libmilter's page on callbacks' return values).

    What the SMTP client is told is the MTA's default, say ``550 5.7.1 Command rejected``.
    """

    CONTINUE = 0
    """Go on. The same as returning None."""
    REJECT = 1
    """Refuse for good (5xx): the connection, the message, or in ``on_rcpt`` this recipient."""
    DISCARD = 2
    """Tell the client that the message was accepted, and throw it away."""
    ACCEPT = 3
    """Take the message, or at connect and HELO the connection, without asking further."""
    TEMPFAIL = 4
    """Refuse for now (4xx): the client shall try again."""
    SKIP = 8
    """Do not call this handler again for this message (``on_header``, ``on_body``)."""


class Reply:
    """A refusal with a text of one's own (RFC 5321, section 4.2; ``smfi_setreply``).

    Arguments:
        code: the SMTP reply code, 400 to 599. Its class says whether the refusal is temporary.
            421 and, with Postfix, 521 make the MTA close the SMTP connection.
        enhanced: the enhanced status code of RFC 3463, of the same class, or None. Without one,
            a text of several lines gets ``4.0.0`` or ``5.0.0`` from libmilter.
        lines: 1 to 32 lines of text, which may quote strangers: whatever stands in it, it comes out as
            one line. A line end becomes a space, another control character ``?``, and a line is cut
            at 980 bytes. A ``%`` is doubled on the way, once, because MTAs read the text as a format.

    The text goes out as UTF-8. Sendmail strips the eighth bit, so plain ASCII reaches everyone. Characters
    of which Sendmail would make a line end (such as ``\u010a`` and ``\u0440``) become ``?``, except for a server that
    says that it is Postfix.

    Raises ``ValueError`` for a code, an enhanced code or a number of lines that could not be sent. A reply
    is immutable.

    At connect, Postfix gives the text to the commands that follow, Sendmail ignores it.

    >>> reply = Reply(550, "5.7.1", "Not 100% welcome")
    >>> reply.status
    <Status.REJECT: 1>
    >>> str(reply)
    '550 5.7.1 Not 100% welcome'
    >>> Reply(250, "2.0.0", "fine")
    Traceback (most recent call last):
    ValueError: a reply of a filter is a refusal: the code must be 400 to 599, not 250
    """

    __slots__ = ("_code", "_enhanced", "_lines", "_sendable")

    def __init__(self, code: int, enhanced: str | None, *lines: str) -> None:
        self._code = _checked_code(code)
        self._enhanced = _checked_enhanced(enhanced, self._code)
        self._lines = tuple(lines)
        self._sendable = tuple(_sendable_lines(lines))

    @property
    def code(self) -> int:
        return self._code

    @property
    def enhanced(self) -> str | None:
        return self._enhanced

    @property
    def lines(self) -> tuple[str, ...]:
        return self._lines

    @property
    def encoded(self) -> tuple[bytes, ...]:
        """The lines as libmilter gets them, safe for every MTA: encoded, each ``%`` doubled."""
        return tuple(_encoded(_without_folding(line)) for line in self._sendable)

    @property
    def encoded_for_8_bits(self) -> tuple[bytes, ...]:
        """The same for an MTA that leaves the eighth bit alone, as Postfix does."""
        return tuple(map(_encoded, self._sendable))

    @property
    def status(self) -> Status:
        """``REJECT`` for a code of class 5, ``TEMPFAIL`` for one of class 4."""
        return Status.REJECT if self._code >= 500 else Status.TEMPFAIL

    def __str__(self) -> str:
        prefix = f"{self._code} " + (f"{self._enhanced} " if self._enhanced else "")
        return "\n".join(prefix + line for line in self._lines)

    def __repr__(self) -> str:
        return f"Reply({', '.join(map(repr, (self._code, self._enhanced, *self._lines)))})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Reply):
            return NotImplemented
        return self._parts() == other._parts()

    def __hash__(self) -> int:
        return hash(self._parts())

    def _parts(self) -> tuple[int, str | None, tuple[str, ...]]:
        return self._code, self._enhanced, self._lines


Verdict: TypeAlias = Status | Reply | None


def _checked_code(code: int) -> int:
    if isinstance(code, bool) or not isinstance(code, int):
        raise ValueError(f"the code of a reply is a number such as 550, not {code!r}")
    if not 400 <= code <= 599:
        raise ValueError(f"a reply of a filter is a refusal: the code must be 400 to 599, not {code}")
    return code


def _checked_enhanced(enhanced: str | None, code: int) -> str | None:
    if enhanced is None:
        return None
    match = _ENHANCED.fullmatch(enhanced) if isinstance(enhanced, str) else None
    if match is None:
        raise ValueError(
            f"an enhanced status code looks like '5.7.1', not {enhanced!r}; for a reply without one "
            f"write Reply({code}, None, 'text')"
        )
    if int(match[1]) != code // 100:
        raise ValueError(f"the enhanced status code {enhanced} must be of the same class as the code {code}")
    return enhanced


def _sendable_lines(lines: Iterable[str]) -> Iterable[str]:
    count = 0
    for count, line in enumerate(lines, start=1):
        if not isinstance(line, str):
            raise ValueError(f"line {count} of the reply must be a str, not {line!r}")
        yield _cut(_CONTROL.sub("?", _LINE_END.sub(" ", line)))
    if not 1 <= count <= MAX_LINES:
        raise ValueError(f"a reply has 1 to {MAX_LINES} lines of text, not {count}")


# With the white space of a fold, as in the value of a header field.
_LINE_END = re.compile(r"(?:\r\n|\r|\n)[ \t]*")

# Control characters but the tab (ASCII's and those of Latin-1), surrogates that stand for no byte, and stray bytes
# that are a NUL or a line end but for the eighth bit.
_CONTROL = re.compile(r"[\0-\x08\x0b-\x1f\x7f-\x9f\ud800-\udc80\udc8a\udc8d\udd00-\udfff]")


def _cut(line: str) -> str:
    """As much of the line as libmilter sends: it would send no part of a longer one."""
    line = line[: MAX_LINE_BYTES + 1]  # each character has a byte at least
    if len(_encoded(line)) <= MAX_LINE_BYTES:
        return line
    while len(_encoded(line)) > MAX_LINE_BYTES - len("..."):
        line = line[:-1]
    return line + "..."


def _without_folding(line: str) -> str:
    """The line without characters that have a byte whose low seven bits are NUL, LF or CR.

    Sendmail sends only those bits to the client: what follows such a byte would be a reply of its own.
    """
    return _BEYOND_ASCII.sub(lambda match: "?" if _FOLDED & set(_encoded(match[0])) else match[0], line)


_BEYOND_ASCII = re.compile(r"[^\0-\x7f]")
_FOLDED = frozenset(b"\x80\x8a\x8d")


def _encoded(line: str) -> bytes:
    return line.replace("%", "%%").encode("utf-8", "surrogateescape")


_NO_MESSAGE_YET = frozenset({Status.CONTINUE, Status.ACCEPT, Status.REJECT, Status.TEMPFAIL})
_MESSAGE = _NO_MESSAGE_YET | {Status.DISCARD}
_REPEATED = _MESSAGE | {Status.SKIP}

# Which verdicts mean something at a stage. Anything else is a mistake in the handler: the MTAs
# would take it as they like (DISCARD at connect is "accept all" for Sendmail and nothing for
# Postfix; ACCEPT of an unknown command makes a Postfix process panic).
MEANINGFUL = {
    Stage.CONNECT: _NO_MESSAGE_YET,
    Stage.HELO: _NO_MESSAGE_YET,
    Stage.MAIL: _MESSAGE,
    Stage.RCPT: _MESSAGE,
    Stage.DATA: _MESSAGE,
    Stage.HEADER: _REPEATED,
    Stage.EOH: _MESSAGE,
    Stage.BODY: _REPEATED,
    Stage.EOM: _MESSAGE,
    Stage.UNKNOWN: frozenset({Status.CONTINUE, Status.REJECT, Status.TEMPFAIL}),
    Stage.ABORT: frozenset({Status.CONTINUE}),
    Stage.CLOSE: frozenset({Status.CONTINUE}),
    Stage.NEGOTIATE: frozenset({Status.CONTINUE}),
}
