# SPDX-License-Identifier: GPL-3.0-or-later
"""Many processes: fork workers that serve one socket, watch them, replace them.

The supervisor opens the socket, and never accepts from it. It has one thread and none of the user's code:
each worker is forked from it, and loads that code itself. So a reload loads what is on the disk then, and a
version that does not start harms nobody. Connections wait in the socket's queue, whatever becomes of a worker.

What is said between the two, over a socket pair:

- the worker says ``READY`` when it accepts connections, ``DONE`` when the filter itself asked for the stop, ``FAILED``
  when a handler raised and the filter's policy is to stop (``on_error="shutdown"``);
- the supervisor says ``DRAIN`` to workers that others replace, ``STOP`` to those that nobody replaces (they drain, and
  end the listening socket as they begin), and ``END``. Its end, however it comes, means STOP, too.

The invariants:

1. Workers of the generation that serves are told to drain only when as many of the next one are ready, or at the stop.
2. Each child that was forked is waited for, and is killed when its time is over. So none outlives the supervisor, but
   for one that is killed itself: then its workers drain.
3. Between fork() and the moment in which the child has handlers of its own, all signals are blocked: or it would write
   them into its parent's pipe.
"""

import contextlib
import os
import selectors
import signal
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from milter import children, notify, signals
from milter.listener import Listener
from milter.safe_log import SafeLog
from milter.scarcity import plain_errors

__all__ = ["DONE", "DRAIN", "END", "FAILED", "READY", "STOP", "Supervisor"]

log = SafeLog("milter")

READY, DONE, FAILED = b"+", b".", b"!"
DRAIN, STOP, END = b"d", b"s", b"q"

_START_LIMIT = 120.0  # seconds until a worker must be ready
_KILL_AFTER = 5.0  # seconds beyond the grace, or after END, until a worker is killed
_SETTLED = 5.0  # seconds after which a worker's death is no failure of its start
_FIRST_DELAY, _LONGEST_DELAY = 0.1, 30.0  # seconds between the deaths of workers at their start, and the next try
_HOPELESS = 10  # such deaths, one after the other, with no worker left
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD, *signals.MEANINGLESS)

EXIT_NOT_STARTED = 1
EXIT_FAILED = 70  # EX_SOFTWARE of sysexits.h


@dataclass
class _Worker:
    pid: int
    control: socket.socket
    generation: int
    born: float = field(default_factory=time.monotonic)
    ready: bool = False
    told: bool = False
    """It knows that it shall end; so its death is no surprise."""
    killed: bool = False
    """It did not end in time, at the stop."""
    deadline: float = field(default_factory=lambda: time.monotonic() + _START_LIMIT)
    """When it is killed: never, once it is ready, until it is told to end."""


class _Companion:
    """A process beside the workers. It ends when nobody holds the writing end of its pipe any more."""

    def __init__(self, work: Callable[[int], int]) -> None:
        self._work = work
        self._reader, self._writer = os.pipe()
        self._pid: int | None = None
        self._born = 0.0
        self._deaths = 0
        self._fate: str | None = None
        """What became of the last one."""

    def is_missing(self) -> bool:
        """Is it to be forked? No more, when it has ended at once too often."""
        if self._pid is None:
            return not self._is_hopeless()
        ended, status = os.waitpid(self._pid, os.WNOHANG)
        if not ended:
            return False
        self._deaths = self._deaths + 1 if time.monotonic() - self._born < _SETTLED else 1
        self._fate = f"the process beside the workers, {self._pid}, {_how(os.waitstatus_to_exitcode(status))}"
        self._pid = None
        if self._is_hopeless():
            log.error("%s; it is not started again", self._fate)
        return not self._is_hopeless()

    def _is_hopeless(self) -> bool:
        return self._deaths >= _HOPELESS

    def hide(self) -> None:
        """In a worker: whom it forks shall not keep the companion alive."""
        children.hide(self._writer)

    def be(self) -> int:
        """In the child."""
        os.close(self._writer)
        return self._work(self._reader)

    def begin(self, pid: int) -> None:
        self._pid, self._born = pid, time.monotonic()
        if self._fate is not None:
            log.error("%s; its place is taken", self._fate)

    def end(self) -> None:
        """All workers have ended: wait for it."""
        os.close(self._writer)
        if self._pid is not None:
            os.waitpid(self._pid, 0)
        os.close(self._reader)


class Supervisor:
    """Serves one socket with `count` workers, until a signal ends it.

    Arguments:
        work: what a child does: with its end of the socket pair; returns its exit code.
        forget: is called with the number of a worker that has ended.
        companion: what one more process does, which is forked first and replaced when it dies: with the reading end of
            a pipe that shows when all others have ended, and it shall; returns its exit code.
        grace: seconds in which a worker drains.
        name: of the filter, for the log.
    """

    @plain_errors()
    def __init__(
        self,
        listener: Listener,
        count: int,
        work: Callable[[socket.socket], int],
        forget: Callable[[int], None],
        *,
        companion: Callable[[int], int] | None,
        grace: float,
        name: str,
    ) -> None:
        self._listener = listener
        self._count = count
        self._work = work
        self._forget = forget
        self._companion = _Companion(companion) if companion is not None else None
        self._grace = grace
        self._name = name
        self._workers: dict[int, _Worker] = {}
        self._generation = 1
        """The one that serves."""
        self._next: int | None = None
        """The one that is to replace it."""
        self._reload_again = False
        self._served = False
        self._stopping = False
        self._exit_code = 0
        self._deaths = 0
        self._not_before = 0.0
        # One in the background of a shell is not to end by Ctrl-C. SIGHUP does not end it, and is never ignored.
        self._handled = [number for number in _SIGNALS if number != signal.SIGINT or not signals.is_ignored(number)]
        self._selector = selectors.DefaultSelector()
        self._signal_reader, self._signal_writer = socket.socketpair()

    def run(self) -> int:
        """Until a signal ends it; the exit code. Only in the main thread of a process with no other one."""
        with self._listening_to_signals():
            try:
                self._accompany()
                self._fill(self._generation)
                while self._workers or not self._stopping:
                    self._look()
                    self._tend()
            finally:
                self._kill(self._workers.values())
                if self._companion is not None:
                    self._companion.end()
        return self._exit_code

    # ---- Events

    @contextlib.contextmanager
    def _listening_to_signals(self) -> Iterator[None]:
        for end in (self._signal_reader, self._signal_writer):
            end.setblocking(False)
        self._selector.register(self._signal_reader, selectors.EVENT_READ)
        before = signal.set_wakeup_fd(self._signal_writer.fileno(), warn_on_full_buffer=False)
        try:
            with signals.handled(self._handled):
                yield
        finally:
            signal.set_wakeup_fd(before)
            self._selector.close()
            self._signal_reader.close()
            self._signal_writer.close()

    def _look(self) -> None:
        """Wait for the next event, and note it."""
        for key, _ in self._selector.select(self._until_next_deadline()):
            if key.fileobj is self._signal_reader:
                for number in self._signal_reader.recv(4096):
                    self._hear(number)
            else:
                self._listen_to(key.data)

    def _until_next_deadline(self) -> float | None:
        deadlines = [worker.deadline for worker in self._workers.values()]
        if not self._stopping and self._missing(self._next or self._generation):
            deadlines.append(self._not_before)
        nearest = min(deadlines, default=float("inf"))
        return None if nearest == float("inf") else max(0.0, nearest - time.monotonic())

    def _hear(self, number: int) -> None:
        if number in (signal.SIGTERM, signal.SIGINT):
            if self._stopping:
                self._hurry()
            else:
                self._stop()
        elif number == signal.SIGHUP:
            self._reload()
        elif number in signals.MEANINGLESS:
            signals.tell_meaningless(number)

    def _listen_to(self, worker: _Worker) -> None:
        try:
            said = worker.control.recv(64, socket.MSG_DONTWAIT)
        except OSError:
            said = b""
        if not said:  # it is about to end, and will be waited for
            self._listen_no_more_to(worker)
        if READY in said:
            worker.ready = True
            if not worker.told:
                worker.deadline = float("inf")
        if FAILED in said:
            self._exit_code = EXIT_FAILED
        if (DONE in said or FAILED in said) and not self._stopping:
            self._stop()

    def _listen_no_more_to(self, worker: _Worker) -> None:
        with contextlib.suppress(KeyError, ValueError):  # it may have been so before
            self._selector.unregister(worker.control)

    def _tend(self) -> None:
        """What follows of what was noted."""
        self._kill(worker for worker in self._workers.values() if time.monotonic() >= worker.deadline)
        for pid in list(self._workers):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                self._listen_to(self._workers[pid])  # to what it said since the last look
                self._bury(self._workers.pop(pid), os.waitstatus_to_exitcode(status))
        self._accompany()
        if self._stopping:
            return
        if self._next is not None and not self._missing(self._next) and self._all_ready(self._next):
            self._hand_over()
        self._fill(self._next or self._generation)
        if not self._served and self._all_ready(self._generation):
            self._served = True
            self._settle()

    # ---- Workers

    def _of(self, generation: int) -> list[_Worker]:
        return [worker for worker in self._workers.values() if worker.generation == generation and not worker.told]

    def _missing(self, generation: int) -> int:
        return self._count - len(self._of(generation))

    def _all_ready(self, generation: int) -> bool:
        workers = self._of(generation)
        return len(workers) == self._count and all(worker.ready for worker in workers)

    def _fill(self, generation: int) -> None:
        if time.monotonic() >= self._not_before:
            for _ in range(self._missing(generation)):
                try:
                    self._fork(generation)
                except OSError as failure:  # too many processes, or descriptors; it may be better later
                    log.error("a worker cannot be started: %s", failure.strerror)
                    self._go_on_without(generation)
                    return

    def _fork(self, generation: int) -> None:
        """Raises `OSError` when the system has no process or descriptor for it."""
        ours, theirs = socket.socketpair()

        def be_worker() -> int:
            ours.close()
            children.hide(theirs.fileno())
            if self._companion is not None:
                self._companion.hide()
            return self._work(theirs)

        with contextlib.closing(theirs):
            try:
                pid = self._fork_child(be_worker)
            except OSError:
                ours.close()
                raise
        worker = _Worker(pid, ours, generation)
        self._workers[pid] = worker
        self._selector.register(ours, selectors.EVENT_READ, worker)

    def _fork_child(self, work: Callable[[], int]) -> int:
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            pid = os.fork()
            if pid == 0:
                self._be_child(work, mask)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        return pid

    def _be_child(self, work: Callable[[], int], mask: Iterable[int]) -> None:
        """In the child: never returns."""
        code = EXIT_FAILED
        try:
            signal.set_wakeup_fd(-1)
            for number in self._handled:
                signal.signal(number, signal.SIG_DFL)
            self._selector.close()
            for end in (self._signal_reader, self._signal_writer):
                end.close()
            for worker in self._workers.values():
                worker.control.close()
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            code = work()
        except BaseException:
            log.critical("a process of %s failed", self._name, exc_info=True)
        finally:
            os._exit(code)

    def _accompany(self) -> None:
        """There is a companion, if there shall be one."""
        if self._companion is not None and self._companion.is_missing():
            try:
                self._companion.begin(self._fork_child(self._companion.be))
            except OSError as failure:  # it is tried again with the next event
                log.error("the process beside the workers cannot be started: %s", failure.strerror)

    def _bury(self, worker: _Worker, code: int) -> None:
        self._listen_no_more_to(worker)
        worker.control.close()
        self._forget(worker.pid)
        if worker.told:
            if code == EXIT_FAILED or worker.killed:  # it told why, or did not end in time
                self._exit_code = self._exit_code or EXIT_FAILED
            return
        if worker.ready:
            log.error("worker %d %s; its place is taken", worker.pid, _how(code))
        if worker.ready and time.monotonic() - worker.born > _SETTLED:
            self._deaths = 0
            return
        self._note_failed_start(worker, code)

    def _note_failed_start(self, worker: _Worker, code: int) -> None:
        if not worker.ready:
            log.error("worker %d %s before it could serve", worker.pid, _how(code))
        self._go_on_without(worker.generation)

    def _go_on_without(self, generation: int) -> None:
        """A worker of this generation could not start."""
        if generation == self._next:
            self._give_up_reload()
            return
        if not self._served:
            self._exit_code = self._exit_code or EXIT_NOT_STARTED
            self._stop()
            return
        delay = min(_FIRST_DELAY * 2**self._deaths, _LONGEST_DELAY)
        self._deaths += 1
        self._not_before = time.monotonic() + delay
        if self._deaths >= _HOPELESS and not any(other.ready for other in self._workers.values()):
            log.critical("no worker lives: %d in a row have ended at once; giving up", self._deaths)
            self._exit_code = EXIT_FAILED
            self._stop()

    # ---- Reload

    def _reload(self) -> None:
        if self._stopping:
            return
        if self._next is not None or not self._served:
            self._reload_again = True
            return
        log.info("%s is loaded again", self._name)
        notify.reloading()
        self._next = self._generation + 1
        self._not_before = 0.0

    def _hand_over(self) -> None:
        """The new workers accept connections: the old ones can go."""
        assert self._next is not None
        old = self._of(self._generation)
        self._generation, self._next = self._next, None
        self._deaths = 0
        self._tell(old, DRAIN, self._grace + _KILL_AFTER)
        log.info("%s was loaded again: %d new workers serve", self._name, self._count)
        self._settle()

    def _give_up_reload(self) -> None:
        assert self._next is not None
        log.error("%s was not loaded again: its new version does not start. The old one goes on", self._name)
        self._tell(self._of(self._next), END, _KILL_AFTER)
        self._generation, self._next = self._renumbered(self._next + 1), None
        self._settle()

    def _renumbered(self, generation: int) -> int:
        """The workers that serve get a number that no other worker has had."""
        for worker in self._of(self._generation):
            worker.generation = generation
        return generation

    def _settle(self) -> None:
        """One generation serves, and no other is coming."""
        notify.ready()
        if self._reload_again:
            self._reload_again = False
            self._reload()

    # ---- The end

    def _stop(self) -> None:
        self._stopping = True
        notify.stopping()
        self._listener.withdraw()
        self._tell(self._workers.values(), STOP, self._grace + _KILL_AFTER)

    def _hurry(self) -> None:
        self._tell(self._workers.values(), END, _KILL_AFTER)

    def _tell(self, workers: Iterable[_Worker], command: bytes, limit: float) -> None:
        for worker in workers:
            worker.told = True
            worker.deadline = min(worker.deadline, time.monotonic() + (limit if worker.ready else _KILL_AFTER))
            with contextlib.suppress(OSError):  # it is about to end
                worker.control.send(command)

    def _kill(self, workers: Iterable[_Worker]) -> None:
        for worker in workers:
            if worker.ready:
                log.critical("worker %d did not end in time, and is killed", worker.pid)
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker.pid, signal.SIGKILL)
            worker.deadline = float("inf")
            worker.killed = self._stopping


def _how(code: int) -> str:
    if code >= 0:
        return f"ended with code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"
