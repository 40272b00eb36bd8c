# SPDX-License-Identifier: GPL-3.0-or-later
r"""The access log: a line for each message, and for each connection that was refused.

The line goes to the logger ``milter.access``, at level INFO. It has the form ``key=value key=value …``::

    queue_id=4bXq client=mx.client.example address=192.0.2.1 port=40112 sender=ann@client.example
    recipients=bob@mta.example,carl@mta.example refused=eve@mta.example="550 5.7.1 not for you"
    verdict=accept stage=eom code=- enhanced=- text=- failed=- actions=add_header=1 size=2140
    handlers_ms=0.412 total_ms=3.077 connection=17

(on one line). The same values are the dict ``record.milter`` of the log record, for formatters that have fields.

=============== ========================================================================================================
``queue_id``    the MTA's; Postfix has none before the second recipient or DATA
``client``      the name of the SMTP client, as the MTA found it; ``address`` and ``port``: where it is
``sender``      as the client gave it, without brackets; ``""`` is the null sender, ``-`` none: a connection
                was refused
``recipients``  those that were accepted, a hundred at most; ``more_recipients``, only if there are more: how many
``refused``     those that the filter refused, each with its answer; ``more_refused`` likewise
``verdict``     what the filter decided: ``accept``, ``reject``, ``tempfail``, ``discard``; or ``abort``: the client
                or the MTA gave up before. If the MTA is lost while it is told, only its own log knows
``stage``       where it was decided; ``rcpt`` with a refusal: all recipients were refused, and the client gave up.
                The answer is then the last one, of those that let it try again if there are any
``code``        of the reply of one's own, with ``enhanced`` and ``text``
``failed``      the handlers that raised
``actions``     the changes that were sent, and how many of each
``size``        bytes of the message at its end; ``-`` without ``on_message`` and ``on_body``. With ``on_body``
                alone it is the body, with ``on_header`` besides the header fields, too
``handlers_ms`` milliseconds that Python took, all handlers together
``total_ms``    milliseconds from MAIL to the decision
``connection``  the number of the connection, ``ctx.id``
=============== ========================================================================================================

``-`` is a value that is not known, or a list of none. The values come from strangers. So what is not a word of
plain characters is put in quotes, with ``\"``, ``\\``, ``\n``, ``\r``, ``\t``; ``\x1b`` for another control
character or for a byte that is no UTF-8, ``\u00e4`` or ``\U0001f600`` for what is not ASCII. A line can be
split at the spaces outside the quotes, a list at the commas, and nobody can forge either.
"""

import logging
import re
from collections.abc import Mapping
from typing import Any

from milter.safe_log import SafeLog

__all__ = ["line", "log", "write"]

log = SafeLog("milter.access")

# Neither space nor quote, comma, equals sign or backslash. A bare minus means that there is nothing.
_WORD = re.compile(r"(?!-\Z)[!#-+\--<>-\[\]-~]+")
_SPECIAL = re.compile(r"[^ !#-\[\]-~]")
_SHORT = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}


def write(fields: Mapping[str, Any]) -> None:
    """Log the record of a message."""
    if log.is_enabled_for(logging.INFO):
        log.info("%s", line(fields), extra={"milter": fields})


def line(fields: Mapping[str, Any]) -> str:
    r"""The record of a message as text.

    >>> line({"queue_id": None, "sender": "", "text": 'no "spam"\nqueue_id=1', "actions": {"add_header": 2}})
    'queue_id=- sender="" text="no \\"spam\\"\\nqueue_id=1" actions=add_header=2'
    >>> line({"recipients": ["bob@mta.example", "a,b@mta.example"], "client": "caf\u00e9\udcff"})
    'recipients=bob@mta.example,"a,b@mta.example" client="caf\\u00e9\\xff"'
    """
    return " ".join([f"{key}={_shown(key, value)}" for key, value in fields.items()])


def _shown(key: str, value: Any) -> str:
    if isinstance(value, str):
        return _text(value)
    if value is None or value == [] or value == {}:
        return "-"
    if key == "refused":
        return ",".join([f"{_text(entry['recipient'])}={_text(_answer(entry))}" for entry in value])
    if isinstance(value, list):
        return ",".join(map(_text, value))
    if isinstance(value, dict):
        return ",".join([f"{_text(name)}={entry}" for name, entry in value.items()])
    return str(value)


def _answer(entry: Mapping[str, Any]) -> str:
    if entry["code"] is None:
        return str(entry["verdict"])
    return " ".join(str(entry[part]) for part in ("code", "enhanced", "text") if entry[part] is not None)


def _text(text: str) -> str:
    if _WORD.fullmatch(text):
        return text
    return f'"{_SPECIAL.sub(_escaped, text)}"'


def _escaped(match: re.Match[str]) -> str:
    character = match[0]
    number = ord(character)
    if character in _SHORT:
        return _SHORT[character]
    if number < 0x80 or 0xDC80 <= number <= 0xDCFF:  # the second: a byte, by surrogateescape
        return f"\\x{number & 0xFF:02x}"
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"
