# SPDX-License-Identifier: GPL-3.0-or-later
"""Which functions are coroutine functions, and what becomes of a filter that has none: no event loop.

:mod:`milter.loop`, and with it asyncio, is imported only for filters that have coroutines: it takes megabytes.
"""

import contextvars
import functools
import inspect
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from milter import children
from milter.context import Scope

__all__ = ["MtaGone", "NoEventLoop", "event_loop_for", "is_coroutine_function", "refuse_awaitable"]


class MtaGone(Exception):
    """A coroutine was cancelled, since the MTA does not wait for its answer any more."""


def is_coroutine_function(function: Callable[..., Any]) -> bool:
    """Is what it returns to be awaited? Also methods, ``functools.partial`` and objects with an async ``__call__``."""
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def refuse_awaitable(result: object, name: str) -> None:
    """A plain function that returns what is to be awaited was meant to be ``async def``, or to wait for it."""
    if inspect.isawaitable(result):
        discard(result)
        raise TypeError(
            f"{name} is a plain function and returned {result!r}, which nobody awaits: "
            "write 'async def', and 'await' before the call that gave it"
        )


def discard(awaitable: object) -> None:
    """It will not be awaited, and Python shall not complain of that."""
    if inspect.iscoroutine(awaitable):
        awaitable.close()


class NoEventLoop:
    """In the place of an event loop, for a filter without coroutines. What each method is for, see its place there."""

    def __init__(self) -> None:
        self.variables = contextvars.copy_context()
        """The context variables of the filter: those of the thread that starts it, and what its hooks set. Hooks run in
        it, and each connection begins with a copy."""

    def run_hook(self, hook: Callable[[], Any]) -> None:
        """Call a hook of the process."""
        result = self.variables.run(children.call, hook)
        refuse_awaitable(result, getattr(hook, "__qualname__", repr(hook)))

    def answer(self, awaitable: Awaitable[Any], name: str, scope: Scope, mta_is_gone: Callable[[], bool]) -> Any:
        """What the coroutine of the handler `name` returns, or raises. It runs with the variables of `scope`.

        :class:`MtaGone`: it was cancelled, since the MTA is.
        """
        discard(awaitable)
        raise RuntimeError(f"{name} is a coroutine function, and was registered when the filter ran already")

    def end_handlers(self, wait: Callable[[int], int]) -> bool:
        """Cancel the coroutines of handlers that still run. False: handlers run all the same."""
        return False

    def stop(self) -> None:
        """The filter has stopped."""


def event_loop_for(functions: Iterable[Callable[..., Any]], timeout: float | None) -> NoEventLoop:
    """A running event loop, if there is a coroutine function among these; `timeout` is for each call of a handler."""
    if not any(map(is_coroutine_function, functions)):
        return NoEventLoop()
    from milter.loop import EventLoop

    return EventLoop(timeout)
