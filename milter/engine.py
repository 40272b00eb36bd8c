# SPDX-License-Identifier: GPL-3.0-or-later
"""From C to handlers and back: the only module that touches ``ffi`` and ``lib``.

The life of a call, from here on (its beginning, in C, is told in shim/milter_shim.c):

1. A thread of libmilter enters :func:`milter_python_enter` with a session, a token that is valid
   until the call returns, and the session's log: everything that happened since the last call.
2. The :class:`Engine` of the filter finds the connection's :class:`Conversation` and replays the log
   over it: client, HELO, sender, recipients, the end of messages.
3. For each event whose stage has handlers a context is made, and the handlers run in the order of
   their registration until one gives a verdict other than CONTINUE.
4. What a handler asks of its context goes through a :class:`SessionCall`, with session and token,
   to a function of the shim, which checks the token under the session's lock.
5. The context expires.
6. The verdict goes back as a number: the verdict's, with flags. Whatever goes wrong on the way (an
   exception here, a callback not attached, no memory) is the number 0, which the shim takes for a
   failure, and answers as a temporary one.

Threads: a connection's events come one at a time, each on any thread; so a Conversation needs no
lock. Different connections run side by side. An Engine's table of conversations is changed by
single dict operations, which are atomic.
"""

import contextlib
import itertools
import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from milter._shim import ffi, lib
from milter.app import Handler, Milter
from milter.context import Context, Conversation, EomContext, NegotiateContext, Transaction, expire
from milter.envelope import Address, ClientAddress, InetAddress, UnixAddress
from milter.errors import ActionError, ContextError, HandlerError, MilterError
from milter.plan import Plan, make_plan
from milter.protocol import Actions, MacroList, ProtocolOptions, Stage
from milter.signals import wait_for_signal_thread
from milter.standins import Placeholder, unreachable_listener
from milter.verdict import MEANINGFUL, Reply, Status, Verdict

log = logging.getLogger("milter")

Decision = Status | Reply

_REFUSALS = (Status.REJECT, Status.TEMPFAIL)


# ---- What a context asks of the shim ---------------------------------------------------------

_RESULTS = {
    lib.MILTER_NOT_EOM: "it is possible only at the end of the message, in on_eom",
    lib.MILTER_NOT_GRANTED: "the MTA did not grant this action (or Milter(actions=…) did not ask for it)",
    lib.MILTER_TOO_LONG: "it is longer than one packet of the protocol, 65,535 bytes",
    lib.MILTER_BODY_OVER: "another change was sent after the first part of the new body, and Postfix fails "
    "a message whose new body is interrupted; send all parts of the body one after another",
    lib.MILTER_FAILED: "libmilter could not send it; the MTA has probably closed the connection",
}


def _check(result: int, action: str) -> None:
    if result == lib.MILTER_OK:
        return
    if result == lib.MILTER_EXPIRED:
        raise ContextError(f"{action} came too late: the handler of this context has returned")
    raise ActionError(f"{action} was not sent: {_RESULTS.get(result, f'error {result}')}")


class SessionCall:
    """A session of the shim, for the time of one call; see :class:`milter.context.Call`."""

    __slots__ = ("_plan", "_session", "_token", "stage")

    def __init__(self, session: Any, token: int, stage: Stage, plan: Plan) -> None:
        self._session = session
        self._token = token
        self._plan = plan
        self.stage = stage

    def macro(self, name: bytes) -> bytes | None:
        size = 256
        while True:
            buffer = ffi.new("char[]", size)
            length = lib.milter_macro(self._session, self._token, name, buffer, size)
            if length == lib.MILTER_ABSENT:
                return None
            if length < 0:
                _check(length, "the look-up of a macro")
            if length < size:
                value: bytes = ffi.unpack(buffer, length)
                return value
            size = length + 1

    def macro_names(self) -> tuple[str, ...]:
        return self._plan.known_macros

    def granted(self) -> tuple[Actions, ProtocolOptions]:
        masks = ffi.new("unsigned long[2]")
        _check(lib.milter_granted(self._session, self._token, masks, masks + 1), "the question")
        return Actions(masks[0]), ProtocolOptions(masks[1])

    def request_macros(self, entry: MacroList, names: Sequence[str]) -> None:
        text = " ".join(names).encode("ascii")
        _check(lib.milter_request_macros(self._session, self._token, entry.value, text), "the request of macros")

    def set_reply(self, reply: Reply) -> bool:
        lines = [ffi.new("char[]", line) for line in reply.encoded]
        code = str(reply.code).encode("ascii")
        enhanced = ffi.NULL if reply.enhanced is None else ffi.new("char[]", reply.enhanced.encode("ascii"))
        array = ffi.new("char *[]", lines)
        result = lib.milter_set_reply(self._session, self._token, code, enhanced, array, len(lines))
        return bool(result == lib.MILTER_OK)

    def add_header(self, name: bytes, value: bytes) -> None:
        _check(lib.milter_add_header(self._session, self._token, name, value), "add_header()")

    def insert_header(self, index: int, name: bytes, value: bytes) -> None:
        _check(lib.milter_insert_header(self._session, self._token, index, name, value), "insert_header()")

    def change_header(self, name: bytes, index: int, value: bytes | None) -> None:
        text = ffi.NULL if value is None else value
        _check(lib.milter_change_header(self._session, self._token, name, index, text), "replace_header()")

    def change_sender(self, address: bytes, parameters: bytes | None) -> None:
        text = ffi.NULL if parameters is None else parameters
        _check(lib.milter_change_sender(self._session, self._token, address, text), "replace_sender()")

    def add_recipient(self, address: bytes, parameters: bytes | None) -> None:
        text = ffi.NULL if parameters is None else parameters
        _check(lib.milter_add_recipient(self._session, self._token, address, text), "add_recipient()")

    def remove_recipient(self, address: bytes) -> None:
        _check(lib.milter_remove_recipient(self._session, self._token, address), "remove_recipient()")

    def send_body(self, data: bytes) -> None:
        _check(lib.milter_send_body(self._session, self._token, data, len(data)), "a part of the new body")

    def quarantine(self, reason: bytes) -> None:
        _check(lib.milter_quarantine(self._session, self._token, reason), "quarantine()")

    def progress(self) -> None:
        _check(lib.milter_progress(self._session, self._token), "signal_progress()")


class _Negotiation:
    """The state of one negotiation; see :class:`milter.context.Negotiation`."""

    def __init__(self, offered_actions: int, offered_steps: int, actions: int, steps: int) -> None:
        options = ProtocolOptions(steps)
        self.offered_actions = Actions(offered_actions)
        self.offered_options = ProtocolOptions(offered_steps)
        self.actions = Actions(actions) & ~Actions.REQUEST_MACROS
        self.leading_space = ProtocolOptions.LEADING_SPACE in options
        self.rejected_recipients = ProtocolOptions.REJECTED_RCPT in options
        self.macros: dict[MacroList, list[str]] = {}

    def steps(self, steps: int) -> int:
        if not self.leading_space:
            steps &= ~ProtocolOptions.LEADING_SPACE
        if not self.rejected_recipients:
            steps &= ~ProtocolOptions.REJECTED_RCPT
        return steps


# ---- The log ---------------------------------------------------------------------------------


class _End:
    """The message was over before this, decided without Python (record X)."""


Event = tuple[Stage | type[_End], tuple[Any, ...]]


def read_log(text: str, chunk: bytes) -> Iterator[Event]:
    """The events of a log, as the stage and the arguments of its handlers."""
    fields = iter(text.split("\0"))
    for letter in fields:
        if letter in ("M", "R"):
            arguments = list(itertools.islice(fields, int(next(fields))))
            address = Address.from_arguments(arguments)
            yield (Stage.MAIL if letter == "M" else Stage.RCPT), (address, address.params)
        elif letter == "L":
            yield Stage.HEADER, (next(fields), next(fields))
        elif letter == "B":
            yield Stage.BODY, (chunk,)
        elif letter == "C":
            yield Stage.CONNECT, (next(fields), _client_address(next(fields), next(fields), next(fields)))
        elif letter == "H":
            yield Stage.HELO, (next(fields),)
        elif letter == "U":
            yield Stage.UNKNOWN, (next(fields),)
        elif letter in _BARE:
            yield _BARE[letter], ()
        elif letter:
            raise AssertionError(f"the shim wrote a record of the unknown kind {letter!r}")


_BARE: dict[str, Stage | type[_End]] = {
    "T": Stage.DATA,
    "N": Stage.EOH,
    "E": Stage.EOM,
    "A": Stage.ABORT,
    "Q": Stage.CLOSE,
    "X": _End,
}


def _client_address(family: str, port: str, host: str) -> ClientAddress:
    if family == "U":
        return None
    return UnixAddress(host) if family == "L" else InetAddress(host, int(port))


# ---- One filter ------------------------------------------------------------------------------


class _Connection(Conversation):
    """A conversation, and what the engine remembers of it besides."""

    __slots__ = ("connect_failure", "helo_failure", "message_failure", "skipped")

    def __init__(self, number: int, app: Milter[Any, Any]) -> None:
        super().__init__(number, app.new_session, app.new_transaction)
        self.connect_failure: Decision | None = None
        self.helo_failure: Decision | None = None
        self.message_failure: Decision | None = None
        self.skipped: set[Handler] = set()

    @property
    def failure(self) -> Decision | None:
        """What the MTA is still to be told, since a handler raised in a stage that does not reply."""
        return self.connect_failure or self.helo_failure or self.message_failure

    def end_message(self) -> None:
        self.transaction = None
        self.message_failure = None
        self.skipped.clear()


class Engine:
    """Runs the handlers of one filter. `on_shutdown` is told the failure that shall stop the filter."""

    def __init__(self, app: Milter[Any, Any], on_shutdown: Callable[[HandlerError], None]) -> None:
        self.app = app
        self.plan = make_plan(app)
        self._on_shutdown = on_shutdown
        self._handlers = {stage: tuple(handlers) for stage, handlers in app.handlers.items()}
        self._connections: dict[int, _Connection] = {}

    @property
    def connections(self) -> int:
        """How many connections have Python objects now; for tests of leaks."""
        return len(self._connections)

    # ---- Entered by the shim

    def negotiate(self, call: SessionCall, number: int, negotiation: _Negotiation) -> bool:
        """Run the handlers of on_negotiate. False: refuse to work for this MTA."""
        missing = self.plan.requires & ~negotiation.offered_actions
        if missing:
            log.error("the MTA does not offer %r, which this filter requires: connection refused", missing)
            return False
        connection = self._connections.setdefault(number, _Connection(number, self.app))
        context = NegotiateContext(connection, negotiation)  # type: ignore[arg-type]
        try:
            for handler in self._handlers[Stage.NEGOTIATE]:
                self._checked(handler, handler.function(context), Stage.NEGOTIATE)
        except BaseException as failure:
            self._failed(handler, failure, Stage.NEGOTIATE, connection, call)
            return False
        finally:
            expire(context)
        if Actions.REQUEST_MACROS in negotiation.offered_actions:
            for entry, names in self.plan.requests(negotiation.macros).items():
                call.request_macros(entry, names)
        return True

    def enter(self, call: SessionCall, number: int, text: str, chunk: bytes) -> int:
        """Replay a log, and answer the event at its end."""
        connection = self._connections.get(number)
        if connection is None:
            connection = self._connections.setdefault(number, _Connection(number, self.app))
        if call.stage is Stage.CLOSE:
            del self._connections[number]
        decision: Decision = Status.CONTINUE
        for stage, arguments in read_log(text, chunk):
            if stage is _End:
                connection.end_message()
            elif isinstance(stage, Stage):
                decision = self._event(stage, arguments, connection, call)
        return self._answer(decision, connection, call)

    # ---- Events

    def _event(self, stage: Stage, arguments: tuple[Any, ...], connection: _Connection, call: SessionCall) -> Decision:
        self._begin(stage, arguments, connection)
        if stage in self.plan.silent or connection.failure is None or stage in (Stage.ABORT, Stage.CLOSE):
            decision = self._run(stage, arguments, connection, call)
        else:
            decision = _fitting(connection.failure, stage)
        if stage in self.plan.silent and decision is not Status.CONTINUE:
            self._owe(decision, stage, connection)
            decision = Status.CONTINUE
        self._end(stage, arguments, decision, connection, call)
        return decision

    def _begin(self, stage: Stage, arguments: tuple[Any, ...], connection: _Connection) -> None:
        """What an event means for the conversation, before its handlers run."""
        if stage is Stage.CONNECT:
            connection.hostname, connection.address = arguments
        elif stage is Stage.HELO:
            connection.end_message()
            connection.helo = arguments[0]
            connection.helo_failure = None
        elif stage is Stage.MAIL:
            connection.end_message()
            connection.transaction = Transaction(arguments[0])
        elif stage is Stage.CLOSE:
            connection.end_message()

    def _end(
        self,
        stage: Stage,
        arguments: tuple[Any, ...],
        decision: Decision,
        connection: _Connection,
        call: SessionCall,
    ) -> None:
        """What an event means for the conversation, after its handlers have run."""
        status = _status(decision)
        transaction = connection.transaction
        accepted = stage is Stage.RCPT and status not in _REFUSALS and not self._refused_by_mta(call)
        if accepted and transaction is not None:
            transaction.recipients.append(arguments[0])
        if stage in (Stage.EOM, Stage.ABORT) or (stage in _DECIDING and _decides(stage, status)):
            connection.end_message()

    def _refused_by_mta(self, call: SessionCall) -> bool:
        if ProtocolOptions.REJECTED_RCPT not in self.plan.options:
            return False
        return call.macro(b"{rcpt_mailer}") == b"error"

    def _owe(self, decision: Decision, stage: Stage, connection: _Connection) -> None:
        """A handler raised where no reply is possible: the next stage that replies tells the MTA."""
        if stage is Stage.CONNECT:
            connection.connect_failure = decision
        elif stage is Stage.HELO:
            connection.helo_failure = decision
        elif connection.transaction is not None:
            connection.message_failure = connection.message_failure or decision

    # ---- Handlers

    def _run(self, stage: Stage, arguments: tuple[Any, ...], connection: _Connection, call: SessionCall) -> Decision:
        handlers = self._handlers[stage]
        if not handlers:
            return Status.CONTINUE
        make = EomContext if stage is Stage.EOM else Context
        context: Context[Any, Any] = make(connection, call)
        try:
            return self._first_decision(stage, handlers, context, arguments, connection, call)
        finally:
            expire(context)

    def _first_decision(
        self,
        stage: Stage,
        handlers: Sequence[Handler],
        context: Context[Any, Any],
        arguments: tuple[Any, ...],
        connection: _Connection,
        call: SessionCall,
    ) -> Decision:
        transaction = connection.transaction
        for handler in handlers:
            if handler in connection.skipped:
                continue
            try:
                decision = self._checked(handler, handler.function(context, *arguments), stage)
                if transaction is not None and transaction.body_failure is not None:
                    raise transaction.body_failure
            except BaseException as failure:
                decision = self._failed(handler, failure, stage, connection, call)
                if stage in (Stage.ABORT, Stage.CLOSE):
                    continue
            if decision is Status.SKIP:
                connection.skipped.add(handler)
            elif decision is not Status.CONTINUE:
                return decision
        if stage is Stage.BODY and connection.skipped.issuperset(handlers):
            return Status.SKIP
        return Status.CONTINUE

    def _checked(self, handler: Handler, verdict: Verdict, stage: Stage) -> Decision:
        """The verdict, if it is one that means something here."""
        if verdict is None:
            return Status.CONTINUE
        if not isinstance(verdict, Status | Reply):
            raise TypeError(
                f"{handler.name} returned {verdict!r}; a handler returns a milter.Status, a milter.Reply or None"
            )
        if handler.observes:
            raise TypeError(f"{handler.name} is annotated '-> None' and returned {verdict!r}")
        if _status(verdict) not in MEANINGFUL[stage]:
            meaningful = ", ".join(status.name for status in Status if status in MEANINGFUL[stage])
            raise ValueError(
                f"{handler.name} returned {verdict!r}, which means nothing in {stage.decorator}; "
                f"what does: {meaningful}"
            )
        return verdict

    def _failed(
        self,
        handler: Handler,
        failure: BaseException,
        stage: Stage,
        connection: _Connection,
        call: SessionCall,
    ) -> Decision:
        """A handler raised: tell the log, and give the answer that the filter's policy has for it."""
        policy = self.app.on_error
        decision = Status.TEMPFAIL if isinstance(policy, str) else policy
        transaction = connection.transaction
        if transaction is not None and transaction.body_failure is not None and _status(decision) not in _REFUSALS:
            decision = Status.TEMPFAIL  # no policy lets half a body pass
        decision = _fitting(decision, stage)
        log.error(
            "%s failed in %s (client %a [%s], queue id %a); %s",
            handler.name,
            stage.decorator,
            connection.hostname,
            connection.address,
            _queue_id(call),
            "no reply is possible there" if stage in _WITHOUT_REPLY else f"answer: {_on_one_line(decision)}",
            exc_info=failure,
        )
        if policy == "shutdown":
            error = HandlerError(f"{handler.name} failed in {stage.decorator}: {failure!r}")
            error.__cause__ = failure
            self._on_shutdown(error)
        return decision

    # ---- Back to the shim

    def _answer(self, decision: Decision, connection: _Connection, call: SessionCall) -> int:
        if isinstance(decision, Reply) and not call.set_reply(decision):
            log.error("libmilter refused the reply %r; the MTA sends its default text", decision)
        answer: int = lib.MILTER_ANSWERED | _status(decision).value
        if connection.failure is not None:
            answer |= lib.MILTER_OWED
        if connection.transaction is not None and connection.transaction.state is not None:
            answer |= lib.MILTER_TRACKS
        return answer


_WITHOUT_REPLY = (Stage.NEGOTIATE, Stage.ABORT, Stage.CLOSE)
_DECIDING = (Stage.MAIL, Stage.RCPT, Stage.DATA, Stage.HEADER, Stage.EOH, Stage.BODY)


def _status(decision: Decision) -> Status:
    return decision.status if isinstance(decision, Reply) else decision


def _decides(stage: Stage, status: Status) -> bool:
    """Is the message over with this verdict? A refused recipient is not the message."""
    if stage is Stage.RCPT:
        return status in (Status.ACCEPT, Status.DISCARD)
    return status not in (Status.CONTINUE, Status.SKIP)


def _fitting(decision: Decision, stage: Stage) -> Decision:
    """The policy's answer, where the stage has a meaning for it; else to go on, as ACCEPT of an unknown command."""
    return decision if _status(decision) in MEANINGFUL[stage] else Status.CONTINUE


def _on_one_line(decision: Decision) -> str:
    return str(decision).replace("\n", " / ")


def _queue_id(call: SessionCall) -> str | None:
    try:
        value = call.macro(b"i")
    except MilterError:
        return None
    return value.decode("utf-8", "backslashreplace") if value is not None else None


# ---- The two ways in -------------------------------------------------------------------------

_engines: dict[int, Engine] = {}
_numbers = itertools.count(1)


def _crashed(kind: type[BaseException], failure: BaseException, traceback: Any) -> None:
    """The engine itself failed; the shim answers a temporary failure."""
    log.critical("the engine failed; the MTA is told to try again later", exc_info=failure)


@ffi.def_extern(error=0, onerror=_crashed)
def milter_python_enter(
    session: Any,
    token: int,
    number: int,
    app: int,
    stage: int,
    text: Any,
    size: int,
    chunk: Any,
    chunk_size: int,
) -> int:
    engine = _engines[app]
    call = SessionCall(session, token, Stage(stage), engine.plan)
    events = ffi.unpack(text, size).decode("utf-8", "surrogateescape") if size else ""
    return engine.enter(call, number, events, ffi.unpack(chunk, chunk_size) if chunk_size else b"")


@ffi.def_extern(error=0, onerror=_crashed)
def milter_python_negotiate(
    session: Any,
    token: int,
    number: int,
    app: int,
    offered_actions: int,
    offered_steps: int,
    actions: Any,
    steps: Any,
) -> int:
    engine = _engines[app]
    call = SessionCall(session, token, Stage.NEGOTIATE, engine.plan)
    negotiation = _Negotiation(offered_actions, offered_steps, actions[0], steps[0])
    if not engine.negotiate(call, number, negotiation):
        return 0
    actions[0] = int(negotiation.actions) | (actions[0] & Actions.REQUEST_MACROS)
    steps[0] = negotiation.steps(steps[0])
    answered: int = lib.MILTER_ANSWERED
    return answered


# ---- libmilter in this process ---------------------------------------------------------------


class Run:
    """One run of an engine, from its first connection to the closing of the gate."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._number = next(_numbers)
        _engines[self._number] = engine
        plan, _keep_alive = _shim_plan(engine.plan, self._number)
        self._run = lib.milter_begin(plan)
        if not self._run:
            raise MemoryError("no memory for a run of the filter")

    def wait_sessions(self, milliseconds: int) -> int:
        """Wait until no MTA is connected, or the time is over; how many still are."""
        count: int = lib.milter_wait_sessions(self._run, milliseconds)
        return count

    def close_gate(self) -> None:
        """No event enters Python any more: each is answered as a temporary failure."""
        lib.milter_end(self._run)

    def wait_handlers(self, milliseconds: int) -> int:
        """Wait until no handler runs, or the time is over; how many still do."""
        count: int = lib.milter_wait_handlers(self._run, milliseconds)
        return count

    def forget(self) -> None:
        """After the gate is closed and no handler runs."""
        _engines.pop(self._number, None)


def _shim_plan(plan: Plan, number: int) -> tuple[Any, list[Any]]:
    """The plan as the shim's struct, and what must live until the shim has copied it."""
    struct = ffi.new("struct milter_plan *")
    struct.app = number
    for stage in Stage:
        if stage is not Stage.NEGOTIATE:
            struct.mode[stage.value] = _mode(plan, stage)
    struct.actions = int(plan.actions)
    struct.required = int(plan.requires)
    struct.steps = int(plan.options)
    struct.negotiates = plan.negotiates
    texts = []
    for entry, names in plan.requests({}).items():
        text = ffi.new("char[]", " ".join(names).encode("ascii"))
        texts.append(text)
        struct.macros[entry.value] = text
    return struct, texts


def _mode(plan: Plan, stage: Stage) -> int:
    if stage in plan.handled:
        return int(lib.MILTER_ENTER)
    return int(lib.MILTER_RECORD if stage in plan.remembered else lib.MILTER_IGNORE)


class Libmilter:
    """libmilter itself, of which a process has one: it is started once, and serves until the process ends.

    It listens on a descriptor of its own making, behind which this class puts other sockets: the
    listener of the filter that runs, or between two runs one that nobody can reach.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._family: int | None = None
        self._descriptor = -1
        self._asleep_at: list[socket.socket] = []
        self._behind: tuple[int, int] | None = None
        self.ended, self._end = -1, -1

    @property
    def version(self) -> tuple[int, int, int]:
        """The version of the library that runs."""
        parts = ffi.new("unsigned int[3]")
        lib.smfi_version(parts, parts + 1, parts + 2)
        return (parts[0], parts[1], parts[2])

    @property
    def compiled_version(self) -> tuple[int, int, int]:
        """The version of the header that this extension was compiled with."""
        number = lib.SMFI_VERSION
        return (number >> 24 & 0x7F, number >> 8 & 0x7FFF, number & 0x7F)

    def serve(self, listener: socket.socket, name: str, timeout: int, debug: int, max_data_size: int) -> None:
        """Accept connections from `listener`.

        `name`, `timeout` (seconds) and `debug` count the first time in a process; libmilter reads them
        when it starts.
        """
        with self._lock:
            if self._family is not None and not self._listens():
                raise MilterError("libmilter has ended in this process, and cannot be started again")
            if self._family is None:
                self._start(listener, name, timeout, debug, max_data_size)
            elif self._family != listener.family:
                raise MilterError(
                    f"libmilter serves one kind of socket in a process, and began with {_family(self._family)}: "
                    f"a filter on {_family(listener.family)} needs another process"
                )
            else:
                self._put(listener)
                self._wake(listener)

    def ended_well(self) -> bool:
        """Once `ended` can be read: did libmilter end because it took a signal? Else it gave up."""
        return os.read(self.ended, 1) == b"s"

    def pause(self, listener: socket.socket | None) -> None:
        """Accept no more connections. `listener` is the one until now, if it is this process's alone."""
        with self._lock:
            if not self._listens():
                return
            unreachable = unreachable_listener()
            self._put(unreachable)
            self._asleep_at = [unreachable, *([listener.dup()] if listener is not None else [])]

    def _start(self, listener: socket.socket, name: str, timeout: int, debug: int, max_data_size: int) -> None:
        lib.milter_register(name.encode("utf-8", "surrogateescape"))
        lib.smfi_settimeout(timeout)
        lib.smfi_setdbg(debug)
        lib.milter_set_max_data_size(max_data_size)
        with Placeholder(listener.family) as placeholder:
            for specification in placeholder.specifications():
                lib.smfi_setconn(specification.encode("ascii"))
                if lib.smfi_opensocket(False) == 0:
                    break
            else:
                raise MilterError("libmilter could not open a socket; the system's log (facility mail) tells why")
            self._descriptor = placeholder.find()
        self._put(listener)
        self.ended, self._end = os.pipe()
        error = lib.milter_serve(self._end)
        if error != 0:
            raise MilterError(f"no thread for libmilter: {os.strerror(error)}")
        wait_for_signal_thread()
        self._family = listener.family

    def _put(self, listener: socket.socket) -> None:
        os.dup2(listener.fileno(), self._descriptor, inheritable=False)
        self._behind = _identity(self._descriptor)

    def _listens(self) -> bool:
        """Is the descriptor still libmilter's?

        Its thread for signals may take one that came at the moment of the start, before Python's main
        thread could. libmilter then closes the descriptor at once, and its number may be another's.
        """
        return _identity(self._descriptor) == self._behind

    def _wake(self, listener: socket.socket) -> None:
        """libmilter may sleep in poll() for up to five seconds at a socket that was replaced.

        Its shutdown wakes poll(), which looks at the descriptor again, and goes back to sleep unless
        it finds something to do there. So a caller knocks at the new listener first, and leaves.
        """
        with socket.socket(listener.family) as caller:
            caller.setblocking(False)
            caller.connect_ex(listener.getsockname())
            for replaced in self._asleep_at:
                with contextlib.suppress(OSError):  # it was shut down before; poll() wakes all the same
                    replaced.shutdown(socket.SHUT_RDWR)
                replaced.close()
        self._asleep_at = []


libmilter = Libmilter()


def _identity(descriptor: int) -> tuple[int, int] | None:
    try:
        found = os.fstat(descriptor)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _family(family: int) -> str:
    return {socket.AF_UNIX: "a Unix socket", socket.AF_INET: "IPv4", socket.AF_INET6: "IPv6"}.get(
        socket.AddressFamily(family), str(family)
    )
