# SPDX-License-Identifier: GPL-3.0-or-later
"""gevent and eventlet: what they put in the place of Python's threads cannot serve libmilter.

libmilter calls handlers on threads of its own. A lock of a green thread that such a thread waits for is never released:
the loop that would do it runs on another thread. The filter would hang without a word. Asked without an import: who has
patched anything has imported them.
"""

import sys
from typing import Any

from milter.errors import MilterError

__all__ = ["refuse_green_threads"]

_OF_GEVENT = ("thread", "threading", "_thread", "_threading_local")
_OF_EVENTLET = ("thread", "socket", "select")


def refuse_green_threads() -> None:
    """Raises :class:`MilterError` when threads were patched."""
    gevent: Any = sys.modules.get("gevent.monkey")
    if gevent is not None and any(map(gevent.is_module_patched, _OF_GEVENT)):
        raise MilterError(
            "gevent has replaced Python's threads (monkey.patch_all), and with those a filter hangs: handlers run on "
            "threads of libmilter. Leave the patching away, or use patch_all(thread=False)"
        )
    eventlet: Any = sys.modules.get("eventlet.patcher")
    if eventlet is not None and any(map(eventlet.is_monkey_patched, _OF_EVENTLET)):
        raise MilterError(
            "eventlet has replaced Python's threads or sockets (monkey_patch), and with those a filter hangs: handlers "
            "run on threads of libmilter. Leave the patching away"
        )
