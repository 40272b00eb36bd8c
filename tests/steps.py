# SPDX-License-Identifier: GPL-3.0-or-later
"""Work, counted in steps: lines of Python, and calls of functions, also of those in C. The same each time."""

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

__all__ = ["steps"]


def steps(act: Callable[[], object]) -> int:
    """How many steps the call takes, in this thread."""
    count = 0

    def line(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        count += 1
        return line

    def call(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal count
        count += 1

    tracer, profiler = sys.gettrace(), sys.getprofile()
    sys.settrace(line)
    sys.setprofile(call)
    try:
        act()
    finally:
        sys.setprofile(profiler)
        sys.settrace(tracer)
    return count
