# SPDX-License-Identifier: GPL-3.0-or-later
"""Who looks after handlers that take long: the MTA is told that they are at work, and the log, which ones they are.

MTAs wait for the answer to the end of a message a few minutes, and from the beginning again after each progress packet
(``smfi_progress``). For all other answers they wait some seconds, and nothing can be done about that but to say so. A
thread of its own does both, for all calls of a run. It sleeps until the first one is due; a call whose handlers are
quicker than that costs an entry in a table, made and taken away.

The invariants:

- No progress packet follows the return of the handlers. Each call into Python has a token, which is withdrawn under the
  session's lock when the call returns, before any change or verdict is written; and a packet is written under the same
  lock, only while the token is valid (``milter_offer_progress`` in shim/milter_shim.c). So who takes a call from the
  table need not wait for this thread.
- None comes between two pieces of a new body: see there.
- One MTA that does not read holds up no other: nothing here waits for a session's lock or, where libmilter's I/O is
  wrapped, for a socket.

The table is changed by single dict operations, which are atomic, and by those alone who run the handlers: it is in the
way of each event.
"""

import math
import threading
import time
from collections.abc import Callable

from milter.context import Call
from milter.protocol import Stage
from milter.scarcity import start_thread

__all__ = ["Watch"]

_NEARLY = 7 / 8  # who has waited for so much of the interval is served with the others: that saves wake-ups
_LAST_WAIT = 1.0  # seconds

# Seconds until a call is late: half of what the more impatient MTA waits, by default. Nobody waits for on_close.
_LATE = 5.0
_LATE_AT = {Stage.EOM: 150.0, Stage.CLOSE: math.inf}
_EOM = Stage.EOM


class Watch:
    """Looks after each call in the table :attr:`running`.

    Arguments:
        progress: seconds after which, again and again, the MTA is told at the end of a message; None or 0: never.
        tell: is told each call that is late, and when it began. It waits for nothing, and raises nothing.
    """

    def __init__(self, progress: float | None, tell: Callable[[Call, float], None]) -> None:
        self._interval = progress or math.inf
        self._tell = tell
        self.running: dict[Call, float] = {}
        """When it began (``time.monotonic``). The thread that runs the handlers puts their call in before, and takes
        it out afterwards."""
        self._shown: dict[Call, float] = {}
        """The thread's own: when progress was shown last, or infinity, if no more shall be."""
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = start_thread(self._run, "milter watch")

    def stop(self) -> None:
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(_LAST_WAIT)

    def _run(self) -> None:
        due = time.monotonic()
        while not self._stopped.wait(max(due - time.monotonic(), 0.0)):
            due = self._look(time.monotonic())

    def _look(self, now: float) -> float:
        """Serve who is due; when the next one will be."""
        running = self.running.copy()
        self._shown = {call: shown for call, shown in self._shown.items() if call in running}
        due = now + min(self._interval, _LATE)  # who begins after this look is not due before that
        for call, began in running.items():
            due = min(due, self._show_progress(call, began, now), self._tell_late(call, began, now))
        return due

    def _show_progress(self, call: Call, began: float, now: float) -> float:
        """When it is due again."""
        if call.stage is not _EOM:
            return math.inf
        shown = self._shown.get(call, began)
        if now - shown >= self._interval * _NEARLY:
            shown = self._shown[call] = now if call.offer_progress() else math.inf
        return shown + self._interval

    def _tell_late(self, call: Call, began: float, now: float) -> float:
        """When it is due."""
        if call.late:
            return math.inf
        due = began + _LATE_AT.get(call.stage, _LATE)
        if now >= due:
            call.late = True
            self._tell(call, began)
            return math.inf
        return due
