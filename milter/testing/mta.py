# SPDX-License-Identifier: GPL-3.0-or-later
"""The simple form of a test: an MTA that sends a message to a filter, and tells what became of it.

::

    with MTA(app) as mta:
        result = mta.send(recipients=["boss@internal.example"])
    assert result.rejected

`MTA` is a filter and the rules of an MTA; `SMTPSession` is one connection; a `Result` is what became of one
message. Who wants to say every single packet takes `MTA.client`.
"""

import asyncio
import os
import re
from collections import deque
from collections.abc import Iterable, Mapping
from email.message import Message as ParsedMessage
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, TypeAlias

from milter.app import Milter
from milter.errors import HandlerError
from milter.protocol import macro_name
from milter.testing.client import Client, ClientAddress, Session, Transcript
from milter.testing.delivery import DeliveryModel, Envelope, Mailbox, Message, Postfix, Sendmail
from milter.testing.rehearsal import Rehearsal, RehearsedConnection
from milter.testing.result import Result
from milter.testing.wire import ALL_ACTIONS, ALL_STEPS, Family, WireError

__all__ = ["MTA", "MTAFactory", "Mail", "SMTPSession"]

Like: TypeAlias = str | type[DeliveryModel]
"""``"postfix"`` or ``"sendmail"``, or a class with rules of one's own."""
Mail: TypeAlias = bytes | str | ParsedMessage | Message | os.PathLike[str]
"""A message: as bytes or text with any line ends, parsed by Python's ``email`` package, or the path of a file."""
Recipients: TypeAlias = str | Mailbox | Iterable[str | Mailbox]

SAMPLE = b"""\
From: Ann <ann@client.example>
To: Bob <bob@mta.example>
Date: Thu, 01 Jan 2026 12:00:00 +0000
Message-ID: <sample@client.example>
Subject: A sample message

Hello Bob,

this is a test.

Ann
"""

_MODELS: Mapping[str, type[DeliveryModel]] = {"postfix": Postfix, "sendmail": Sendmail}

# By its version an MTA tells how it counts header fields; and so the library asks for it.
_VERSIONS: Mapping[type[DeliveryModel], Mapping[str, str]] = {Sendmail: {"v": "8.17.1"}}

recent: deque[Result] | None = None
"""The last results, for whoever tells of a failed test; None: nobody does."""


class MTA:
    """An MTA that has one filter; a context manager.

    Arguments:
        filter: a `milter.Milter`, which runs in this process on the real libmilter: its handlers can look at the
            test's variables, and stop at breakpoints. Or the socket of a filter that runs elsewhere, in whatever
            language: ``inet:port@host``, ``unix:path``.
        like: by whose rules replies are worded and changes applied: ``"postfix"``, ``"sendmail"``, or a
            `DeliveryModel`. The commands come in Postfix's order either way.
        raise_errors: what a handler raises is raised again by `send`, as it is; several of them as an
            ``ExceptionGroup``. False: it is only in ``result.errors``, and the test sees how the filter's ``on_error``
            answered.
        timeout: seconds for each answer; None: all the time. The time in which a handler in this process runs does
            not count: it may be at a breakpoint.
        version, actions, steps: what is offered in the negotiation; by default all.

    Hooks run once: ``on_start`` at the beginning of the block, ``on_stop`` at its end. Any number of these may be open
    at once, of one filter or of several.

    >>> from milter import Address, Context, Milter, Reply
    >>> app = Milter("guard")
    >>> @app.on_rcpt
    ... def guard(ctx: Context, recipient: Address, params: object) -> Reply | None:
    ...     return Reply(550, "5.7.1", "not for you") if recipient.matches("boss@mta.example") else None
    >>> with MTA(app) as mta:
    ...     mta.send(recipients=["boss@mta.example"])
    <Result: rejected at rcpt: 550 5.7.1 not for you>
    """

    def __init__(
        self,
        filter: Milter[Any, Any] | str,
        *,
        like: Like = "postfix",
        raise_errors: bool = True,
        timeout: float | None = 60.0,
        version: int = 6,
        actions: int = ALL_ACTIONS,
        steps: int = ALL_STEPS,
    ) -> None:
        self.model = _model(like)
        self.raise_errors = raise_errors
        self._offer = (version, actions, steps)
        self._timeout = timeout
        self._house = _house(filter)
        self._clients: list[_Connection] = []

    def __enter__(self) -> Self:
        self._house.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            for connection in self._clients:
                _leave(connection, error)
        finally:
            self._house.stop()
        if error is None and self.raise_errors:
            _raise_all([failure for connection in self._clients for failure in connection.failures])

    def send(
        self,
        *,
        sender: str | Mailbox = "ann@client.example",
        recipients: Recipients = "bob@mta.example",
        message: Mail = SAMPLE,
        params: Iterable[str] = (),
        helo: str = "client.example",
        client: str | ClientAddress | None = "client.example[192.0.2.1]",
        macros: Mapping[str, str] | None = None,
    ) -> Result:
        """Send a message in an SMTP session of its own.

        Arguments:
            sender: the envelope's sender, with or without brackets; ``""`` is the null sender.
            recipients: one, or several. With ESMTP parameters: ``Mailbox("bob@mta.example", ("NOTIFY=NEVER",))``.
            message: see `Mail`; by default a short text from Ann to Bob.
            params: ESMTP parameters of MAIL, say ``["SIZE=100"]``.
            helo: what the client says at HELO.
            client: who connects: an IP address, ``name[address]``, a path for a Unix socket, or None for unknown.
            macros: more of the MTA's macros, or other values: ``{"auth_authen": "ann"}``. Braces may be left out.

        Raises what handlers raise, see the class; `WireError` when a filter breaks the protocol, or hangs up.
        """
        with self.connect(helo=helo, client=client, macros=macros) as session:
            transcript = session._converse(sender, recipients, message, params, {})
            session._end()
            return session._result(transcript)

    def connect(
        self,
        *,
        helo: str = "client.example",
        client: str | ClientAddress | None = "client.example[192.0.2.1]",
        macros: Mapping[str, str] | None = None,
    ) -> "SMTPSession":
        """An SMTP session for several messages; a context manager. For the arguments see `send`."""
        hostname, address = _who(client)
        session = Session(hostname, address, helo, {**_VERSIONS.get(self.model, {}), **_named(macros)})
        return SMTPSession(self, session)

    def client(self, timeout: float | None = 10.0) -> Client:
        """A connection on which nothing was said yet: every packet is yours.

        `timeout`: as for the class. (libmilter drops a command in a wrong place without an answer.)

        What handlers raise there is raised at the end of the block. In the negotiation the higher bits of the actions
        are this library's: they say which filter of the process is wanted.
        """
        connection = self._house.connect(timeout)
        self._clients.append(connection)
        return connection.client

    def __repr__(self) -> str:
        return f"<MTA like {self.model.name} with {self._house}>"

    def _connect(self) -> "_Connection":
        connection = self._house.connect(self._timeout)
        try:
            connection.client.negotiate(*self._offer)
        except BaseException as error:
            _leave(connection, error)
            if self.raise_errors and connection.failures and isinstance(error, WireError):
                _raise_all(connection.failures)
            raise
        return connection


class SMTPSession:
    """An SMTP session: one connection, any number of messages. A context manager; `MTA.connect` makes it.

    At its end the filter's ``on_close`` has run, and what it raised is raised.
    """

    def __init__(self, mta: MTA, session: Session) -> None:
        self._mta = mta
        self._session = session
        self._macros = dict(session.macros)
        self._told = 0  # how many failures have been raised, or are in a result
        self._ended = False
        self._connection = mta._connect()

    @property
    def state(self) -> Any:
        """What ``ctx.session`` is; None until a handler has looked at it, or in another process."""
        return self._connection.session_state

    @property
    def client(self) -> Client:
        """The connection itself, to say between two messages what `send` does not say."""
        return self._connection.client

    def send(
        self,
        *,
        sender: str | Mailbox = "ann@client.example",
        recipients: Recipients = "bob@mta.example",
        message: Mail = SAMPLE,
        params: Iterable[str] = (),
        macros: Mapping[str, str] | None = None,
    ) -> Result:
        """Send a message; for the arguments see `MTA.send`. ``macros`` are those of this message alone."""
        return self._result(self._converse(sender, recipients, message, params, _named(macros)))

    def _converse(
        self,
        sender: str | Mailbox,
        recipients: Recipients,
        message: Mail,
        params: Iterable[str],
        macros: Mapping[str, str],
    ) -> Transcript:
        envelope = _envelope(sender, recipients, params)
        session = Session(self._session.hostname, self._session.address, self._session.helo, self._macros)
        self._macros.clear()
        self._macros.update({**self._session.macros, **macros})
        self._connection.transaction_state = None
        try:
            return self.client.send_message(envelope, _message(message), session)
        except WireError:
            self._raise_new(self._new_failures())
            raise

    def _result(self, transcript: Transcript) -> Result:
        session = self._session
        trace = f"Received: from {session.helo} ({session.hostname} [{session.address.address}])\n\tby mta.example"
        model = self._mta.model(transcript.negotiated.steps, trace)
        failures = self._new_failures()
        result = Result(transcript, model, failures, self._connection.transaction_state)
        if recent is not None:
            recent.append(result)
        self._raise_new(failures)
        return result

    def _new_failures(self) -> tuple[BaseException, ...]:
        new = tuple(self._connection.failures[self._told :])
        self._told += len(new)
        return new

    def _raise_new(self, failures: tuple[BaseException, ...]) -> None:
        if self._mta.raise_errors:
            _raise_all(failures)

    def _end(self) -> None:
        if not self._ended:
            self._ended = True
            self._connection.end()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and not self._ended:
            self._ended = True
            _leave(self._connection, error)
        elif error is None:
            self._end()
            self._raise_new(self._new_failures())


class MTAFactory(Protocol):
    """What the fixture ``milter_mta`` of the pytest plugin is: it makes an `MTA` that lives as long as the test."""

    def __call__(
        self,
        filter: Milter[Any, Any] | str,
        *,
        like: Like = "postfix",
        raise_errors: bool = True,
        timeout: float | None = 60.0,
        version: int = 6,
        actions: int = ALL_ACTIONS,
        steps: int = ALL_STEPS,
    ) -> MTA: ...


# ---- where a filter is


class _RemoteConnection:
    """A connection to a filter in another process, into which nobody can look."""

    session_state: Any = None
    transaction_state: Any = None

    def __init__(self, client: Client) -> None:
        self.client = client
        self.failures: list[BaseException] = []

    def end(self) -> None:
        self.client.finish()

    def abandon(self) -> None:
        self.client.close()


_Connection: TypeAlias = RehearsedConnection | _RemoteConnection


class _Remote:
    """A filter in another process; see `Rehearsal`."""

    def __init__(self, spec: str) -> None:
        self._spec = spec

    def __str__(self) -> str:
        return f"the filter at {self._spec}"

    def start(self) -> None:
        """It runs already."""

    def stop(self) -> None:
        """That is up to who started it."""

    def connect(self, timeout: float | None) -> _RemoteConnection:
        return _RemoteConnection(Client.connect(self._spec, timeout))


def _house(filter: object) -> Rehearsal | _Remote:
    if isinstance(filter, Milter):
        return Rehearsal(filter)
    if isinstance(filter, str):
        return _Remote(filter)
    raise TypeError(f"a filter is a milter.Milter, or a socket such as 'inet:3000@localhost', not {filter!r}")


def _leave(connection: _Connection, error: BaseException | None) -> None:
    """At the end of a block: wait for the filter, unless the test was interrupted."""
    if error is None or isinstance(error, Exception):
        connection.end()
    else:
        connection.abandon()


# ---- what handlers raised


# Raised again as they are, they would end more than the test.
_CONTROL = (KeyboardInterrupt, SystemExit, GeneratorExit, asyncio.CancelledError)


def _raise_all(failures: Iterable[BaseException]) -> None:
    raised = [_harmless(failure) for failure in failures]
    if len(raised) == 1:
        raise raised[0]
    if raised:
        raise BaseExceptionGroup("handlers raised", raised)  # which is an ExceptionGroup, if all are Exceptions


def _harmless(failure: BaseException) -> BaseException:
    if not isinstance(failure, _CONTROL):
        return failure
    error = HandlerError(f"a handler raised {failure!r}")
    error.__cause__ = failure
    return error


# ---- what a test says, and what the protocol wants


def _model(like: Like) -> type[DeliveryModel]:
    if isinstance(like, type) and issubclass(like, DeliveryModel):
        return like
    if isinstance(like, str) and like in _MODELS:
        return _MODELS[like]
    raise ValueError(f'like must be "postfix", "sendmail", or a DeliveryModel, not {like!r}')


def _envelope(sender: str | Mailbox, recipients: Recipients, params: Iterable[str]) -> Envelope:
    if isinstance(params, str):
        raise TypeError(f'params must be a list of ESMTP parameters, not a str: params=["{params}"]')
    mailbox = Mailbox.of(sender)
    several = [recipients] if isinstance(recipients, str | Mailbox) else list(recipients)
    return Envelope.of(Mailbox(mailbox.address, (*mailbox.params, *params)), *several)


def _message(mail: Mail) -> Message:
    match mail:
        case Message():
            return mail
        case bytes():
            return Message.parse(mail)
        case str():
            return Message.parse(mail.encode("utf-8", "surrogateescape"))
        case ParsedMessage():
            return Message.parse(mail.as_bytes())
        case os.PathLike():
            return Message.parse(Path(mail).read_bytes())
        case _:
            raise TypeError(f"a message is bytes, a str, an email.message.Message or a path, not {mail!r}")


_NAMED = re.compile(r"([^\[\]]*)\[([^\[\]]+)\]")


def _who(client: str | ClientAddress | None) -> tuple[str, ClientAddress]:
    """Name and address. An IP address without a name has itself in brackets for one, as with both MTAs."""
    match = _NAMED.fullmatch(client) if isinstance(client, str) else None
    name, place = (match[1], match[2]) if match else ("", client)
    try:
        address = ClientAddress.of(place, 49152)
    except ValueError as error:
        raise ValueError(f"{error}: write client='192.0.2.8', 'name[192.0.2.8]', '/a/path' or None") from None
    unnamed = {Family.UNKNOWN: "unknown", Family.UNIX: "localhost"}.get(address.family, f"[{address.address}]")
    return name or unnamed, address


def _named(macros: Mapping[str, str] | None) -> dict[str, str]:
    """By the names that MTAs give them."""
    return {macro_name(name): value for name, value in (macros or {}).items()}
