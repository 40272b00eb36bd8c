# SPDX-License-Identifier: GPL-3.0-or-later
"""The end of a process, after the filter has stopped: the program's own threads, and its functions of ``atexit``.

A Python program waits at its end for threads that are no daemons, and for what executors still have to do. That is
where a filter's last results are written, and so it is under ``milter run``, too: with a limit, since a thread that
never ends must hold up neither a reload nor the machine that goes down.
"""

import atexit
import contextlib
import logging
import os
import sys
import threading
from typing import Any, cast

from milter.errors import MilterError
from milter.safe_log import SafeLog
from milter.scarcity import start_thread

__all__ = ["end_process", "tell_threads"]

log = SafeLog("milter")

_SOON = 1.0  # seconds after which it is told what is waited for
_LAST_WAIT = 2.0  # seconds, once the supervisor insists: it kills not much later
_EXIT_UNFINISHED = 70  # EX_SOFTWARE of sysexits.h


def end_process(limit: float, insisted: threading.Event) -> None:
    """Do what Python does at the end of a program. What is not done after `limit` seconds, or soon after `insisted` is
    set, is left: the process ends here, with exit code 70.

    In the main thread of a worker; os._exit, which does none of this, follows.
    """
    with contextlib.suppress(MilterError):  # no thread: then the supervisor kills who does not end in time
        start_thread(_watch, "milter: the end", limit, insisted)
    cast(Any, threading)._shutdown()
    atexit._run_exitfuncs()
    with contextlib.suppress(AttributeError, OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()


def _watch(limit: float, insisted: threading.Event) -> None:
    if not insisted.wait(min(_SOON, limit)):
        log.info("waiting up to %.0f seconds for the end of %s", limit, _left())
        insisted.wait(max(limit - _SOON, 0.0))
    if insisted.is_set():
        threading.Event().wait(_LAST_WAIT)
    log.critical("the process ends without waiting for %s", _left())
    logging.shutdown()
    os._exit(_EXIT_UNFINISHED)


def tell_threads() -> None:
    """After run() in a program of the user's own, whose end Python itself sees to."""
    threads = _threads()
    if threads:
        log.info(
            "the filter has stopped; threads that still run: %s. The program ends when they do, or by another signal",
            ", ".join(threads),
        )


def _left() -> str:
    threads = _threads()
    return f"threads: {', '.join(threads)}" if threads else "functions that were registered with atexit"


def _threads() -> list[str]:
    """The names of those that Python waits for."""
    return [
        thread.name for thread in threading.enumerate() if not thread.daemon and thread is not threading.main_thread()
    ]
