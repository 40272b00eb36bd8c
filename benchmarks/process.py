# SPDX-License-Identifier: GPL-3.0-or-later
"""A filter as a process of its own: started, looked at from outside (processor time, memory), ended."""

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO

from benchmarks.contenders import Program

_TICKS = os.sysconf("SC_CLK_TCK")
_START_LIMIT = 20.0  # seconds
_PROC = Path("/proc")


def _environment() -> dict[str, str]:
    """Without what the caller's Python may import: a filter of another library would find this one's modules."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


class StartFailed(Exception):
    """A filter does not listen; the text is the last line of what it said."""


class FilterProcess:
    """A running filter; a context manager that ends it. `transport` is ``unix`` or ``tcp``."""

    def __init__(self, program: Program, transport: str, directory: Path, name: str) -> None:
        self.socket = f"unix:{directory / name}.sock" if transport == "unix" else f"inet:{_free_port()}@127.0.0.1"
        self._switches = 0
        self._log: IO[bytes] = open(directory / f"{name}.log", "w+b")  # noqa: SIM115  (closed by end)
        self._process = subprocess.Popen(
            [*program.command, self.socket],
            env={**_environment(), **program.variables},
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,  # its children can be ended with it
        )
        try:
            self._wait_until_it_listens()
        except BaseException:
            self.end()
            raise

    def _wait_until_it_listens(self) -> None:
        limit = time.monotonic() + _START_LIMIT
        while not _listens(self.socket):
            if self._process.poll() is not None:
                raise StartFailed(self.last_words())
            if time.monotonic() > limit:
                raise StartFailed(f"it did not listen within {_START_LIMIT:.0f} seconds; {self.last_words()}")
            time.sleep(0.01)

    def last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode("utf-8", "replace").strip().splitlines()
        return lines[-1].strip() if lines else f"exit code {self._process.poll()}, without a word"

    def cpu_seconds(self) -> float:
        """User and system time that the filter and its children have used."""
        return sum(_cpu_ticks(pid) for pid in self._pids()) / _TICKS

    def rss_kib(self) -> int:
        """Resident memory now."""
        return sum(_status(pid, "VmRSS") for pid in self._pids())

    def peak_kib(self) -> int:
        """The most resident memory there ever was."""
        return sum(_status(pid, "VmHWM") for pid in self._pids())

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait(self) -> int:
        """The exit code of a filter that was told to end."""
        return self._process.wait()

    def _pids(self) -> Iterator[int]:
        return _family(self._process.pid)

    def end(self) -> int:
        """At once: libmilter takes up to five seconds to stop, and there is nothing to save.

        Returns how often its threads, all that it ever had, have left a processor.
        """
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            _, status, usage = os.wait4(self._process.pid, 0)
            self._process.returncode = os.waitstatus_to_exitcode(status)
            self._switches = usage.ru_nvcsw + usage.ru_nivcsw
        self._log.close()
        return self._switches

    def __enter__(self) -> "FilterProcess":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, failure: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.end()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _listens(specification: str) -> bool:
    kind, _, where = specification.partition(":")
    try:
        if kind == "unix":
            with socket.socket(socket.AF_UNIX) as probe:
                probe.connect(where)
        else:
            port, _, host = where.partition("@")
            socket.create_connection((host, int(port)), timeout=1).close()
    except OSError:
        return False
    return True


def _family(pid: int) -> Iterator[int]:
    """The process and its descendants."""
    yield pid
    for children in _PROC.glob(f"{pid}/task/*/children"):
        with contextlib.suppress(OSError):
            for child in children.read_text().split():
                yield from _family(int(child))


def _cpu_ticks(pid: int) -> int:
    fields = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def _status(pid: int, name: str) -> int:
    for line in (_PROC / str(pid) / "status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise StartFailed(f"the process {pid} has ended")
