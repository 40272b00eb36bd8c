# SPDX-License-Identifier: GPL-3.0-or-later
"""A progress bar, for people who wait; it is drawn on a terminal only, and removed at the end."""

import time
from collections.abc import Callable
from typing import TextIO

_WIDTH = 30
_PAUSE = 0.1


class Bar:
    """Drawn again as it grows, ten times a second at most. ``clock``: seconds that only grow."""

    def __init__(self, output: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._output = output
        self._clock = clock
        self._start = clock()
        self._drawn = float("-inf")
        self._wanted = output.isatty()

    def show(self, done: int, total: int) -> None:
        """So much of all is done."""
        now = self._clock()
        if not self._wanted or (done < total and now - self._drawn < _PAUSE):
            return
        self._drawn = now
        self._output.write(f"\r{bar_text(done, total, now - self._start)}\x1b[K")
        self._output.flush()

    def remove(self) -> None:
        """Leave an empty line, with the cursor at its beginning."""
        if self._wanted:
            self._output.write("\r\x1b[K")
            self._output.flush()


def bar_text(done: int, total: int, seconds: float) -> str:
    """The bar after so many seconds, and how long it will take from now.

    >>> bar_text(30, 40, 3.0)
    '[######################........] 30/40, 10/s, 1 s left'
    """
    full = _WIDTH * done // total
    rate = done / seconds if seconds > 0 else 0.0
    left = f", {rate:.0f}/s, {(total - done) / rate:.0f} s left" if rate else ""
    return f"[{'#' * full}{'.' * (_WIDTH - full)}] {done}/{total}{left}"
