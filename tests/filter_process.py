# SPDX-License-Identifier: GPL-3.0-or-later
"""Filters as processes of their own, started by the command line that a user would type.

::

    with running_filters() as run_filter:
        guard = run_filter("examples/guard.py", "inet:0@127.0.0.1")
        ...  # it listens on guard.socket
        guard.stop()
        assert guard.stdout.lines == [...]

Nothing here sleeps or asks twice: output is read as it comes, and whoever waits for a line is woken by it.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self, TypeAlias

import milter

PATIENCE = 60.0
"""Seconds before a wait is given up as failed: longer than the grace (30) that a filter gives its connections."""

REPOSITORY = Path(__file__).parent.parent
_SITE = Path(__file__).parent / "site"
_LISTENING = " is listening on "

RunFilter: TypeAlias = "Callable[..., FilterProcess]"


class Output:
    """The lines of a stream, gathered by a thread as they come."""

    def __init__(self, name: str, stream: IO[bytes]) -> None:
        self._name = name
        self._stream = stream
        self._lines: list[str] = []
        self._ended = False
        self._news = threading.Condition()
        self._thread = threading.Thread(target=self._read, name=f"read {name}", daemon=True)
        self._thread.start()

    @property
    def lines(self) -> list[str]:
        """The lines until now; all of them once the process was waited for."""
        with self._news:
            return list(self._lines)

    @property
    def text(self) -> str:
        return "".join(f"{line}\n" for line in self.lines)

    def wait_for(self, text: str) -> str:
        """The first line that contains `text`; waits for it."""
        with self._news:
            self._news.wait_for(lambda: self._ended or self._find(text) is not None, PATIENCE)
            line = self._find(text)
        if line is None:
            state = "ended" if self._ended else f"was followed for {PATIENCE:g} seconds"
            raise AssertionError(f"{self._name} {state} without {text!r}:\n{self.text}")
        return line

    def wait_until(self, condition: Callable[[list[str]], bool]) -> list[str]:
        """The lines, once the condition holds for them; waits for it."""
        with self._news:
            self._news.wait_for(lambda: self._ended or condition(self._lines), PATIENCE)
            lines = list(self._lines)
        assert condition(lines), f"what is waited for does not come:\n{self.text}"
        return lines

    def wait_for_count(self, text: str, count: int) -> None:
        """Wait until so many lines contain `text`."""
        with self._news:
            self._news.wait_for(lambda: self._ended or self._count(text) >= count, PATIENCE)
            found = self._count(text)
        assert found >= count, f"{self._name} has {text!r} {found} times, not {count}:\n{self.text}"

    def finish(self) -> None:
        """Wait for the end of the stream."""
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), f"{self._name} is still open: somebody outlived the filter"

    def _find(self, text: str) -> str | None:
        return next((line for line in self._lines if text in line), None)

    def _count(self, text: str) -> int:
        return sum(text in line for line in self._lines)

    def _read(self) -> None:
        with self._stream:
            for line in self._stream:
                with self._news:
                    self._lines.append(line.rstrip(b"\n").decode("utf-8", "surrogateescape"))
                    self._news.notify_all()
        with self._news:
            self._ended = True
            self._news.notify_all()


class FilterProcess:
    """A filter that was started; a context manager at whose end it must have stopped well.

    Arguments:
        arguments: what follows `python` on the command line; relative paths count from the repository.
        umask: of the process, which decides who may connect to its Unix socket; -1 leaves it as it is here.
        library: the directory of the package `milter`; None for the one that is imported here.
        directory: where it is started; None for the repository.
        environment: variables that it gets besides.
        descriptors: that it inherits.
    """

    def __init__(
        self,
        *arguments: str | Path,
        umask: int = -1,
        library: Path | None = None,
        directory: Path | None = None,
        environment: Mapping[str, str] | None = None,
        descriptors: Sequence[int] = (),
    ) -> None:
        self._command = [sys.executable, *map(str, arguments)]
        self._waited_for = False
        log, log_writer = os.pipe()
        try:
            self._process = subprocess.Popen(
                self._command,
                cwd=directory or REPOSITORY,
                env={**_environment(log_writer, library), **(environment or {})},
                pass_fds=[log_writer, *descriptors],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                umask=umask,
            )
        finally:
            os.close(log_writer)
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self.stdout = Output("standard output", self._process.stdout)
        self.stderr = Output("standard error", self._process.stderr)
        self.log = Output("the library's log", os.fdopen(log, "rb"))
        """What the library logs, from INFO on: level and message, without tracebacks."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None and not self._waited_for:
                self.stop()
        finally:
            self._process.kill()
            self._process.wait()
            if error is not None:
                sys.stdout.write(str(self))
            assert self._process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()

    def __str__(self) -> str:
        """The command and all it has said, for messages of failing tests."""
        outputs = ((self.stdout, "standard output"), (self.stderr, "standard error"), (self.log, "log"))
        said = "".join(f"--- {name}\n{output.text}" for output, name in outputs if output.text)
        return f"{' '.join(self._command)}\n{said}"

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def socket(self) -> str:
        """Where it listens, in libmilter's form, with the port that the system chose for port 0; waits for it."""
        try:
            return self.log.wait_for(_LISTENING).rpartition(_LISTENING)[2]
        except AssertionError as failure:
            raise AssertionError(f"{failure}\n{self}") from None

    def say(self, line: str) -> None:
        """Write a line to its standard input."""
        assert self._process.stdin is not None
        self._process.stdin.write(line.encode() + b"\n")
        self._process.stdin.flush()

    def end_input(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def wait(self) -> int:
        """The exit code, or the negative number of the signal that ended it; waits for the end of all its output."""
        self._waited_for = True
        try:
            code = self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the filter does not end: {self}") from None
        for output in (self.stdout, self.stderr, self.log):
            output.finish()
        return code

    def kill(self) -> None:
        """End it without asking, and wait for that."""
        self._process.kill()
        self.wait()

    def stop(self) -> None:
        """SIGTERM; it must end with exit code 0."""
        self.signal(signal.SIGTERM)
        code = self.wait()
        assert code == 0, f"exit code {code}: {self}"


@contextlib.contextmanager
def running_filters(umask: int = -1, library: Path | None = None) -> Iterator[RunFilter]:
    """A function that starts filters and waits until they listen. At the end those left are stopped, in turn.

    A test that fails shows what its filters said.
    """
    processes: list[FilterProcess] = []
    with contextlib.ExitStack() as stack:

        def run_filter(*arguments: str | Path) -> FilterProcess:
            process = stack.enter_context(FilterProcess(*arguments, umask=umask, library=library))
            processes.append(process)
            assert process.socket
            return process

        yield run_filter
    for process in processes:
        sys.stdout.write(str(process))


def _environment(log_writer: int, library: Path | None) -> dict[str, str]:
    # By default the same library that is imported here, installed or not.
    paths = [
        str(_SITE),
        str(library or Path(milter.__file__).parent.parent),
        *filter(None, [os.environ.get("PYTHONPATH")]),
    ]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "MILTER_TEST_LOG": str(log_writer)}
