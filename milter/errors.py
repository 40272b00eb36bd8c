# SPDX-License-Identifier: GPL-3.0-or-later
"""The exceptions of this library. Each message says what is wrong, where, and what to do."""


class MilterError(Exception):
    """What all exceptions of this library have in common.

    Values that can never be right (a reply of class 2, a header name with a colon) are
    ``ValueError`` and ``TypeError``, as everywhere in Python.
    """


class SocketError(MilterError):
    """The listening socket cannot be had: a bad specification, a port in use, no permission."""


class RegistrationError(MilterError, TypeError):
    """A handler has the wrong signature, or an option that its stage does not know."""


class ContextError(MilterError):
    """A context was used after its handler had returned.

    A context is a view of a connection at one moment; what shall live longer belongs into
    ``ctx.session`` or ``ctx.transaction``.
    """


class StageError(MilterError):
    """Something was asked of a context that its stage does not have, say an action before end of message."""


class TooEarlyError(StageError, AttributeError):
    """An action was asked of a context before the end of message. An AttributeError, so ``hasattr`` can answer."""


class ActionError(MilterError):
    """A change of the message was not sent: the MTA did not grant it, or it did not fit, or the MTA is gone."""


class HandlerError(MilterError):
    """A handler raised in a filter with ``on_error="shutdown"``; the cause is its exception."""
