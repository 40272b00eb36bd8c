# SPDX-License-Identifier: GPL-3.0-or-later
"""From C to the engine and back: what calls the shim, and what the shim calls.

The life of a call, from here on (its beginning, in C, is told in shim/milter_shim.c):

1. A thread of libmilter enters :func:`milter_python_enter` with a session, a token that is valid until the
   call returns, and the session's log: everything that happened since the last call.
2. The log is copied and decoded, and given to the :class:`Engine <milter.engine.Engine>` of the run that
   the session belongs to.
3. What a handler asks of its context goes through a :class:`SessionCall`, with session and token, to a
   function of the shim, which checks the token under the session's lock.
4. The answer goes back as a number: the verdict's, with flags. Whatever goes wrong on the way (an
   exception here, a callback not attached, no memory) is the number 0, which the shim takes for a failure,
   and answers as a temporary one.

Only this module, :mod:`milter.libmilter` and :mod:`milter.children` touch ``ffi`` and ``lib``.

The invariants, with and without the GIL:

- The events of a session come one at a time, and what one call wrote the next one sees, on whatever thread:
  libmilter hands a session over under a lock. So what belongs to a session or to a call needs no lock of its own.
- Sessions run side by side, and so do this module's functions. What they share is changed by single operations of a
  dict alone, which are atomic: ``_engines`` here, the tables of connections, accounts and running calls elsewhere.
- A context may be kept, and used by any thread at any time. It is the session's lock in the shim that decides, by
  the token, whether the call still lasts; what Python knows of that is never trusted.
"""

import errno
import itertools
import os
import threading
from collections.abc import Sequence
from mmap import mmap
from typing import Any

from milter._shim import ffi, lib
from milter.context import Conversation
from milter.edits import Change
from milter.engine import CONTINUE, GO_ON, Answer, Engine, Negotiation
from milter.errors import ActionError, ContextError
from milter.gil import gil_is_on
from milter.plan import Plan
from milter.protocol import Actions, MacroList, ProtocolOptions, Stage, known_actions, known_options
from milter.safe_log import SafeLog
from milter.scarcity import MemoryOutage
from milter.verdict import Reply

log = SafeLog("milter")

_ANSWERED = int(lib.MILTER_ANSWERED)
_OWED = int(lib.MILTER_OWED)
_TRACKS = int(lib.MILTER_TRACKS)
_HOLDS = int(lib.MILTER_HOLDS)
_LEADING_SPACE = int(ProtocolOptions.LEADING_SPACE)


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
    if result == lib.MILTER_CHILD:
        raise ContextError(
            f"{action} is impossible in a forked child: only the process that serves can talk to the MTA. Ask "
            "before the fork, and act when the child has told what it found"
        )
    raise ActionError(f"{action} was not sent: {_RESULTS.get(result, f'error {result}')}")


class SessionCall:
    """A session of the shim, for the time of one call; see :class:`milter.context.Call`."""

    __slots__ = (
        "_plan",
        "_read",
        "_session",
        "_space",
        "_steps",
        "_token",
        "changes",
        "chunks",
        "connection",
        "content",
        "granted_actions",
        "late",
        "message_began",
        "stage",
    )

    content: "GatheredContent"
    chunks: bytes
    connection: Conversation
    message_began: int

    def __init__(self, session: Any, token: int, stage: Stage, plan: Plan, actions: int, steps: int) -> None:
        self._session = session
        self._token = token
        self._plan = plan
        self.granted_actions = actions
        self._steps = steps
        self.stage = stage
        self.changes: Sequence[Change] = ()
        self.late = False
        self._read = 0
        # Where the MTA puts no space after the colon itself, and handlers do not see it, it is put here.
        self._space = b" " if steps & _LEADING_SPACE and not plan.shows_leading_space else b""

    @property
    def leading_space(self) -> bool:
        return bool(self._steps & _LEADING_SPACE)

    def next_chunk(self, size: int) -> bytes:
        start = self._read
        self._read = start + size
        return self.chunks[start : start + size]

    def leave_changes(self, changes: Sequence[Change]) -> None:
        self.changes = changes

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

    def macro_at_once(self, name: bytes) -> bytes | None:
        buffer = ffi.new("char[]", 256)
        length = lib.milter_try_macro(self._session, self._token, name, buffer, len(buffer))
        return ffi.unpack(buffer, length) if 0 <= length < len(buffer) else None

    def mta_is_gone(self) -> bool:
        gone = lib.milter_mta_gone(self._session, self._token)
        if gone == lib.MILTER_EXPIRED:
            _check(gone, "the question for the MTA's connection")
        return bool(gone > 0)

    def macro_names(self) -> tuple[str, ...]:
        return self._plan.known_macros

    def granted(self) -> tuple[Actions, ProtocolOptions]:
        hidden = 0 if self._plan.shows_leading_space else _LEADING_SPACE
        return known_actions(self.granted_actions), known_options(self._steps & ~hidden)

    def request_macros(self, entry: MacroList, names: Sequence[str]) -> None:
        text = " ".join(names).encode("ascii")
        _check(lib.milter_request_macros(self._session, self._token, entry.value, text), "the request of macros")

    def set_reply(self, reply: Reply) -> bool:
        encoded, whole = reply.encoded, reply.encoded_for_8_bits
        if encoded != whole and (self.macro(b"v") or b"").startswith(b"Postfix"):
            encoded = whole
        lines = [ffi.new("char[]", line) for line in encoded]
        code = str(reply.code).encode("ascii")
        enhanced = ffi.NULL if reply.enhanced is None else ffi.new("char[]", reply.enhanced.encode("ascii"))
        array = ffi.new("char *[]", lines)
        result = lib.milter_set_reply(self._session, self._token, code, enhanced, array, len(lines))
        return bool(result == lib.MILTER_OK)

    def add_header(self, name: bytes, value: bytes) -> None:
        _check(lib.milter_add_header(self._session, self._token, name, self._space + value), "add_header()")

    def insert_header(self, index: int, name: bytes, value: bytes) -> None:
        text = self._space + value
        _check(lib.milter_insert_header(self._session, self._token, index, name, text), "insert_header()")

    def change_header(self, name: bytes, index: int, value: bytes | None) -> None:
        text = self._space + value if value else ffi.NULL
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

    def offer_progress(self) -> bool:
        result = lib.milter_offer_progress(self._session, self._token)
        return result in (lib.MILTER_OK, lib.MILTER_BUSY)


class GatheredContent:
    """A message as the shim has gathered it; see :class:`milter.message.Content`.

    A small one is copied at once. A larger one is read where it lies, in C's memory or in a file, until
    :meth:`close`, when the call is over. The lock keeps another thread's read and that moment apart.
    """

    __slots__ = ("_bytes", "_file", "_lock", "_memory", "error", "header_size", "size", "spooled")

    def __init__(self, event: Any) -> None:
        self.error: int = event.content_error
        """An ``errno``: the message could not be gathered."""
        self.header_size: int = event.header_size
        self.size: int = event.content_size
        self.spooled: bool = event.content_file >= 0
        """It lies in a file."""
        self._bytes: bytes | None = None
        if event.content_file < 0 and self.size <= _COPIED_AT_ONCE:
            self._bytes = ffi.unpack(event.content, self.size) if self.size else b""
        else:
            self._lock = threading.Lock()
            self._memory = event.content
            self._file: int = event.content_file

    def read(self, offset: int, size: int) -> bytes:
        if self._bytes is not None:
            return self._bytes[offset : offset + size]
        with self._lock:
            self._require_open()
            if self._file < 0:
                part: bytes = ffi.unpack(self._memory + offset, size) if size else b""
                return part
            return _read_file(self._file, offset, size)

    def spool_file(self) -> int | None:
        if self._bytes is not None:
            return None
        with self._lock:
            self._require_open()
            return os.dup(self._file) if self._file >= 0 else None

    def close(self) -> None:
        if self._bytes is None:
            with self._lock:
                self._memory, self._file = None, -1

    def _require_open(self) -> None:
        if self._memory is None and self._file < 0:
            raise ContextError(
                "this message is no longer there: a part of it was read for the first time after its handler had "
                "returned. Read what you need (message.body, message.as_bytes()) while the handler runs"
            )


_COPIED_AT_ONCE = 64 * 1024


def _read_file(file: int, offset: int, size: int) -> bytes:
    parts = []
    while size > 0:
        part = os.pread(file, size, offset)
        if not part:  # pragma: no cover (nobody else has this file, and it only grows)
            raise OSError(errno.EIO, "the temporary file of the message is shorter than what was written")
        parts.append(part)
        offset += len(part)
        size -= len(part)
    return b"".join(parts)


# ---- The two ways in -------------------------------------------------------------------------

_engines: dict[int, Engine] = {}
_memory_outage = MemoryOutage()
_numbers = itertools.count(1)
_STAGES = tuple(sorted(Stage, key=lambda stage: stage.value))
_EOM = Stage.EOM


def _crashed(kind: type[BaseException], failure: BaseException, traceback: Any) -> None:
    """The engine itself failed; the shim answers a temporary failure."""
    if isinstance(failure, MemoryError):
        _memory_outage.tell()
    else:
        log.critical("the engine failed; the MTA is told to try again later", exc_info=failure)


@ffi.def_extern(error=0, onerror=_crashed)
def milter_python_enter(event: Any) -> int:
    engine = _engines.get(event.app)
    if engine is None:
        return 0
    if event.ended_count:
        engine.forget(event.ended[0 : event.ended_count])
    stage = _STAGES[event.stage]
    call = SessionCall(event.session, event.token, stage, engine.plan, event.actions, event.steps)
    if engine.ledger is not None:
        call.message_began = event.message_began
    text = ffi.unpack(event.log, event.log_size).decode("utf-8", "surrogateescape")
    if event.chunks_size:
        call.chunks = ffi.unpack(event.chunks, event.chunks_size)
    if stage is not _EOM:
        return _encoded(engine.enter(call, event.number, text), call)
    answer = _end_of_message(engine, call, event, text)
    if call.changes:
        _leave_changes(event, call.changes)
    return _encoded(answer, call)


def _end_of_message(engine: Engine, call: SessionCall, event: Any, text: str) -> Answer:
    if not engine.plan.gathers:
        return engine.enter(call, event.number, text)
    content = call.content = GatheredContent(event)
    try:
        return engine.enter(call, event.number, text)
    finally:
        content.close()


def _leave_changes(event: Any, changes: Sequence[Change]) -> None:
    """Tell the shim what to send once Python is left; the format is told in shim/changes.c."""
    packed = b"".join([_packed(change) for change in changes])
    has_room = len(packed) <= event.changes_capacity or lib.milter_reserve_changes(event, len(packed))
    if not has_room:  # pragma: no cover (memory does not run out in tests)
        raise MemoryError("no memory for the changes of a message")
    ffi.memmove(event.changes, packed, len(packed))
    event.changes_size = len(packed)


def _packed(change: Change) -> bytes:
    letter, arguments = change
    if letter == "b":
        return b"b\0%d\0%b" % (len(arguments[0]), arguments[0])
    packed = b"\0".join((letter.encode("ascii"), *arguments, b""))
    if packed.count(b"\0") != len(arguments) + 1:  # pragma: no cover (milter.checks has refused it)
        raise ValueError(f"{change!r} has a NUL, where it would begin another change")
    return packed


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
    engine = _engines.get(app)
    if engine is None:
        return 0
    call = SessionCall(session, token, Stage.NEGOTIATE, engine.plan, 0, 0)
    negotiation = Negotiation(engine.plan, offered_actions, offered_steps, actions[0], steps[0])
    if not engine.negotiate(call, number, negotiation):
        return 0
    if Actions.REQUEST_MACROS in negotiation.offered_actions:
        for entry, names in engine.plan.requests(negotiation.macros).items():
            call.request_macros(entry, names)
    actions[0] = int(negotiation.actions) | (actions[0] & Actions.REQUEST_MACROS)
    steps[0] = negotiation.reduced(steps[0])
    return _ANSWERED


def _rehearse() -> None:
    """Go both ways in once, for no filter, before there are other threads.

    At the first call cffi finds the function of a way in, and keeps it for the next ones, in two words that it writes
    without a lock. Without the GIL a second thread that came at that moment could find the first word, and crash for
    lack of the other.
    """
    lib.milter_python_enter(ffi.new("struct milter_event *"))
    lib.milter_python_negotiate(ffi.NULL, 0, 0, 0, 0, 0, ffi.NULL, ffi.NULL)


if not gil_is_on():
    _rehearse()


def _encoded(answer: Answer, call: SessionCall) -> int:
    if answer is GO_ON:
        return _ANSWERED
    decision, owes, tracks, holds = answer
    number = _ANSWERED
    if isinstance(decision, Reply):
        if not call.set_reply(decision):  # pragma: no cover (a Reply is checked as libmilter does when it is made)
            log.error("libmilter refused the reply %r; the MTA sends its default text", decision)
        decision = decision.status
    if decision is not CONTINUE:
        number |= decision.value
    if owes:
        number |= _OWED
    if tracks:
        number |= _TRACKS
    if holds:
        number |= _HOLDS
    return number


# ---- Runs ------------------------------------------------------------------------------------

_MARK = int(lib.MILTER_WANTED_MASK)
_MARK_SHIFT = int(lib.MILTER_WANTED_SHIFT)
MARKS = _MARK << _MARK_SHIFT


class Run:
    """One run of an engine, from its first connection to the closing of the gate.

    A :class:`WantedRun` serves besides it, whatever else serves in this process.
    """

    _wanted_only = False

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        engine.watch.start()  # first, since there may be no thread
        self._number = next(number for number in _numbers if number & _MARK)
        _engines[self._number] = engine
        plan, _keep_alive = _shim_plan(engine.plan, self._number)
        plan.wanted_only = self._wanted_only
        if engine.ledger is not None and engine.ledger.open_connections is not None:
            plan.open_sessions = _place(engine.ledger.open_connections)
        self._run = lib.milter_begin(plan)
        if not self._run:  # pragma: no cover (memory does not run out in tests)
            raise MemoryError("no memory for a run of the filter")

    def wait_sessions(self, milliseconds: int) -> int:
        """Wait until no MTA is connected, or the time is over; how many still are."""
        count: int = lib.milter_wait_sessions(self._run, milliseconds)
        return count

    def close_gate(self) -> None:
        """No event enters Python any more: each is answered as a temporary failure."""
        lib.milter_end(self._run)
        numbers = ffi.new("uint64_t[64]")
        while count := lib.milter_take_ended(self._run, numbers, len(numbers)):
            self.engine.forget(numbers[0:count])

    def wait_handlers(self, milliseconds: int) -> int:
        """Wait until no handler runs, or the time is over; how many still do."""
        count: int = lib.milter_wait_handlers(self._run, milliseconds)
        return count

    def forget(self) -> None:
        """After the gate is closed and no handler runs."""
        self.engine.watch.stop()
        self.engine.close()
        _engines.pop(self._number, None)


class WantedRun(Run):
    """A run that serves only connections that want it, by `mark`; for tests of filters."""

    _wanted_only = True

    @property
    def mark(self) -> int:
        """Of whom wants this run: these of the bits `MARKS`, among the actions that it offers."""
        return (self._number & _MARK) << _MARK_SHIFT


_places: list[Any] = []


def _place(buffer: mmap) -> Any:
    """Where the shim counts open sessions: kept for ever, since one may end after its run."""
    place = ffi.from_buffer("int[]", buffer)
    _places.append(place)
    return place


_ENDS = (Stage.EOM, Stage.ABORT)


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
    struct.gathers = plan.gathers
    struct.leading_space = plan.shows_leading_space
    struct.spool_size = plan.spool_size
    struct.spool_directory = directory = ffi.new("char[]", os.fsencode(plan.spool_directory))
    texts = [directory]
    for entry, names in plan.requests({}).items():
        text = ffi.new("char[]", " ".join(names).encode("ascii"))
        texts.append(text)
        struct.macros[entry.value] = text
    return struct, texts


def _mode(plan: Plan, stage: Stage) -> int:
    if plan.followed and stage in _ENDS:
        return int(lib.MILTER_ENTER)
    if stage in plan.handled:
        return int(lib.MILTER_DEFER if stage in plan.deferred else lib.MILTER_ENTER)
    return int(lib.MILTER_RECORD if stage in plan.remembered else lib.MILTER_IGNORE)
