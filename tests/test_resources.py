# SPDX-License-Identifier: GPL-3.0-or-later
"""What a filter does when descriptors, threads, memory or the disk run out under load, and when they are back.

The limits of a running worker are lowered from outside, real messages are sent meanwhile, and each must get its own
verdict: the filter answers with the sender that it saw. Then the limits are raised again.
"""

import contextlib
import itertools
import os
import platform
import re
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from milter import Address, Context, EomContext, Message, Milter, MilterError, Status
from milter.descriptors import raise_limit
from milter.libmilter import libmilter
from milter.pidfile import pidfile
from milter.scarcity import MemoryOutage, start_thread
from milter.spool import Spool, directory
from milter.testing import AddHeader, Answer, Client, PeerClosed, Verdict, WireError
from tests.conftest import Serve
from tests.filter_process import PATIENCE, FilterProcess

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="prlimit(2) and /proc are Linux's")

needs_large_stacks = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="the size of a thread's stack is RLIMIT_STACK in the GNU C library"
)
needs_redirection = pytest.mark.skipif(
    not libmilter.redirected, reason="libmilter's own accept and pthread_create are used"
)

FILTER = """
import os
import time
from milter import EomContext, Message, Milter, Status

app = Milter("scarce", spool_size=1000, spool_directory=os.environ.get("SPOOL"))

@app.on_message
def token(ctx: EomContext, message: Message) -> Status:
    if ctx.sender.startswith("waits"):
        time.sleep(0.02)
    message.headers["X-Token"] = f"{ctx.sender} {len(message.body)}"
    return Status.CONTINUE

@app.on_stop
def stopped():
    os.write(2, b"on_stop was run\\n")
"""
CLIENTS = 40
PIECE = 65000
LARGE = b"x" * 5000 + b"\r\n"


LIMITED = """
import os, resource, sys
for limit in sys.argv.pop(1).split():
    name, soft, hard = limit.replace("=", ":").split(":")
    resource.setrlimit(getattr(resource, name), (int(soft), int(hard)))
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""
"""Starts Python again, with soft and hard limits; without site, since what tests/site is passed is for the second."""
STACK = 1 << 30
"""Of each thread, by RLIMIT_STACK: so a limit of the address space is one of threads."""
REST = 700 << 20
"""More than a filter needs besides."""


class Scarce(FilterProcess):
    """A filter with a supervisor, and one worker whose limits can be changed."""

    def __init__(
        self, place: Path, *options: str, where: str | None = None, limits: str = "", text: str = FILTER, **more: Any
    ) -> None:
        (place / "scarce.py").write_text(text)
        specification = where or f"unix:{place}/s"
        super().__init__(
            *(("-S", "-c", LIMITED, limits) if limits else ()),
            "-m",
            "milter",
            "run",
            "scarce:app",
            "-s",
            specification,
            "--backlog",
            "200",
            *options,
            directory=place,
            **more,
        )

    @property
    def worker(self) -> int:
        return int(Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()[0])

    def take_descriptors(self, *processes: int) -> None:
        """The supervisor can open none. A worker may where there are gaps among the numbers: the system refuses a poll
        of more files than the limit, and libmilter's own may be of many."""
        for process in processes or (self.worker,):
            taken = {int(name) for name in os.listdir(f"/proc/{process}/fd")}
            lowest = next(number for number in itertools.count() if number not in taken)
            hard = resource.prlimit(process, resource.RLIMIT_NOFILE)[1]
            resource.prlimit(process, resource.RLIMIT_NOFILE, (lowest if process == self.pid else max(taken) + 1, hard))

    def take_threads(self) -> None:
        """The worker cannot have the memory for the stack of one more thread, but some for messages."""
        pages = int(Path(f"/proc/{self.worker}/statm").read_text().split()[0])
        size = pages * resource.getpagesize() + 4 * 1024 * 1024
        resource.prlimit(self.worker, resource.RLIMIT_AS, (size, resource.RLIM_INFINITY))

    def take_large_threads(self, process: int) -> None:
        """It, and its children, cannot start another thread: for a filter with stacks of the size `STACK`."""
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[0])
        resource.prlimit(process, resource.RLIMIT_AS, (pages * resource.getpagesize() + REST, resource.RLIM_INFINITY))

    def take_memory(self, rest: int) -> None:
        """The worker gets no more than so many bytes."""
        pages = int(Path(f"/proc/{self.worker}/statm").read_text().split()[0])
        size = pages * resource.getpagesize() + rest
        resource.prlimit(self.worker, resource.RLIMIT_AS, (size, resource.RLIM_INFINITY))

    def give_back(self) -> None:
        hard = resource.prlimit(self.worker, resource.RLIMIT_NOFILE)[1]
        resource.prlimit(self.worker, resource.RLIMIT_NOFILE, (hard, hard))
        resource.prlimit(self.worker, resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


@pytest.fixture
def scarce(tmp_path: Path) -> Iterator[Callable[..., Scarce]]:
    with contextlib.ExitStack() as stack:
        yield lambda *options, **more: stack.enter_context(Scarce(tmp_path, *options, **more))


def token(client: Client, name: str, body: bytes = b"x\r\n") -> Verdict:
    """Send a message. If it is accepted, it must be this one that the filter saw."""
    client.mail(f"<{name}@client.example>")
    client.rcpt("<bob@mta.example>")
    client.data()
    client.header("Subject", "test")
    client.eoh()
    for start in range(0, len(body), PIECE):
        client.body(body[start : start + PIECE])
    end = client.end_of_message()
    if end.answer.verdict is Verdict.CONTINUE:
        values = [event.value for event in end.events if isinstance(event, AddHeader)]
        assert [value.strip() for value in values] == [f"{name}@client.example {len(body)}"]
    return end.answer.verdict


def greeted(where: str) -> Client:
    client = Client.connect(where, timeout=PATIENCE)
    client.negotiate()
    client.connect_info()
    client.helo()
    return client


def alone(where: str, name: str, body: bytes = b"x\r\n") -> Verdict:
    """One message, by a connection of its own."""
    client = greeted(where)
    verdict = token(client, name, body)
    client.quit()
    client.close()
    return verdict


class Load:
    """Many clients at once, each with one message."""

    def __init__(self, where: str, body: bytes = b"x\r\n", name: str = "u") -> None:
        self.verdicts: list[Verdict] = []
        self.failures: list[BaseException] = []
        self._threads = [threading.Thread(target=self._send, args=(where, f"{name}{i}", body)) for i in range(CLIENTS)]
        for thread in self._threads:
            thread.start()

    def _send(self, where: str, name: str, body: bytes) -> None:
        try:
            self.verdicts.append(alone(where, name, body))
        except BaseException as failure:
            self.failures.append(failure)

    def end(self) -> list[Verdict]:
        for thread in self._threads:
            thread.join(PATIENCE)
        assert self.failures == []
        assert len(self.verdicts) == CLIENTS
        return self.verdicts


# ---- Running out under load


@needs_redirection
def test_without_descriptors_connections_wait_and_are_served_when_there_are_some(scarce: Any) -> None:
    process = scarce()
    where = process.socket
    assert alone(where, "first") is Verdict.CONTINUE
    process.take_descriptors()
    idle = [Client.connect(where, timeout=PATIENCE) for _ in range(CLIENTS)]  # there may be gaps among the numbers
    load = Load(where)
    process.stderr.wait_for("connections cannot be accepted (Too many open files)")
    process.give_back()
    for client in idle:
        client.close()
    assert set(load.end()) == {Verdict.CONTINUE}
    process.stderr.wait_for("all connections that waited were accepted")
    assert process.stderr._count("cannot be accepted") == 1
    assert alone(where, "last") is Verdict.CONTINUE


@needs_redirection
def test_without_threads_the_sessions_are_served_by_those_that_there_are(scarce: Any) -> None:
    process = scarce()
    where = process.socket
    assert alone(where, "first") is Verdict.CONTINUE
    process.take_threads()
    assert set(Load(where, name="waits").end()) == {Verdict.CONTINUE}
    process.stderr.wait_for("no thread can be started (Resource temporarily unavailable)")
    process.give_back()
    assert set(Load(where, name="waits").end()) == {Verdict.CONTINUE}
    process.stderr.wait_for("threads can be started again")
    assert process.stderr._count("no thread can be started") == 1


def test_without_a_disk_large_messages_are_deferred_and_small_ones_are_not(scarce: Any, tmp_path: Path) -> None:
    spool = tmp_path / "spool"
    spool.mkdir()
    process = scarce(environment={"SPOOL": str(spool)})
    where = process.socket
    assert alone(where, "first", LARGE) is Verdict.CONTINUE
    spool.rmdir()
    assert set(Load(where, LARGE).end()) == {Verdict.TEMPFAIL}
    assert set(Load(where).end()) == {Verdict.CONTINUE}
    spool.mkdir()
    assert set(Load(where, LARGE).end()) == {Verdict.CONTINUE}
    process.log.wait_for(f"messages can be kept in {spool} again")
    assert process.log._count(f"a message cannot be kept in {spool}, Milter(spool_directory=…): No such file") == 1


def test_without_memory_mail_is_deferred_and_no_message_passes_unseen(scarce: Any) -> None:
    process = scarce(text=FILTER.replace("spool_size=1000", "spool_size=1 << 30"))
    where = process.socket
    assert alone(where, "first", LARGE) is Verdict.CONTINUE
    worker = process.worker
    large = b"x" * 100_000_000  # more than malloc has put by for a thread
    verdicts = []
    for spare in (64, 16, 4, 1, 0):
        process.take_memory(spare << 20)
        for body in (large, LARGE, b"x\r\n"):
            with contextlib.suppress(PeerClosed):  # libmilter has no memory for a connection: the MTA defers its mail
                verdicts.append(alone(where, "scarce", body))
    assert Verdict.TEMPFAIL in verdicts
    assert set(verdicts) <= {Verdict.CONTINUE, Verdict.TEMPFAIL}
    process.give_back()
    assert alone(where, "large", large) is Verdict.CONTINUE
    assert set(Load(where, LARGE).end()) == {Verdict.CONTINUE}
    assert process.worker == worker
    assert "the engine failed" not in process.stderr.text
    process.stop()


def test_without_memory_a_message_is_kept_in_a_file(scarce: Any) -> None:
    head = len("Subject:test\r\n\r\n")
    text = FILTER.replace("spool_size=1000", "spool_size=1 << 30")
    process = scarce(text=text.replace("len(message.body)", f"message.size - {head}"))
    where = process.socket
    assert alone(where, "first", LARGE) is Verdict.CONTINUE
    process.take_memory(16 << 20)
    assert alone(where, "large", b"x" * 100_000_000) is Verdict.CONTINUE


def test_an_outage_of_memory_is_told_once(serve: Serve, caplog: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    app = Milter("test")

    @app.on_rcpt
    def see(ctx: Context, recipient: Address, params: object) -> Status:
        return Status.CONTINUE

    monkeypatch.setattr("milter.binding._memory_outage", MemoryOutage())
    client = serve(app).greeted()
    client.mail("<ann@client.example>")
    client.rcpt("<bob@mta.example>")
    with monkeypatch.context() as patch:
        patch.setattr("milter.engine.Address.from_arguments", lambda arguments: fail())
        for _ in range(3):
            assert verdict(client.rcpt("<bob@mta.example>")) is Verdict.TEMPFAIL
    client.mail("<eve@client.example>")
    assert verdict(client.rcpt("<bob@mta.example>")) is Verdict.CONTINUE
    (record,) = [record for record in caplog.records if record.levelname == "CRITICAL"]
    assert "the memory has run out" in record.message
    assert record.exc_info is None


def fail() -> None:
    raise MemoryError


def verdict(answer: Answer | None) -> Verdict:
    assert answer is not None
    return answer.verdict


def test_a_thread_of_the_library_goes_on_when_there_is_memory_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("milter.scarcity._PAUSE", 0)
    attempts: list[str] = []

    def work(name: str) -> None:
        attempts.append(name)
        if len(attempts) < 3:
            raise MemoryError

    start_thread(work, "test", "x").join(PATIENCE)
    assert attempts == ["x"] * 3


# ---- Stop and reload without anything


def test_a_stop_needs_no_descriptor_and_no_directory(scarce: Any, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    process = scarce("--pidfile", str(tmp_path / "pid"), environment={"TMPDIR": str(gone)})
    client = greeted(process.socket)
    gone.rmdir()
    process.take_descriptors(process.worker, process.pid)
    process.signal(signal.SIGTERM)
    process.log.wait_for("for the end of open connections: 1")
    assert token(client, "late") is Verdict.CONTINUE
    client.quit()
    client.close()
    assert process.wait() == 0
    assert "on_stop was run" in process.stderr.lines
    assert not (tmp_path / "pid").exists()


def test_a_reload_without_descriptors_leaves_the_old_workers(scarce: Any) -> None:
    process = scarce()
    where = process.socket
    client = greeted(where)
    before = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
    process.take_descriptors(process.pid)
    process.signal(signal.SIGHUP)
    process.log.wait_for("The old one goes on")
    assert token(client, "still") is Verdict.CONTINUE
    resource.prlimit(process.pid, resource.RLIMIT_NOFILE, before)
    process.signal(signal.SIGHUP)
    process.log.wait_for("was loaded again")
    client.quit()
    client.close()
    assert alone(where, "new") is Verdict.CONTINUE


def test_the_port_is_closed_as_the_draining_begins(scarce: Any) -> None:
    process = scarce(where="inet:0@127.0.0.1")
    where = process.socket
    client = greeted(where)
    process.signal(signal.SIGTERM)
    process.log.wait_for("for the end of open connections: 1")
    with pytest.raises((MilterError, WireError)):
        greeted(where)
    assert token(client, "late") is Verdict.CONTINUE
    client.quit()
    client.close()
    assert process.wait() == 0


@pytest.mark.parametrize("kind", ["inet", "unix"])
def test_after_the_supervisor_was_killed_another_one_starts_while_workers_drain(
    scarce: Any, tmp_path: Path, kind: str
) -> None:
    options = ("--pidfile", str(tmp_path / "pid"))
    first = scarce(*options, where="inet:0@127.0.0.1" if kind == "inet" else f"unix:{tmp_path}/s")
    where = first.socket
    client = greeted(where)
    os.kill(first.pid, signal.SIGKILL)
    first.log.wait_for("for the end of open connections: 1")
    second = scarce(*options, where=where)
    assert second.socket == where
    assert alone(where, "new") is Verdict.CONTINUE
    assert token(client, "old") is Verdict.CONTINUE
    client.quit()
    client.close()
    assert first.wait() == -signal.SIGKILL


def test_standard_streams_that_are_closed_lead_nowhere(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "streams")
    (tmp_path / "streams.py").write_text(
        "import os, sys\nfrom milter import Milter\napp = Milter('streams')\n"
        "@app.on_start\ndef start():\n    print('nowhere'); print('nowhere', file=sys.stderr)\n"
        "    with open('streams', 'w') as f:\n"
        "        f.write(' '.join(os.readlink(f'/proc/self/fd/{n}') for n in range(3)))\n"
    )
    command = f"exec {sys.executable} -m milter run streams:app -s unix:{tmp_path}/t <&- >&- 2>&-"
    process = subprocess.Popen(["sh", "-c", command], cwd=tmp_path)
    try:
        assert (tmp_path / "streams").read_text() == "/dev/null /dev/null /dev/null"
        process.terminate()
        assert process.wait(PATIENCE) == 0
    finally:
        process.kill()
        process.wait()


@needs_large_stacks
def test_a_reload_without_threads_leaves_the_old_workers(scarce: Any) -> None:
    process = scarce(limits=f"RLIMIT_STACK={STACK}:-1")
    where = process.socket
    client = greeted(where)
    process.take_large_threads(process.pid)
    process.signal(signal.SIGHUP)
    process.log.wait_for("The old one goes on")
    process.stderr.wait_for("no thread can be started (milter: control)")
    assert token(client, "still") is Verdict.CONTINUE
    resource.prlimit(process.pid, resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    process.signal(signal.SIGHUP)
    process.log.wait_for("was loaded again")
    client.quit()
    client.close()
    assert alone(where, "new") is Verdict.CONTINUE
    process.stop()
    assert "Traceback" not in process.stderr.text


def test_a_stop_needs_no_thread(scarce: Any) -> None:
    none = """
    import threading
    def none(self):
        raise RuntimeError("can't start new thread")
    threading.Thread.start = none
"""  # a limit would leave the stacks of those that have just ended
    process = scarce(text=FILTER.replace("def ", "async def ") + none)
    assert alone(process.socket, "first") is Verdict.CONTINUE
    process.stop()
    assert "on_stop was run" in process.stderr.lines
    assert "Traceback" not in process.stderr.text


# ---- At the start


@needs_large_stacks
@pytest.mark.parametrize("threads", range(9))
def test_without_threads_a_start_says_what_to_do(scarce: Any, threads: int) -> None:
    """Whichever it is that is missing: the library's own, or one of libmilter's."""
    process = scarce(
        limits=f"RLIMIT_STACK={STACK}:-1 RLIMIT_AS={threads * STACK + REST}:-1",
        text=FILTER.replace("def ", "async def "),
    )
    assert process.wait() == 1
    assert re.search(r"CRITICAL .* no thread can be started \(.*TasksMax=, ulimit -u", process.stderr.text)
    assert re.search(r"ERROR .* worker \d+ ended with code 1 before it could serve", process.stderr.text)
    assert "Traceback" not in process.stderr.text


@pytest.mark.parametrize("descriptors", [5, 6, 8, 10, 13, 16, 20])
def test_without_descriptors_a_start_says_what_to_do(scarce: Any, descriptors: int) -> None:
    process = scarce(limits=f"RLIMIT_NOFILE={descriptors}:{descriptors}")
    assert process.wait() == 1
    assert "Too many open files" in process.stderr.text
    assert "Traceback" not in process.stderr.text


def test_no_directory_at_all_is_needed_without_on_message(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise FileNotFoundError("no usable temporary directory")

    monkeypatch.setattr("tempfile.gettempdir", none)
    app = Milter("test")

    @app.on_eom
    def mark(ctx: EomContext) -> Status:
        return Status.CONTINUE

    assert serve(app).greeted()

    whole = Milter("test")

    @whole.on_message
    def see(ctx: EomContext, message: Message) -> Status:
        return Status.CONTINUE

    with pytest.raises(MilterError, match=r"let Milter\(spool_directory=…\) or TMPDIR name one"):
        directory(None)


@pytest.mark.parametrize(("kind", "reason"), [("missing", "No such file"), ("file", "Not a directory")])
def test_a_spool_directory_that_is_none_is_refused_at_the_start(tmp_path: Path, kind: str, reason: str) -> None:
    place = tmp_path / "spool"
    if kind == "file":
        place.write_text("")
    app = Milter("test", spool_directory=place)

    @app.on_message
    def see(ctx: EomContext, message: Message) -> Status:
        return Status.CONTINUE

    with pytest.raises(MilterError, match=rf"no file can be made in {place}, Milter\(spool_directory=…\).*{reason}"):
        app.start(f"unix:{tmp_path}/s")


def test_an_outage_of_the_spool_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "milter")
    spool = Spool("/spool")
    for _ in range(2):
        for _ in range(3):
            assert "/spool" in str(spool.failed(28))
        for _ in range(3):
            spool.worked()
    told = [(record.levelname, record.message) for record in caplog.records]
    assert [level for level, _ in told] == ["ERROR", "INFO"] * 2
    assert "make room there" in told[0][1]


def test_the_soft_limit_of_descriptors_is_raised(scarce: Any) -> None:
    soft, hard = 64, min(4096, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    process = scarce(limits=f"RLIMIT_NOFILE={soft}:{hard}")
    where = process.socket
    assert resource.prlimit(process.worker, resource.RLIMIT_NOFILE) == (hard, hard)
    clients = [greeted(where) for _ in range(soft + 20)]
    assert token(clients[-1], "last") is Verdict.CONTINUE
    for client in clients:
        client.close()
    assert "cannot be accepted" not in process.stderr.text


@pytest.mark.parametrize(
    ("soft", "hard", "raised"),
    [(1024, 4096, 4096), (1024, 1 << 20, 65536), (1024, -1, 65536), (70_000, 1 << 20, 0), (64, 64, 0), (-1, -1, 0)],
)
def test_the_limit_of_descriptors_is_raised_so_far(
    soft: int, hard: int, raised: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, limits: asked.append(limits))
    raise_limit()
    assert asked == ([(raised, hard)] if raised else [])


def test_a_filter_that_runs_in_a_program_raises_the_soft_limit(tmp_path: Path) -> None:
    soft, hard = 64, min(4096, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    (tmp_path / "program.py").write_text(FILTER + f"\napp.run('unix:{tmp_path}/s')\n")
    with FilterProcess(
        "-S", "-c", LIMITED, f"RLIMIT_NOFILE={soft}:{hard}", tmp_path / "program.py", directory=tmp_path
    ) as process:
        assert process.socket
        assert resource.prlimit(process.pid, resource.RLIMIT_NOFILE) == (hard, hard)


# ---- The pidfile


def test_a_second_copy_does_not_take_the_pidfile(scarce: Any, tmp_path: Path) -> None:
    path = tmp_path / "pid"
    first = scarce("--pidfile", str(path))
    assert first.socket
    with FilterProcess(
        "-m", "milter", "run", "scarce:app", "-s", f"unix:{tmp_path}/t", "--pidfile", str(path), directory=tmp_path
    ) as second:
        assert second.wait() == 1
    assert f"the pidfile {path} belongs to process {first.pid}, which is running" in second.stderr.text
    assert path.read_text() == f"{first.pid}\n"
    first.stop()
    assert not path.exists()


def test_a_pidfile_that_was_left_behind_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    path.write_text(f"{os.getppid()}\n")  # of a process that runs, and is another
    with pidfile(str(path)):
        assert path.read_text() == f"{os.getpid()}\n"
    assert list(tmp_path.iterdir()) == []
