# SPDX-License-Identifier: GPL-3.0-or-later
"""The registry of handlers: what users decorate functions with. It knows nothing of libmilter."""

import inspect
import itertools
import math
import os
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import (
    TYPE_CHECKING,
    Any,
    Generic,
    Literal,
    NotRequired,
    TypeAlias,
    TypedDict,
    TypeVar,
    Unpack,
    overload,
)

from milter.addresses import Address
from milter.context import Context, EomContext, NegotiateContext, S, T
from milter.coroutines import is_coroutine_function
from milter.envelope import ClientAddress, Params
from milter.errors import RegistrationError
from milter.message import Message
from milter.protocol import MACRO_LISTS, Actions, Stage, macro_name
from milter.verdict import Reply, Status, Verdict

if TYPE_CHECKING:
    from milter.options import RunOptions, StartOptions
    from milter.server import Server

__all__ = ["Milter"]

H = TypeVar("H", bound=Callable[..., Any])

OnError: TypeAlias = Status | Reply | Literal["shutdown"]
HeaderReplies: TypeAlias = Literal["together", "each"]
Answer: TypeAlias = Verdict | Awaitable[Verdict]
"""Of a plain function, or of an ``async def``."""
Nothing: TypeAlias = Awaitable[None] | None


@dataclass(frozen=True, slots=True)
class Form:
    """One of the decorators: when its handlers are called, and with what."""

    stage: Stage
    parameters: tuple[str, ...] = ()
    """What a handler gets after its context."""
    context: str = "Context"
    name: str = ""

    @property
    def decorator(self) -> str:
        return self.name or self.stage.decorator

    @property
    def signature(self) -> str:
        """The right signature, for a message about a wrong one."""
        parameters = ", ".join([f"ctx: {self.context}", *self.parameters])
        result = "None" if self.stage in _WITHOUT_VERDICT else "Status | Reply | None"
        return f"def {self.decorator}({parameters}) -> {result}"


_WITHOUT_VERDICT = (Stage.NEGOTIATE, Stage.ABORT, Stage.CLOSE)
_FORMS = {
    Stage.NEGOTIATE: Form(Stage.NEGOTIATE, (), "NegotiateContext"),
    Stage.CONNECT: Form(Stage.CONNECT, ("hostname: str", "address: ClientAddress")),
    Stage.HELO: Form(Stage.HELO, ("name: str",)),
    Stage.MAIL: Form(Stage.MAIL, ("sender: Address", "params: Params")),
    Stage.RCPT: Form(Stage.RCPT, ("recipient: Address", "params: Params")),
    Stage.DATA: Form(Stage.DATA),
    Stage.HEADER: Form(Stage.HEADER, ("name: str", "value: str")),
    Stage.EOH: Form(Stage.EOH),
    Stage.BODY: Form(Stage.BODY, ("chunk: bytes",)),
    Stage.EOM: Form(Stage.EOM, (), "EomContext"),
    Stage.UNKNOWN: Form(Stage.UNKNOWN, ("command: str",)),
    Stage.ABORT: Form(Stage.ABORT),
    Stage.CLOSE: Form(Stage.CLOSE),
}
WHOLE_MESSAGE = Form(Stage.EOM, ("message: Message",), "EomContext", "on_message")


@dataclass(frozen=True, slots=True)
class Handler:
    """A registered function."""

    function: Callable[..., Any]
    form: Form
    observes: bool
    """It is annotated ``-> None``: a promise never to reply."""
    macros: tuple[str, ...] = ()
    asynchronous: bool = False
    """What the function returns is to be awaited, and gives the verdict then."""

    @property
    def name(self) -> str:
        return _name(self.function)


class Register(Generic[H]):
    """A decorator of one stage: ``@app.on_helo``, or ``@app.on_helo(macros=["{tls_version}"])``."""

    __slots__ = ("_app", "_form")

    def __init__(self, app: "Milter[Any, Any]", form: Form) -> None:
        self._app = app
        self._form = form

    @overload
    def __call__(self, handler: H, /) -> H: ...
    @overload
    def __call__(self, *, macros: Iterable[str] = ()) -> Callable[[H], H]: ...

    def __call__(self, handler: H | None = None, *, macros: Iterable[str] = ()) -> H | Callable[[H], H]:
        names = _checked_macros(self._form, macros)
        if handler is None:
            return lambda function: self._register(function, names)
        return self._register(handler, names)

    def _register(self, function: H, macros: tuple[str, ...]) -> H:
        arguments = [None] * (1 + len(self._form.parameters))
        signature = _checked_call(function, arguments, self._form.signature)
        observes = signature.return_annotation in (None, type(None), "None")
        asynchronous = is_coroutine_function(function)
        if asynchronous and self._form.stage is Stage.NEGOTIATE:
            raise RegistrationError(
                f"{_name(function)} is a coroutine function, and {self._form.decorator} takes plain functions only: "
                f"nothing is to be waited for before the MTA has its answer; write: {self._form.signature}"
            )
        self._app.handlers[self._form.stage].append(Handler(function, self._form, observes, macros, asynchronous))
        return function


class Hook:
    """A decorator of the process's beginning or end."""

    __slots__ = ("_functions", "_name")

    def __init__(self, name: str, functions: list[Callable[[], object]]) -> None:
        self._name = name
        self._functions = functions

    def __call__(self, function: Callable[[], Any]) -> Callable[[], Any]:
        _checked_call(function, [], f"def {self._name}() -> None")
        self._functions.append(function)
        return function


class Options(TypedDict):
    """The keyword arguments of :class:`Milter` besides the factories."""

    on_error: NotRequired[OnError]
    actions: NotRequired[Actions]
    requires: NotRequired[Actions]
    leading_space: NotRequired[bool]
    rejected_recipients: NotRequired[bool]
    spool_size: NotRequired[int]
    spool_directory: NotRequired[str | os.PathLike[str] | None]
    header_replies: NotRequired[HeaderReplies]
    handler_timeout: NotRequired[float | None]
    progress: NotRequired[float | None]


class Milter(Generic[S, T]):
    """A mail filter: a name, some policy, and the functions that were decorated.

    Arguments:
        name: what libmilter calls the filter in the system's log.
        session: makes your state of an SMTP session, ``ctx.session``: a class without arguments, say a
            dataclass. Without one it is an empty ``types.SimpleNamespace``.
        transaction: the same for a message, ``ctx.transaction``.
        on_error: what the MTA is told when a handler raises. ``Status.TEMPFAIL``: the client shall try
            again. ``"shutdown"``: besides, the filter stops, and :meth:`run` raises
            :class:`HandlerError <milter.HandlerError>`.
        actions: the most that the filter will ask to be allowed; by default all that the MTA offers.
        requires: without these the filter refuses to work for an MTA, which then does what its
            configuration says of a filter that fails.
        leading_space: header values come and go with the space after the colon, byte for byte, as a
            filter that signs needs it; only where the MTA can do that (``ctx.options``).
        rejected_recipients: show ``on_rcpt`` the recipients too that Postfix refuses itself; such a
            one has the macro ``{rcpt_mailer}`` of ``error``. They are not in ``ctx.recipients``.
        spool_size: bytes of a message for ``on_message`` that are kept in memory; a longer one lies in a
            temporary file without a name. 1 MiB.
        spool_directory: where that file is made; by default the system's directory for such files
            (``tempfile.gettempdir``). When the disk is full, ``on_error`` has the answer.
        header_replies: when the MTA hears what handlers of ``on_header`` answer. ``"together"``: at the end of the
            header, once for all fields; until then the MTA need not wait. ``"each"``: after each field, which takes
            several times as long. The client, the MTA's log and the delivered message are the same.
        handler_timeout: seconds that one call of an ``async def`` handler may take. Then it is cancelled
            (``asyncio.CancelledError`` is raised where it waits), and ``on_error`` has the answer. None: no limit.
            It concerns coroutines alone: a plain function cannot be interrupted.
        progress: seconds after which, again and again, the MTA is told that handlers are still at work at the end of a
            message, so that it goes on waiting (``smfi_progress``); never between two pieces of a new body. None or 0:
            only :meth:`EomContext.signal_progress <milter.EomContext.signal_progress>` tells it.

    Handlers of a stage run in the order of their registration, until one gives a verdict other than
    ``CONTINUE``. A handler annotated ``-> None`` promises never to reply: when all handlers of a
    stage do, the MTA does not wait there for the filter.

    Handlers are plain functions or ``async def``, in any mixture; so are hooks. Only ``on_negotiate`` takes plain
    functions alone. The coroutines of a process run on one event loop, in a thread of its own, and thousands of
    messages may wait in them at once. A plain function runs on the thread of its message. What blocks belongs into
    one of those, or into ``asyncio.to_thread``, 512 calls at most at once: in a coroutine it holds up all others. So
    does a large new body for an MTA that reads slowly; ``message.body = …`` in ``on_message`` does not, nor does
    ``await asyncio.to_thread(ctx.replace_body, …)``. A coroutine is cancelled when its MTA has closed the connection.

    What a handler sets in context variables (:mod:`contextvars`), the later ones of the same message see, or, before
    MAIL, those of the whole connection. Hooks of ``on_start`` set them for all.

    >>> app = Milter("guard")
    >>> @app.on_rcpt
    ... def no_relay(ctx: Context, recipient: Address, params: Params) -> Status | Reply:
    ...     if recipient.matches("example.net"):
    ...         return Reply(550, "5.7.1", "not for you")
    ...     return Status.CONTINUE
    >>> [handler.name for handler in app.handlers[Stage.RCPT]]
    ['no_relay']
    """

    @overload
    def __init__(self: "Milter[Any, Any]", name: str = "milter", **options: Unpack[Options]) -> None: ...
    @overload
    def __init__(
        self: "Milter[S, Any]", name: str = "milter", *, session: Callable[[], S], **options: Unpack[Options]
    ) -> None: ...
    @overload
    def __init__(
        self: "Milter[Any, T]",
        name: str = "milter",
        *,
        transaction: Callable[[], T],
        **options: Unpack[Options],
    ) -> None: ...
    @overload
    def __init__(
        self: "Milter[S, T]",
        name: str = "milter",
        *,
        session: Callable[[], S],
        transaction: Callable[[], T],
        **options: Unpack[Options],
    ) -> None: ...

    def __init__(
        self,
        name: str = "milter",
        *,
        session: Callable[[], Any] | None = None,
        transaction: Callable[[], Any] | None = None,
        on_error: OnError = Status.TEMPFAIL,
        actions: Actions = Actions.ALL,
        requires: Actions = Actions.NONE,
        leading_space: bool = False,
        rejected_recipients: bool = False,
        spool_size: int = 1 << 20,
        spool_directory: str | os.PathLike[str] | None = None,
        header_replies: HeaderReplies = "together",
        handler_timeout: float | None = None,
        progress: float | None = 30.0,
    ) -> None:
        if not name or "\0" in name:
            raise ValueError(f"{name!r} cannot be the name of a filter")
        self.name = name
        self.new_session = session
        self.new_transaction = transaction
        self.on_error = _checked_on_error(on_error)
        self.actions = Actions(actions)
        self.requires = Actions(requires)
        if self.requires & ~self.actions:
            raise ValueError(f"{self.requires & ~self.actions!r} is required, but not among the actions")
        self.leading_space = leading_space
        self.rejected_recipients = rejected_recipients
        if spool_size < 0:
            raise ValueError(f"spool_size must be 0 or more bytes, not {spool_size}")
        self.spool_size = spool_size
        self.spool_directory = spool_directory
        if header_replies not in ("together", "each"):
            raise ValueError(f'header_replies must be "together" or "each", not {header_replies!r}')
        self.header_replies = header_replies
        if handler_timeout is not None and not 0 < handler_timeout < math.inf:
            raise ValueError(
                f"handler_timeout must be more than 0 seconds, or None for no limit, not {handler_timeout}"
            )
        self.handler_timeout = handler_timeout
        if progress is not None and not 0 <= progress < math.inf:
            raise ValueError(f"progress must be a number of seconds, or None for never, not {progress}")
        self.progress = progress
        self.handlers: dict[Stage, list[Handler]] = {stage: [] for stage in Stage}
        self.start_hooks: list[Callable[[], object]] = []
        self.stop_hooks: list[Callable[[], object]] = []
        self.server: Server | None = None
        """What serves this filter, while it runs."""

    @property
    def functions(self) -> list[Callable[..., Any]]:
        """All that were decorated until now, hooks included."""
        handlers = itertools.chain.from_iterable(self.handlers.values())
        return [*(handler.function for handler in handlers), *self.start_hooks, *self.stop_hooks]

    def include(self, other: "Milter[Any, Any]") -> None:
        """Add the handlers and hooks of another filter, after those that are here already.

        The policy (name, ``on_error``, actions, factories) stays that of this filter.
        """
        if other is self:
            raise ValueError("a filter cannot include itself")
        for stage, handlers in other.handlers.items():
            self.handlers[stage].extend(handlers)
        self.start_hooks.extend(other.start_hooks)
        self.stop_hooks.extend(other.stop_hooks)

    # ---- The stages ------------------------------------------------------------------------

    @property
    def on_negotiate(self) -> Register[Callable[[NegotiateContext], None]]:
        """At the start of a connection: what the MTA offers (``xxfi_negotiate``)."""
        return Register(self, _FORMS[Stage.NEGOTIATE])

    @property
    def on_connect(self) -> Register[Callable[[Context[S, T], str, ClientAddress], Answer]]:
        """A client connected: its name and address (``xxfi_connect``).

        ``ACCEPT`` lets the whole connection pass without the filter; ``REJECT`` and ``TEMPFAIL``
        refuse it.
        """
        return Register(self, _FORMS[Stage.CONNECT])

    @property
    def on_helo(self) -> Register[Callable[[Context[S, T], str], Answer]]:
        """HELO or EHLO, with the client's name (``xxfi_helo``): never, once, or again after STARTTLS."""
        return Register(self, _FORMS[Stage.HELO])

    @property
    def on_mail(self) -> Register[Callable[[Context[S, T], Address, Params], Answer]]:
        """MAIL: the sender and its ESMTP parameters (``xxfi_envfrom``). A mail transaction begins."""
        return Register(self, _FORMS[Stage.MAIL])

    @property
    def on_rcpt(self) -> Register[Callable[[Context[S, T], Address, Params], Answer]]:
        """RCPT: a recipient and its ESMTP parameters (``xxfi_envrcpt``).

        ``REJECT`` and ``TEMPFAIL`` concern this recipient alone; ``ACCEPT`` and ``DISCARD`` the message.
        """
        return Register(self, _FORMS[Stage.RCPT])

    @property
    def on_data(self) -> Register[Callable[[Context[S, T]], Answer]]:
        """The DATA command (``xxfi_data``)."""
        return Register(self, _FORMS[Stage.DATA])

    @property
    def on_header(self) -> Register[Callable[[Context[S, T], str, str], Answer]]:
        """A header field: name, and value with its folds as LF and white space (``xxfi_header``).

        Handlers are called for all fields at the end of the header, before those of ``on_eoh``, in order, until one
        gives a verdict; see ``Milter(header_replies=…)``. ``SKIP`` ends the calls of this handler for this message.
        """
        return Register(self, _FORMS[Stage.HEADER])

    @property
    def on_eoh(self) -> Register[Callable[[Context[S, T]], Answer]]:
        """The end of the header (``xxfi_eoh``)."""
        return Register(self, _FORMS[Stage.EOH])

    @property
    def on_body(self) -> Register[Callable[[Context[S, T], bytes], Answer]]:
        """A piece of the body, up to 65,535 bytes, cut anywhere (``xxfi_body``). No call for an empty body.

        ``SKIP`` ends the calls of this handler for this message; once all handlers have skipped,
        the MTA need not send the rest.
        """
        return Register(self, _FORMS[Stage.BODY])

    @property
    def on_eom(self) -> Register[Callable[[EomContext[S, T]], Answer]]:
        """The end of the message, where it can be changed (``xxfi_eom``)."""
        return Register(self, _FORMS[Stage.EOM])

    @property
    def on_message(self) -> Register[Callable[[EomContext[S, T], Message], Answer]]:
        """The whole message at its end, gathered without Python: see :class:`Message <milter.Message>`.

        Handlers of ``on_eom`` and ``on_message`` run together, in the order of their registration. What
        was edited is sent to the MTA when all have run, and only if the message is accepted.
        """
        return Register(self, WHOLE_MESSAGE)

    @property
    def on_unknown(self) -> Register[Callable[[Context[S, T], str], Answer]]:
        """An SMTP command that the MTA does not know (``xxfi_unknown``); it is refused in any case.

        ``REJECT``, ``TEMPFAIL`` or a ``Reply`` change how; Postfix 3.10 and newer keeps its own text for a
        permanent refusal. Sendmail and Postfix 3.10 tell the whole line, older Postfix the verb.
        """
        return Register(self, _FORMS[Stage.UNKNOWN])

    @property
    def on_abort(self) -> Register[Callable[[Context[S, T]], Nothing]]:
        """The message was given up by the client or the MTA (``xxfi_abort``).

        Once for each message that was begun and not decided by this filter; never after ``on_eom``.
        """
        return Register(self, _FORMS[Stage.ABORT])

    @property
    def on_close(self) -> Register[Callable[[Context[S, T]], Nothing]]:
        """The connection ends (``xxfi_close``). Always called; may be the only call of all."""
        return Register(self, _FORMS[Stage.CLOSE])

    @property
    def on_start(self) -> Hook:
        """Before the process serves: open what handlers share, say a database pool. No context."""
        return Hook("on_start", self.start_hooks)

    @property
    def on_stop(self) -> Hook:
        """After the process has served; the last one registered runs first. No context."""
        return Hook("on_stop", self.stop_hooks)

    # ---- Running ---------------------------------------------------------------------------

    def run(self, socket: str | None = None, **options: "Unpack[RunOptions]") -> None:
        """Serve until the process is told to stop: SIGTERM, SIGINT (Ctrl-C), :meth:`stop`; without workers SIGHUP, too.

        Arguments:
            socket: where to listen, see :mod:`milter.listener`: ``inet:port@host``, ``unix:path``, …
            options: see :class:`milter.options.RunOptions`.

        With ``workers=2`` or more, as many processes serve. They are forked from this one, which only watches them;
        SIGHUP replaces them without a message lost. They have the code that this process has loaded: to load new code
        on SIGHUP, run the filter with ``milter run``. When they cannot go on, ``SystemExit`` is raised.

        Raises :class:`SocketError <milter.SocketError>` when the socket cannot be had, and
        :class:`HandlerError <milter.HandlerError>` for ``on_error="shutdown"``. Only in the main thread,
        which gets the signals; elsewhere use :meth:`start`.
        """
        from milter import runner

        runner.run(self, socket, **options)

    def stop(self) -> None:
        """Ask the running filter to stop, from a handler or any thread; returns at once.

        Open connections get their grace, then :meth:`run` returns. Does nothing when the filter is not running.
        """
        if self.server is not None:
            self.server.request_stop()

    def start(self, socket: str | None = None, **options: "Unpack[StartOptions]") -> "Server":
        """Serve in the background: a context manager that stops at its end. For embedding and tests.

        ::

            with app.start("unix:/tmp/filter.sock") as server:
                print(server.socket)
        """
        from milter import server

        return server.Server(self, socket, **options).start()


def _checked_call(function: Callable[..., Any], arguments: list[None], right: str) -> inspect.Signature:
    if not callable(function):
        raise RegistrationError(f"a handler must be a function, not {function!r}; write: {right}")
    if inspect.isasyncgenfunction(function):
        raise RegistrationError(
            f"{_name(function)} is an asynchronous generator, since it has a yield, and gives no answer; write: {right}"
        )
    signature = inspect.signature(function)
    try:
        signature.bind(*arguments)
    except TypeError as mismatch:
        raise RegistrationError(
            f"{_name(function)}{signature} cannot be called with {len(arguments)} arguments ({mismatch}); "
            f"write: {right}"
        ) from None
    return signature


def _checked_macros(form: Form, macros: Iterable[str]) -> tuple[str, ...]:
    if isinstance(macros, str):
        raise RegistrationError(f'macros must be a list of names, not a str: macros=["{macros}"]')
    names = tuple(map(macro_name, macros))
    if names and form.stage not in MACRO_LISTS:
        raise RegistrationError(f"{form.decorator} has no option macros: the MTAs send none for this stage")
    return names


def _checked_on_error(on_error: OnError) -> OnError:
    if on_error == "shutdown" or isinstance(on_error, Reply):
        return on_error
    if on_error in (Status.DISCARD, Status.SKIP):
        raise ValueError(f"on_error={on_error} would lose mail whenever a handler raises")
    if isinstance(on_error, Status):
        return on_error
    raise ValueError(f'on_error must be a Status, a Reply or "shutdown", not {on_error!r}')


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__qualname__", None) or repr(function)
