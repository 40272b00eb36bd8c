# SPDX-License-Identifier: GPL-3.0-or-later
"""Progress by itself: while handlers take long at the end of a message, the MTA is told that they are at work.

MTAs wait for the answer to the end of a message a few minutes, and from the beginning again after each progress packet
(``smfi_progress``). A thread of its own sends them, for all messages of the run. It sleeps until the first one is due;
a message whose handlers are quicker than that costs an entry in a table, made and taken away.

The invariants:

- No progress packet follows the return of the handlers. Each call into Python has a token, which is withdrawn under the
  session's lock when the call returns, before any change or verdict is written; and a packet is written under the same
  lock, only while the token is valid (``milter_offer_progress`` in shim/milter_shim.c). So who takes a call from the
  table need not wait for this thread, and a call that it puts back at that very moment is found out at its next turn.
- None comes between two pieces of a new body: see there.
- One MTA that does not read holds up no other: nothing here waits for a session's lock or, where libmilter's I/O is
  wrapped, for a socket.

The table is changed by single dict operations, which are atomic, and without a method call: it is in the way of each
message.
"""

import threading
import time
from typing import Protocol

__all__ = ["Progress"]

_NEARLY = 7 / 8  # who has waited for so much of the interval is served with the others: that saves wake-ups
_LAST_WAIT = 1.0  # seconds


class Call(Protocol):
    """A call of the handlers at the end of a message; see :class:`milter.binding.SessionCall`."""

    def offer_progress(self) -> bool:
        """Send a packet, if that can be done without waiting. False: it makes no sense to try again."""


class Progress:
    """Sends progress for each call in the table :attr:`silent_since`, at least every `interval` seconds."""

    def __init__(self, interval: float) -> None:
        self._interval = interval
        self.silent_since: dict[Call, float] = {}
        """When the handlers began, or the last progress was shown (``time.monotonic``). The thread that runs the
        handlers puts their call in before, and takes it out afterwards, if it is still there."""
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="milter progress", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join(_LAST_WAIT)

    def _run(self) -> None:
        seconds = self._interval  # who begins after a look is not due before that
        while not self._stopped.wait(seconds):
            self._serve(time.monotonic())
            now = time.monotonic()
            first = min(self.silent_since.copy().values(), default=now)
            seconds = max(first + self._interval - now, 0.0)

    def _serve(self, now: float) -> None:
        long_ago = now - self._interval * _NEARLY
        for call, since in self.silent_since.copy().items():
            if since > long_ago:
                continue
            if not call.offer_progress():
                self.silent_since.pop(call, None)
            elif call in self.silent_since:
                self.silent_since[call] = now
