# SPDX-License-Identifier: GPL-3.0-or-later
"""Mail filters for Postfix and Sendmail: decorate a function, run one command.

>>> from milter import Context, Milter, Status
>>> app = Milter("polite")
>>> @app.on_helo
... def greet(ctx: Context, name: str) -> Status:
...     return Status.REJECT if name.lower().rstrip(".") == "localhost" else Status.CONTINUE

``app.run("inet:3000@localhost")`` then serves until the process is told to stop.
"""

import milter._extension  # noqa: F401  (first of all: how it is loaded matters)
from milter._version import VERSION as __version__
from milter.addresses import Address
from milter.app import Milter
from milter.context import Context, EomContext, NegotiateContext
from milter.envelope import ClientAddress, InetAddress, Params, UnixAddress
from milter.errors import (
    ActionError,
    ContextError,
    HandlerError,
    MilterError,
    RegistrationError,
    SocketError,
    StageError,
    TooEarlyError,
)
from milter.headers import Headers
from milter.message import Message, Recipients
from milter.protocol import Actions, ProtocolOptions, Stage
from milter.server import Server
from milter.verdict import Reply, Status, Verdict

__all__ = [
    "ActionError",
    "Actions",
    "Address",
    "ClientAddress",
    "Context",
    "ContextError",
    "EomContext",
    "HandlerError",
    "Headers",
    "InetAddress",
    "Message",
    "Milter",
    "MilterError",
    "NegotiateContext",
    "Params",
    "ProtocolOptions",
    "Recipients",
    "RegistrationError",
    "Reply",
    "Server",
    "SocketError",
    "Stage",
    "StageError",
    "Status",
    "TooEarlyError",
    "UnixAddress",
    "Verdict",
    "__version__",
    "libmilter_version",
]


def libmilter_version() -> tuple[int, int, int]:
    """The version of libmilter that runs: major, minor, patch level (``smfi_version``).

    It is the version of libmilter's interface, 1.0.1, not that of Sendmail.
    """
    from milter.libmilter import libmilter

    return libmilter.version
