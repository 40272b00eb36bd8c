# SPDX-License-Identifier: GPL-3.0-or-later
"""What handlers hold in their hands: the conversation so far, and what can be done about it.

A context is made for one call of the handlers of a stage and expires with it; the
:class:`Conversation` behind it lives as long as the connection. How the requests of a
context reach libmilter is the binding's business: it gives each context a :class:`Call`.
"""

import contextvars
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from operator import eq
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Generic, NoReturn, Protocol, overload

from milter import checks
from milter.addresses import Address, Mailboxes
from milter.edits import Change
from milter.envelope import ClientAddress, client_address, from_xtext
from milter.errors import ActionError, ContextError, StageError, TooEarlyError
from milter.message import Content, Message
from milter.protocol import Actions, MacroList, ProtocolOptions, Stage, macro_name

__all__ = ["Context", "EomContext", "NegotiateContext"]

if TYPE_CHECKING:  # with a default, so that the bare name Context passes the strictest checker
    from typing_extensions import TypeVar

    S = TypeVar("S", default=Any)
    T = TypeVar("T", default=Any)
else:
    from typing import TypeVar

    S = TypeVar("S")
    T = TypeVar("T")


class GatheredContent(Content, Protocol):
    error: int
    """An ``errno``: the message could not be gathered."""
    spooled: bool
    """It lies in a file."""


class Call(Protocol):
    """What the binding does for a context, as long as the call of its handlers lasts.

    Each method raises :class:`ContextError` afterwards; the actions raise :class:`ActionError`
    when they were not sent.
    """

    message_began: int
    """When MAIL came, in nanoseconds of ``CLOCK_MONOTONIC``; told only to a ledger."""
    connection: "Conversation"
    """By the engine: whose call it is."""
    late: bool
    """The log was told that it takes long: once is enough."""

    @property
    def stage(self) -> Stage: ...
    @property
    def content(self) -> "GatheredContent":
        """At the end of a message, if the plan gathers."""

    @property
    def granted_actions(self) -> int:
        """The bits of the actions in :meth:`granted`."""

    @property
    def leading_space(self) -> bool:
        """Header values come and go with the space after the colon, whatever handlers see."""

    def next_chunk(self, size: int) -> bytes:
        """The next piece of the body that the log speaks of."""

    def leave_changes(self, changes: Sequence[Change]) -> None:
        """Send these after the call, before the verdict."""

    def macro(self, name: bytes) -> bytes | None: ...
    def macro_at_once(self, name: bytes) -> bytes | None:
        """The same without waiting, and without an exception: None also if it cannot be had now."""

    def mta_is_gone(self) -> bool:
        """It has closed its connection. False also if that cannot be told: see shim/peer.c."""

    def offer_progress(self) -> bool:
        """Send a packet, if that can be done without waiting. False: it makes no sense to try again."""

    def macro_names(self) -> tuple[str, ...]: ...
    def granted(self) -> tuple[Actions, ProtocolOptions]: ...
    def add_header(self, name: bytes, value: bytes) -> None: ...
    def insert_header(self, index: int, name: bytes, value: bytes) -> None: ...
    def change_header(self, name: bytes, index: int, value: bytes | None) -> None: ...
    def change_sender(self, address: bytes, parameters: bytes | None) -> None: ...
    def add_recipient(self, address: bytes, parameters: bytes | None) -> None: ...
    def remove_recipient(self, address: bytes) -> None: ...
    def send_body(self, data: bytes) -> None: ...
    def quarantine(self, reason: bytes) -> None: ...
    def progress(self) -> None: ...


class Scope:
    """What lasts for a while, a message or a connection, and what handlers set in context variables lasts as long.

    All its handlers run in the same :class:`contextvars.Context`, whatever thread they are called on, and coroutines
    as well. Python lets one thread at a time run code in a context, and refuses the second. There is none:

    - The events of a connection come one at a time, and the next one waits for the coroutine of the one before.
    - What such a coroutine starts, tasks, callbacks and calls in threads, runs in copies.
    - A coroutine that was cancelled and goes on keeps the context for itself. The scope goes on with a copy from before
      its start; see :meth:`milter.loop.EventLoop.answer`.
    """

    __slots__ = ("variables",)

    def __init__(self) -> None:
        self.variables: contextvars.Context = NO_VARIABLES


NO_VARIABLES = contextvars.Context()
"""Of a scope in which no handler has run: most have none."""


class Transaction(Scope):
    """One mail transaction (RFC 5321, section 3.3): from MAIL to the message's end."""

    __slots__ = ("body_failure", "body_replaced", "mailboxes", "message", "recipients", "sender", "spoilt", "state")

    def __init__(self, sender: Address) -> None:
        super().__init__()
        self.sender = sender
        self.recipients: list[Address] = []
        """It only grows: see :class:`Accepted`."""
        self.mailboxes: Mailboxes | None = None
        """The recipients that :meth:`EomContext.remove_recipient` has not removed; made when it looks for one."""
        self.state: Any = None
        self.body_replaced = False
        self.body_failure: BaseException | None = None
        self.message: Message | None = None
        """What handlers of on_message share, at the end."""
        self.spoilt = False
        """A handler of the end raised: if the policy lets the message pass, then without edits, perhaps half done."""


class Named(Protocol):
    """A handler, as the log speaks of it."""

    @property
    def name(self) -> str: ...


class Conversation(Scope):
    """What is known of one connection; written by the engine, read through contexts."""

    __slots__ = (
        "_new_session",
        "_new_transaction",
        "client",
        "handler",
        "helo",
        "hostname",
        "id",
        "state",
        "transaction",
    )

    def __init__(
        self, number: int, new_session: Callable[[], Any] | None, new_transaction: Callable[[], Any] | None
    ) -> None:
        super().__init__()
        self.id = number
        self.hostname: str | None = None
        self.client = ("U", "", "")
        """Family, port and address, as the shim's log has them."""
        self.helo: str | None = None
        self.handler: Named | None = None
        """Which was called last."""
        self.transaction: Transaction | None = None
        self.state: Any = None
        self._new_session = new_session or SimpleNamespace
        self._new_transaction = new_transaction or SimpleNamespace

    @property
    def address(self) -> ClientAddress:
        return client_address(*self.client)

    def begin(self, scope: Scope, variables: contextvars.Context) -> None:
        """Give a connection, or its message, the variables that it begins with. `variables`: those of the filter."""
        if scope is not self and self.variables is not NO_VARIABLES:
            variables = self.variables
        scope.variables = variables.copy()

    def session_state(self) -> Any:
        if self.state is None:
            self.state = self._new_session()
        return self.state

    def transaction_state(self, transaction: Transaction) -> Any:
        if transaction.state is None:
            transaction.state = self._new_transaction()
        return transaction.state


class Accepted(Sequence[Address]):
    """The recipients that were accepted until now, as a tuple has them. It never changes, and can be kept.

    No copy: the recipients of a message are a list that only grows, and this is its beginning. So a handler may look
    at each of 100,000 recipients without a hundred thousand copies.
    """

    __slots__ = ("_all", "_count")

    def __init__(self, recipients: list[Address]) -> None:
        self._all = recipients
        self._count = len(recipients)

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Address: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Address, ...]: ...
    def __getitem__(self, index: int | slice) -> Address | tuple[Address, ...]:
        places = range(self._count)[index]
        return self._all[places] if isinstance(places, int) else tuple([self._all[place] for place in places])

    def __iter__(self) -> Iterator[Address]:
        return islice(self._all, self._count)

    def __contains__(self, address: object) -> bool:
        recipients: Iterator[object] = iter(self)
        return address in recipients

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Accepted | list | tuple):
            return len(self) == len(other) and all(map(eq, self, other))
        return NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return repr(tuple(self))


class Macros(Mapping[str, str]):
    """The macros that the MTA has sent so far: ``ctx.macros["{auth_authen}"]``, ``ctx.macros.get("i")``.

    Braces may be left out. A macro stays visible until the MTA sends the macros of the same or an
    earlier stage again (libmilter's page of ``smfi_getsymval``). Which ones an MTA sends is its
    configuration; the option ``macros=[…]`` of a decorator asks for more.

    libmilter cannot list them: iterating tries the names that this library knows and those asked for.
    """

    __slots__ = ("_context",)

    def __init__(self, context: "_View") -> None:
        self._context = context

    def __getitem__(self, name: str) -> str:
        value = self._context._call.macro(macro_name(name).encode("utf-8", "surrogateescape"))
        if value is None:
            raise KeyError(name)
        return value.decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._context._call.macro_names() if name in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return f"Macros({dict(self)!r})"


class _Expired:
    """Stands in for the call once it is over: whatever is asked, the answer is the same exception."""

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # of the interpreter's and its tools' own business
            raise AttributeError(name)
        raise ContextError(
            "this context is no longer valid: it was used after its handler had returned. "
            "Keep what you need in ctx.session or ctx.transaction, or copy it while the handler runs"
        )


_EXPIRED: Any = _Expired()


class _View:
    """A conversation and the call that may ask about it, until the engine calls :func:`expire`."""

    __slots__ = ("_call", "_conversation")

    def __init__(self, conversation: Conversation, call: Call) -> None:
        self._conversation: Conversation = conversation
        self._call: Call = call

    @property
    def id(self) -> int:
        """The number of this connection in this process, for logs. Never used twice."""
        return self._conversation.id


def expire(context: _View) -> None:
    """By the engine, when the handlers have returned."""
    context._conversation = context._call = _EXPIRED


class Context(_View, Generic[S, T]):
    """The first argument of a handler: the conversation so far.

    Valid only while the handler runs; afterwards each use raises :class:`ContextError`, in any
    thread. Text is decoded as UTF-8 with ``surrogateescape``: nothing is lost, nothing raises.

    >>> from milter import Address, Context, Milter, Params, Status
    >>> app = Milter("example")
    >>> @app.on_rcpt(macros=["{client_ptr}"])
    ... def protect(ctx: Context, recipient: Address, params: Params) -> Status:
    ...     stranger = ctx.macros.get("{client_ptr}", "unknown") == "unknown"
    ...     return Status.REJECT if stranger and recipient.matches("boss@mta.example") else Status.CONTINUE
    """

    __slots__ = ()

    @property
    def hostname(self) -> str | None:
        """The client's name as the MTA found it, ``[192.0.2.1]`` if it found none; None before connect.

        It may be forged: see :attr:`verified_hostname`.
        """
        return self._conversation.hostname

    @property
    def address(self) -> ClientAddress:
        """The client's address; None when the MTA does not know it."""
        return self._conversation.address

    @property
    def helo(self) -> str | None:
        """The name in the client's last HELO or EHLO; None when it gave none."""
        return self._conversation.helo

    @property
    def sender(self) -> Address | None:
        """The sender of the message under way, without brackets; None outside a mail transaction."""
        transaction = self._conversation.transaction
        return transaction.sender if transaction is not None else None

    @property
    def recipients(self) -> Sequence[Address]:
        """The recipients that were accepted so far (in ``on_rcpt``: before this one).

        It never changes, and can be kept. A client may name 100,000, and ``in`` looks at one after the other: to look
        for an address in each ``on_rcpt``, keep a set in :attr:`transaction`.
        """
        transaction = self._conversation.transaction
        return Accepted(transaction.recipients) if transaction is not None else ()

    @property
    def macros(self) -> Mapping[str, str]:
        """The MTA's macros, see :class:`Macros`."""
        return Macros(self)

    @property
    def login(self) -> str | None:
        """The name by which the client logged in (SMTP AUTH), as it gave it; None if it did not.

        The macro ``{auth_authen}``, which Sendmail encodes as xtext: ``ann+x`` is ``ann+2Bx`` there. A server that does
        not say by the macro ``v`` that it is Postfix is taken for Sendmail.
        """
        name = self.macros.get("{auth_authen}") or None
        return from_xtext(name) if name is not None and self._is_sendmail else name

    @property
    def verified_hostname(self) -> str | None:
        """The client's host name, if the server has verified it: the name leads back to the client's address.

        None otherwise, and if the server does not tell. :attr:`hostname` may be forged: Sendmail has there whatever
        the owner of the address says in DNS. It tells the result in the macro ``{client_resolve}``, to be asked for by
        ``macros=["{client_resolve}"]`` at ``on_connect``, and, unasked, by "(may be forged)" in the macro ``_``.
        Postfix has "unknown" for a host name that it could not verify.
        """
        name = self.hostname
        if name is None or name == "unknown" or name.startswith("["):
            return None
        resolved = self.macros.get("{client_resolve}")
        if resolved is not None:
            return name if resolved == "OK" else None
        if not self._is_sendmail:
            return name
        trace = self.macros.get("_")
        return name if trace is not None and "(may be forged)" not in trace else None

    @property
    def _is_sendmail(self) -> bool:
        """Sendmail's version begins with a digit, and Postfix's with its name."""
        version = self.macros.get("v")
        return version is None or version[:1].isdigit()

    @property
    def queue_id(self) -> str | None:
        """The MTA's queue id (macro ``i``). Postfix knows it from the second recipient or DATA on."""
        return self.macros.get("i")

    @property
    def session(self) -> S:
        """Your own state of this SMTP session: made by ``Milter(session=…)`` at its first use, dropped at close."""
        state: S = self._conversation.session_state()
        return state

    @property
    def transaction(self) -> T:
        """Your own state of this message: made by ``Milter(transaction=…)`` at its first use, dropped at its end.

        Raises :class:`StageError` outside a mail transaction.
        """
        transaction = self._conversation.transaction
        if transaction is None:
            raise StageError(
                "there is no mail transaction here, so ctx.transaction does not exist: it begins at on_mail; "
                "state of the whole connection belongs into ctx.session"
            )
        state: T = self._conversation.transaction_state(transaction)
        return state

    @property
    def connected(self) -> bool:
        """Does the MTA still wait? False: it has closed its connection, and will not read the answer.

        For plain functions that work long; a coroutine is cancelled by itself. An MTA whose machine is gone without a
        word is taken to be there.
        """
        return not self._call.mta_is_gone()

    @property
    def actions(self) -> Actions:
        """What the MTA granted this filter to do at the end of a message."""
        return self._call.granted()[0]

    @property
    def options(self) -> ProtocolOptions:
        """What was agreed with the MTA about the protocol."""
        return self._call.granted()[1]

    if not TYPE_CHECKING:  # or every misspelt attribute would pass the type checkers

        def __getattr__(self, name: str) -> NoReturn:
            if name in _ACTIONS:
                stage = self._call.stage.decorator
                raise TooEarlyError(f"{name}() is possible only at the end of the message, in on_eom, not in {stage}")
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


class EomContext(Context[S, T]):
    """The context at the end of a message, where the message can be changed.

    Changes take effect only when the message is accepted. The MTA never tells whether it carried
    them out (libmilter's page of ``smfi_chgfrom``). Each method raises ``ValueError`` for an
    argument that would break the message, and :class:`ActionError` when the change was not sent.

    >>> from milter import EomContext, Milter, Status
    >>> app = Milter("example")
    >>> @app.on_eom
    ... def mark(ctx: EomContext) -> Status:
    ...     ctx.add_header("X-Recipients", str(len(ctx.recipients)))
    ...     for number in range(3, 0, -1):
    ...         ctx.replace_header("X-Spam", number, None)  # the last one first
    ...     if not ctx.sender:
    ...         ctx.quarantine("a bounce, to be looked at")
    ...     return Status.CONTINUE
    """

    __slots__ = ()

    def add_header(self, name: str, value: str) -> None:
        """Add a header field at the end (``smfi_addheader``).

        Arguments:
            name: the field's name, ASCII, without the colon.
            value: its text. A longer one is folded by line ends (LF or CRLF) with white space after
                them. The MTA puts a space before it, unless ``Milter(leading_space=True)``.

        Sendmail puts a field whose name exists already above the first of that name.
        """
        self._call.add_header(checks.header_name(name), checks.header_value(value))

    def insert_header(self, index: int, name: str, value: str) -> None:
        """Insert a header field (``smfi_insheader``).

        Arguments:
            index: 0 is the top, above the MTA's own Received; 1 is below it. Postfix goes on counting
                each field; Sendmail counts some that it does not print, so 2 to 8 are the same as 1.
        """
        checks.index(index, lowest=0)
        self._call.insert_header(index, checks.header_name(name), checks.header_value(value))

    def replace_header(self, name: str, index: int, value: str | None) -> None:
        """Change a header field, or delete it (``smfi_chgheader``).

        Arguments:
            name: the field's name, matched without regard to case.
            index: which one of that name, from 1. Beyond the last one a field is added.
            value: the new text; None or ``""`` deletes the field.

        To delete several fields of one name begin with the last: Postfix renumbers the rest after
        each deletion, Sendmail does not.
        """
        checks.index(index, lowest=1)
        encoded = checks.header_value(value) if value is not None else None
        self._call.change_header(checks.header_name(name), index, encoded)

    def replace_sender(self, address: str, params: str | None = None) -> None:
        """Give the message another envelope sender (``smfi_chgfrom``).

        Arguments:
            address: with or without angle brackets; ``""`` or ``"<>"`` is the null sender.
            params: ESMTP parameters, separated by spaces, such as ``"RET=HDRS"``. Sendmail refuses
                those that it does not know, Postfix ignores them.
        """
        self._call.change_sender(checks.sender(address), checks.parameters(params))

    def add_recipient(self, address: str, params: str | None = None) -> None:
        """Add an envelope recipient (``smfi_addrcpt``, with parameters ``smfi_addrcpt_par``).

        Postfix delivers twice to an address that is a recipient already.
        """
        self._call.add_recipient(checks.recipient(address), checks.parameters(params))

    def remove_recipient(self, address: str) -> None:
        """Remove an envelope recipient (``smfi_delrcpt``), in any spelling.

        An address that is no recipient is ignored by the MTA.
        """
        known = [address] if isinstance(address, Address) and address.from_server else self._mailboxes().take(address)
        for encoded in dict.fromkeys(map(checks.known_recipient, known)) or [checks.recipient(address)]:
            self._call.remove_recipient(encoded)

    def replace_body(self, body: bytes | Iterable[bytes]) -> None:
        """Replace the message's body (``smfi_replacebody``).

        Arguments:
            body: the new body, with CRLF line ends, or an iterable of its parts, cut anywhere.

        Once in a message. Nothing else may be changed between the parts: Postfix fails a message
        whose new body is interrupted.
        """
        transaction = self._transaction()
        if transaction.body_replaced:
            raise ActionError(
                "the body was replaced already, and a second one would be appended to it; "
                "use append_body_chunk() to write it piece by piece"
            )
        self._send_body(transaction, checks.body_parts(body))

    def append_body_chunk(self, chunk: bytes) -> None:
        """Append to the new body; the first call of a message takes the old body away (``smfi_replacebody``)."""
        self._send_body(self._transaction(), checks.body_parts(chunk))

    def quarantine(self, reason: str) -> None:
        """Keep the message in the MTA's queue for a human to look at (``smfi_quarantine``).

        The verdict must accept the message, or it is refused all the same.

        Arguments:
            reason: one line, not empty.
        """
        self._call.quarantine(checks.reason(reason))

    def signal_progress(self) -> None:
        """Tell the MTA that the filter is still at work, so that it goes on waiting (``smfi_progress``).

        The library does so by itself, see ``Milter(progress=…)``. May be called from another thread. Within
        a new body it does nothing: the parts of the body themselves show progress, and Postfix lets nothing stand
        between them.
        """
        self._call.progress()

    def _mailboxes(self) -> Mailboxes:
        transaction = self._transaction()
        if transaction.mailboxes is None:
            transaction.mailboxes = Mailboxes(transaction.recipients)
        return transaction.mailboxes

    def _transaction(self) -> Transaction:
        transaction = self._conversation.transaction
        assert transaction is not None, "the end of a message without a message"
        return transaction

    def _send_body(self, transaction: Transaction, parts: Iterable[bytes]) -> None:
        send = self._call.send_body
        try:
            for part in parts:
                send(part)
                transaction.body_replaced = True
        except BaseException as failure:
            # Half a body was sent: whatever the handler makes of this, the message must not pass.
            if transaction.body_replaced and not isinstance(failure, ContextError):
                transaction.body_failure = failure
            raise


_ACTIONS = frozenset(name for name in vars(EomContext) if not name.startswith("_"))


class Negotiation(Protocol):
    """What the engine does for a :class:`NegotiateContext`."""

    offered_actions: Actions
    offered_options: ProtocolOptions
    actions: Actions
    leading_space: bool
    rejected_recipients: bool
    macros: dict[MacroList, list[str]]


class NegotiateContext(_View):
    """What an MTA offers at the start of a connection, and what the filter asks for.

    The library has already made its choice from the registered handlers; a handler of
    ``on_negotiate`` may take something away, or ask for macros. When it raises, the MTA does
    without the filter for this connection, in the way its configuration says.

    >>> from milter import Actions, Milter, NegotiateContext, Stage
    >>> app = Milter("example")
    >>> @app.on_negotiate
    ... def modest(ctx: NegotiateContext) -> None:
    ...     ctx.actions = ctx.actions & ~Actions.REPLACE_BODY
    ...     ctx.request_macros(Stage.CONNECT, ["{client_ptr}"])
    """

    __slots__ = ()

    @property
    def offered_actions(self) -> Actions:
        return self._negotiation.offered_actions

    @property
    def offered_options(self) -> ProtocolOptions:
        """What the MTA can do; the ``NOREPLY_*`` options count as offered, since libmilter stands in for them."""
        return self._negotiation.offered_options

    @property
    def actions(self) -> Actions:
        """What the filter will ask to be granted. Can be set to less, not to more."""
        return self._negotiation.actions

    @actions.setter
    def actions(self, actions: Actions) -> None:
        excess = Actions(actions) & ~self._negotiation.actions
        if excess:
            raise ValueError(f"{excess!r} is not among the actions that the MTA offers and the Milter allows")
        self._negotiation.actions = Actions(actions)

    @property
    def leading_space(self) -> bool:
        """Whether header values come with the space after the colon. Can be set to False."""
        return self._negotiation.leading_space

    @leading_space.setter
    def leading_space(self, wanted: bool) -> None:
        self._negotiation.leading_space = wanted and self._negotiation.leading_space

    @property
    def rejected_recipients(self) -> bool:
        """Whether the MTA shows recipients that it refuses. Can be set to False."""
        return self._negotiation.rejected_recipients

    @rejected_recipients.setter
    def rejected_recipients(self, wanted: bool) -> None:
        self._negotiation.rejected_recipients = wanted and self._negotiation.rejected_recipients

    def request_macros(self, stage: Stage, names: Iterable[str]) -> None:
        """Ask for macros at a stage, besides those of the decorators and those the MTA sends anyway.

        Raises ``ValueError`` for a stage that has no macros, and for a name that cannot be one.
        """
        if isinstance(names, str):
            raise TypeError(f'the names of macros must be a list, not a str: ["{names}"]')
        self._negotiation.macros.setdefault(checks.macro_list(stage), []).extend(map(macro_name, names))

    @property
    def _negotiation(self) -> Negotiation:
        negotiation: Any = self._call
        if negotiation is _EXPIRED:
            _EXPIRED.negotiation()
        return negotiation  # type: ignore[no-any-return]
