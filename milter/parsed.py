# SPDX-License-Identifier: GPL-3.0-or-later
"""A message as the standard library's :class:`email.message.EmailMessage`, whatever the message is."""

from email import policy
from email.errors import MessageDefect
from email.headerregistry import BaseHeader, HeaderRegistry
from email.message import EmailMessage
from email.parser import BytesParser
from typing import Any


class _Registry(HeaderRegistry):
    """The standard library's structured header fields; where its parser fails, the text without structure."""

    def __call__(self, name: str, value: str) -> BaseHeader:
        try:
            return super().__call__(name, value)
        except Exception as failure:
            return _unparsed(self[name], failure)(name, value)


def _unparsed(kind: type[BaseHeader], failure: Exception) -> type[BaseHeader]:
    """This kind of field, with the attributes of an empty one (no addresses, no parameters) and all of the text."""

    def keep_text(cls: type[BaseHeader], value: str, kwds: dict[str, Any]) -> None:
        kind.parse("", kwds)  # type: ignore[attr-defined]
        kwds["decoded"] = value
        kwds["defects"].append(MessageDefect(f"the field cannot be parsed: {failure!r}"))

    return type(kind.__name__, (kind,), {"parse": classmethod(keep_text)})


# CRLF, so that bytes(email) has the line ends of the message.
_POLICY = policy.EmailPolicy(linesep="\r\n", header_factory=_Registry())


def parse(data: bytes) -> EmailMessage:
    """Never raises: what cannot be parsed is among the ``defects``."""
    parser = BytesParser(EmailMessage, policy=_POLICY)
    try:
        return parser.parsebytes(data)
    except Exception as failure:  # too deeply nested, say
        message = parser.parsebytes(data, headersonly=True)
        message.defects.append(MessageDefect(f"the body cannot be parsed: {failure!r}"))
        return message
