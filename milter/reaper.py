# SPDX-License-Identifier: GPL-3.0-or-later
"""As process 1, in a container: somebody has to wait for orphans.

The kernel makes a process whose parent has ended a child of process 1. When it ends, it stays as a zombie until process
1 has waited for it. But the filter must not wait for children that it does not know: it would take the exit codes from
:mod:`subprocess`, :mod:`multiprocessing` and :mod:`asyncio`, or from C code, which wait for them.

So process 1 steps down: it forks, and its child goes on with the program. Process 1 has nothing more to do than to pass
signals on to that child, and to wait for all that ends, until the child does.
"""

import contextlib
import os
import signal
import threading

from milter.safe_log import SafeLog

__all__ = ["step_down"]

log = SafeLog("milter")

_FROM_THE_KERNEL = 0x80  # si_code: as Ctrl-C in a terminal, which the child gets by itself


def step_down() -> None:
    """By the main thread. Process 1 does not return from here, but its child does; any other process does nothing."""
    if os.getpid() != 1:
        return
    if threading.active_count() > 1 or _has_children():
        log.warning(
            "this is process 1, and has begun threads or processes before it runs the filter: so it cannot wait for "
            "orphans, which stay as zombies. Begin them in on_start, or run the container with an init (--init)"
        )
        return
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    child = os.fork()
    if child != 0:
        os._exit(_reap_until_end_of(child))
    if os.environ.get("LISTEN_PID") == "1":  # the socket that was passed is now this process's
        os.environ["LISTEN_PID"] = str(os.getpid())
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _has_children() -> bool:
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def _reap_until_end_of(child: int) -> int:
    """Its exit code. All signals are blocked here: none is lost, and none ends this process."""
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # they are the child's now
    while True:
        news = signal.sigwaitinfo(signal.valid_signals())
        if news.si_signo == signal.SIGCHLD:
            code = _reap(child)
            if code is not None:
                return code
        elif news.si_code != _FROM_THE_KERNEL:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, news.si_signo)


def _reap(child: int) -> int | None:
    """Wait for all that have ended. The exit code of the child, if it is among them."""
    code = None
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0] != 0:
            if ended[0] == child:
                code = os.waitstatus_to_exitcode(ended[1])
    return 128 - code if code is not None and code < 0 else code
