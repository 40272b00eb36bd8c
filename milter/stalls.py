# SPDX-License-Identifier: GPL-3.0-or-later
"""Tells in the log of a coroutine that holds the event loop: all others, and so other people's mail, wait for it.

asyncio tells it in its debug mode only, which makes every step dearer. Here a thread looks from time to time who has
the loop, which costs messages nothing. It also tells of a coroutine that does not come to an end, and where it stands.

The invariants:

- `_moved` is set to False by the watch, before it posts what sets it to True on the loop. So while it is False, the
  loop has not come round since; and if the same task has the loop as when it was posted, that task holds it.
- A stall is told once: not again until the loop has moved.
"""

import asyncio
import contextlib
import sys
import threading
import traceback

from milter.safe_log import SafeLog
from milter.scarcity import start_thread

__all__ = ["LONGEST", "StallWatch"]

log = SafeLog("milter")

LONGEST = 0.25
"""Seconds between two looks. A coroutine that has the loop at one look and still at the next one is told of."""

_LAST_WAIT = 1.0  # seconds
_FRAMES = 5  # of the stack: the innermost


class StallWatch:
    """Of an event loop that a thread runs."""

    def __init__(self, loop: asyncio.AbstractEventLoop, runs_in: threading.Thread) -> None:
        self._loop = loop
        self._runs_in = runs_in
        self._moved = True
        self._over = threading.Event()
        self._thread = start_thread(self._watch, "milter stalls")

    def stop(self) -> None:
        """Before the loop ends. A log that takes no line cannot keep it from that."""
        self._over.set()
        self._thread.join(_LAST_WAIT)

    def _watch(self) -> None:
        seen: asyncio.Task[object] | None = None
        told = False
        while not self._over.wait(LONGEST):
            task = asyncio.current_task(self._loop)
            if task is not seen or self._moved:
                seen, told = task, False
                if task is not None:
                    self._moved = False
                    with contextlib.suppress(RuntimeError):  # it is closed
                        self._loop.call_soon_threadsafe(self._note_that_it_moves)
            elif task is not None and not told:
                self._tell(task)
                told = True

    def _note_that_it_moves(self) -> None:
        """On the loop."""
        self._moved = True

    def _tell(self, task: "asyncio.Task[object]") -> None:
        frame = sys._current_frames().get(self._runs_in.ident or 0)
        stack = "".join(traceback.format_stack(frame, _FRAMES)) if frame is not None else ""
        log.warning(
            "the coroutine %s has held the event loop for more than %g seconds without an 'await' that waits: all "
            "other coroutines, and their messages, stand still. Do this work in asyncio.to_thread, or in a plain "
            "function. It is here:\n%s",
            task.get_name(),
            LONGEST,
            stack.rstrip("\n"),
        )
