# SPDX-License-Identifier: GPL-3.0-or-later
"""``milter run``: workers, reload, stop. Real processes, real signals."""

import contextlib
import json
import os
import re
import resource
import signal
import socket
import tempfile
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from milter import MilterError
from milter.loading import load
from milter.supervisor import _how
from milter.testing import AddHeader, Client, Verdict, WireError
from tests.conftest import begin_message, send_content, send_message
from tests.filter_process import PATIENCE, FilterProcess

FILTER = """
import os, sys
from milter import EomContext, Milter, Status

VERSION = "1"
app = Milter("versioned")

def say(text):  # in one piece, since workers share the descriptor
    os.write(1, f"{text} {VERSION}\\n".encode())

@app.on_start
def start():
    say("start")

@app.on_stop
def stop():
    say("stop")

@app.on_eom
def mark(ctx: EomContext) -> Status:
    if ctx.sender == "slow@client.example":
        say("waiting")
        sys.stdin.readline()
    ctx.add_header("X-Version", VERSION)
    ctx.add_header("X-Worker", str(os.getpid()))
    return Status.CONTINUE
"""


class Running(FilterProcess):
    """``milter run`` with a filter of the test's own."""

    def __init__(self, directory: Path, *options: str, text: str = FILTER, **more: Any) -> None:
        self.directory = directory
        self.write(text)
        where = [] if "--socket" in options else ["--socket", f"unix:{directory}/s"]
        super().__init__("-m", "milter", "run", "thefilter:app", *where, *options, directory=directory, **more)

    def write(self, text: str) -> None:
        """The filter's code, and nothing compiled of what was there before."""
        (self.directory / "thefilter.py").write_text(text)
        for compiled in self.directory.glob("__pycache__/thefilter.*"):
            compiled.unlink()

    def greeted(self) -> Client:
        client = Client.connect(self.socket)
        client.negotiate()
        client.connect_info()
        client.helo()
        return client

    def in_a_handler_that_waits(self) -> Client:
        """A connection whose message's end waits for a line on the filter's standard input."""
        client = self.greeted()
        client.mail("<slow@client.example>")
        client.rcpt("<bob@mta.example>")
        client.data()
        client.send(b"E")
        self.stdout.wait_for("waiting")
        return client

    def marks(self, client: Client | None = None) -> dict[str, str]:
        """The header fields that a message gets."""
        caller = client or self.greeted()
        end = send_message(caller)
        assert end.answer.verdict is Verdict.CONTINUE
        if client is None:
            caller.quit()
            caller.close()
        return {event.name: event.value for event in end.events if isinstance(event, AddHeader)}

    def version(self) -> str:
        return self.marks()["X-Version"]

    def worker(self) -> int:
        return int(self.marks()["X-Worker"])

    def reload(self) -> None:
        self.signal(signal.SIGHUP)

    def starts(self, count: int) -> None:
        """Wait until so many workers have begun to listen."""
        self.log.wait_for_count(" is listening on ", count)


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for child processes in /proc")


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Any]:
    with contextlib.ExitStack() as stack:

        def start(*options: str, **more: Any) -> Running:
            return stack.enter_context(Running(tmp_path, *options, **more))

        yield start


@contextlib.contextmanager
def until_ready(directory: Path) -> Iterator[dict[str, str]]:
    """The environment of what starts meanwhile; at the end its supervisor knows that all workers serve.

    A worker that dies earlier could not start, for the supervisor, also if it had a connection already.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(directory / "ready"))
        manager.settimeout(PATIENCE)
        yield {"NOTIFY_SOCKET": str(directory / "ready")}
        assert manager.recv(100) == b"READY=1\n"


@pytest.fixture
def run_until_ready(run: Any, tmp_path: Path) -> Any:
    def start(*options: str) -> Running:
        with until_ready(tmp_path) as environment:
            process: Running = run(*options, environment=environment)
        return process

    return start


# ---- Start and stop


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("workers", [1, 3])
def test_it_serves_until_a_signal_and_leaves_nothing(
    run: Any, tmp_path: Path, number: signal.Signals, workers: int
) -> None:
    process = run("--workers", str(workers))
    process.starts(workers)
    assert process.version() == "1"
    process.signal(number)
    assert process.wait() == 0
    assert process.stdout.lines == ["start 1"] * workers + ["stop 1"] * workers
    assert not (tmp_path / "s").exists()


def test_a_message_under_way_is_finished_whoever_gets_the_signal(run: Any) -> None:
    """A service manager may signal the workers, too: that is no second request."""
    process = run("--grace", "3600")
    worker = process.worker()
    client = process.in_a_handler_that_waits()
    for pid in (worker, process.pid, worker, worker):
        os.kill(pid, signal.SIGTERM)
    process.log.wait_for("waiting up to 3600 seconds for the end of open connections")
    os.kill(worker, signal.SIGTERM)
    process.say("go on")
    assert [client.receive().letter for _ in range(3)] == [b"h", b"h", b"c"]
    client.quit()
    assert process.wait() == 0


def test_a_connection_that_has_said_nothing_yet_is_waited_for(run: Any) -> None:
    process = run("--grace", "3600")
    process.version()  # libmilter has accepted whoever came before
    silent = Client.connect(process.socket)
    process.version()  # and this one, too
    process.signal(signal.SIGTERM)
    process.log.wait_for("the end of open connections")
    silent.negotiate()
    silent.connect_info()
    silent.helo()
    assert process.marks(silent)["X-Version"] == "1"
    silent.quit()
    assert process.wait() == 0


def test_a_second_signal_ends_at_once(run: Any) -> None:
    process = run("--grace", "3600", "--workers", "2")
    client = process.greeted()
    process.signal(signal.SIGTERM)
    process.log.wait_for("waiting up to 3600 seconds")
    process.signal(signal.SIGTERM)
    assert process.wait() == 0
    client.close()


def test_a_worker_in_a_handler_that_never_ends_is_given_up(run: Any) -> None:
    process = run("--grace", "0")
    client = process.in_a_handler_that_waits()
    process.signal(signal.SIGTERM)
    assert process.wait() == 70
    assert "handlers are still running" in process.log.text
    with pytest.raises(WireError):
        client.receive()


def test_a_worker_that_does_nothing_any_more_is_killed(run: Any) -> None:
    process = run("--grace", "0")
    worker = process.worker()
    os.kill(worker, signal.SIGSTOP)
    process.signal(signal.SIGTERM)
    assert process.wait() == 70
    assert f"worker {worker} did not end in time, and is killed" in process.log.text


def test_workers_outlive_no_supervisor_that_is_killed(run: Any, tmp_path: Path) -> None:
    process = run("--workers", "2")
    process.starts(2)
    process.signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL  # and all its output has ended: nobody holds it open
    assert process.stdout.lines.count("stop 1") == 2


def test_a_filter_can_ask_for_its_stop(run: Any) -> None:
    text = FILTER.replace("    return Status.CONTINUE", "    app.stop()\n    return Status.CONTINUE")
    process = run("--workers", "2", text=text)
    process.starts(2)
    assert process.version() == "1"
    assert process.wait() == 0
    assert process.stdout.lines.count("stop 1") == 2


def test_on_error_shutdown_ends_all_workers(run: Any) -> None:
    text = FILTER.replace('Milter("versioned")', 'Milter("versioned", on_error="shutdown")')
    process = run("--workers", "2", text=text.replace("    return Status.CONTINUE", "    1 / 0"))
    process.starts(2)
    client = process.greeted()
    assert send_message(client).answer.verdict is Verdict.TEMPFAIL
    client.close()
    assert process.wait() == 70
    assert process.stdout.lines.count("stop 1") == 2
    assert "mark failed in on_eom: ZeroDivisionError" in process.log.text


# ---- Start-ups that fail


def refused(tmp_path: Path, *options: str, text: str) -> str:
    """What is said on standard error by a filter that does not start."""
    with Running(tmp_path, *options, text=text) as process:
        assert process.wait() == 1
        assert not (tmp_path / "s").exists()
        return process.stderr.text


def test_an_error_in_the_users_module_is_told_in_a_line_with_its_own_traceback(tmp_path: Path) -> None:
    (tmp_path / "helper.py").write_text("def help():\n    return {}['key']\n")
    said = refused(tmp_path, text="import helper\n\nhelper.help()\n")
    first, *rest = [line for line in said.splitlines() if "before it could serve" not in line]
    assert first.endswith("the module 'thefilter' cannot be imported: KeyError: 'key'")
    assert [line.split(", line")[0].strip() for line in rest if line.lstrip().startswith("File")] == [
        f'File "{tmp_path}/thefilter.py"',
        f'File "{tmp_path}/helper.py"',
    ]
    assert "importlib" not in said


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("x = (", "cannot be imported: SyntaxError: '(' was never closed"),
        ("import sys\nsys.exit(3)", "cannot be imported: SystemExit: 3"),
        ("import no_such_module", "cannot be imported: ModuleNotFoundError: No module named 'no_such_module'"),
        ("from milter import Milter\nother = Milter('x')", "has no 'app'; there is other; write thefilter:NAME"),
        ("app = 3", "thefilter:app is an int, not a Milter"),
        (FILTER.replace('say("start")', 'raise ValueError("no database")'), "ValueError: no database"),
    ],
)
def test_other_failing_starts(tmp_path: Path, text: str, reason: str) -> None:
    assert reason in refused(tmp_path, text=text)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["nowhere:app"], "there is no module 'nowhere'"),
        (["filter.py:app"], "is a file, and a module is wanted"),
        ([":app"], "names no filter"),
        (["thefilter:app", "--user", "no-such-user"], "there is no user 'no-such-user'"),
        (["thefilter:app", "--pidfile", "/no/such/directory/pid"], "cannot write the pidfile"),
        (["thefilter:app", "--socket", "tcp:3000"], "'tcp' is unknown"),
    ],
)
def test_wrong_arguments_are_told(tmp_path: Path, arguments: list[str], reason: str) -> None:
    (tmp_path / "thefilter.py").write_text(FILTER)
    where = [] if "--socket" in arguments else ["--socket", f"unix:{tmp_path}/s"]
    with FilterProcess("-m", "milter", "run", *arguments, *where, directory=tmp_path) as process:
        assert process.wait() == 1
        assert reason in process.stderr.text
        assert "Traceback" not in process.stderr.text


def test_a_failing_on_stop_is_told(run: Any) -> None:
    process = run(text=FILTER.replace('say("stop")', 'raise ValueError("not closed")'))
    process.version()
    process.signal(signal.SIGTERM)
    assert process.wait() == 70
    assert "ValueError: not closed" in process.stderr.text


# ---- Workers that die


def test_a_killed_worker_is_replaced_and_nobody_is_refused(run_until_ready: Any) -> None:
    process = run_until_ready()
    for number in range(3):
        worker = process.worker()
        os.kill(worker, signal.SIGKILL)
        assert process.worker() != worker  # whoever calls meanwhile waits in the socket's queue
        process.starts(number + 2)
    assert process.log.text.count("was killed by SIGKILL") == 3


def test_only_the_messages_of_a_killed_worker_fail(run_until_ready: Any) -> None:
    process = run_until_ready("--workers", "2")
    clients = [process.greeted() for _ in range(12)]
    workers = [int(process.marks(client)["X-Worker"]) for client in clients]
    victim = workers[0]
    os.kill(victim, signal.SIGKILL)
    for client, worker in zip(clients, workers, strict=True):
        if worker == victim:
            with pytest.raises((WireError, OSError)):
                send_message(client)
        else:
            assert process.marks(client)["X-Worker"] == str(worker)
        client.close()


def test_when_no_worker_lives_it_gives_up_and_says_so(tmp_path: Path) -> None:
    deadly = FILTER + "\n@app.on_helo\ndef die(ctx, name):\n    os._exit(3)\n"
    (tmp_path / "thefilter.py").write_text(deadly)
    impatient = "from milter import supervisor, cli; supervisor._FIRST_DELAY = 1e-6; raise SystemExit(cli.main())"
    arguments = ["run", "thefilter:app", "--socket", f"unix:{tmp_path}/s"]
    with contextlib.ExitStack() as stack:
        with until_ready(tmp_path) as environment:
            process = stack.enter_context(
                FilterProcess("-c", impatient, *arguments, directory=tmp_path, environment=environment)
            )
        address = process.socket
        with contextlib.suppress(MilterError):  # until nobody listens there any more
            while True:
                with contextlib.closing(Client.connect(address)) as client, contextlib.suppress(WireError, OSError):
                    client.negotiate()
                    client.connect_info()
                    client.helo()
        assert process.wait() == 70
        assert "no worker lives: 10 in a row have ended at once; giving up" in process.log.text
        assert process.log.text.count("ended with code 3") == 10


# ---- Reload


def test_a_reload_takes_new_code_and_lets_old_messages_end(run: Any) -> None:
    process = run("--workers", "2")
    process.starts(2)
    old = process.greeted()
    begin_message(old)
    process.write(FILTER.replace('VERSION = "1"', 'VERSION = "two"'))
    process.reload()
    process.log.wait_for("was loaded again: 2 new workers serve")
    process.log.wait_for("the end of open connections")
    process.stdout.wait_for("stop 1")  # neither of the old ones accepts connections now
    assert {process.version() for _ in range(8)} == {"two"}
    end = send_content(old)
    assert next(event.value for event in end.events if isinstance(event, AddHeader)) == "1"
    old.quit()
    process.stdout.wait_for_count("stop 1", 2)
    assert process.stdout.lines.index("start two") < process.stdout.lines.index("stop 1")


@pytest.mark.parametrize("broken", ["x = (", "raise ValueError('no')", "import os\nos._exit(7)"])
def test_a_version_that_does_not_start_harms_nobody(run: Any, broken: str) -> None:
    process = run("--workers", "2")
    process.starts(2)
    process.write(broken)
    process.reload()
    process.log.wait_for("its new version does not start. The old one goes on")
    assert process.version() == "1"
    worker = process.worker()
    process.write(FILTER.replace('VERSION = "1"', 'VERSION = "3"'))
    process.reload()
    process.log.wait_for("was loaded again: 2 new workers serve")
    process.stdout.wait_for_count("stop 1", 2)
    assert process.version() == "3"
    assert process.worker() != worker


def test_a_reload_asked_for_during_another_one_is_not_forgotten(run: Any) -> None:
    process = run()
    process.starts(1)
    gate = process.directory / "gate"
    os.mkfifo(gate)
    process.write(FILTER.replace('VERSION = "1"', f'VERSION = "2"\nopen({str(gate)!r}).read()'))
    process.reload()
    with gate.open("w"):  # opened once the new worker waits there
        process.write(FILTER.replace('VERSION = "1"', 'VERSION = "three"'))
        process.reload()
    process.log.wait_for_count("was loaded again: 1 new workers serve", 2)
    process.stdout.wait_for("stop 2")
    assert process.version() == "three"


def test_no_message_is_lost_by_reloads(run: Any) -> None:
    process = run("--workers", "2")
    process.starts(2)
    over = threading.Event()
    failures: list[str] = []
    counts = [0, 0, 0, 0]

    def load(index: int) -> None:
        while not over.is_set():
            try:
                process.marks()
            except (AssertionError, MilterError, OSError) as failure:
                failures.append(repr(failure))
            counts[index] += 1

    threads = [threading.Thread(target=load, args=[index]) for index in range(len(counts))]
    for thread in threads:
        thread.start()
    for number in range(6):
        process.reload()
        process.log.wait_for_count("was loaded again: 2 new workers serve", number + 1)
    over.set()
    for thread in threads:
        thread.join(PATIENCE)
    assert failures == []
    assert min(counts) > 0


# ---- Who, where, and who is told


def test_the_pidfile_has_the_supervisors_number_and_goes(run: Any, tmp_path: Path) -> None:
    process = run("--pidfile", str(tmp_path / "pid"))
    process.starts(1)
    assert (tmp_path / "pid").read_text() == f"{process.pid}\n"
    process.stop()
    assert not (tmp_path / "pid").exists()


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """A directory that other users can read. pytest's own ones are closed to them, again with each run that starts."""
    with tempfile.TemporaryDirectory(prefix="milter-") as directory:
        Path(directory).chmod(0o755)
        yield Path(directory)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_privileges_are_dropped_for_good_before_code_of_the_filter_runs(open_directory: Path) -> None:
    text = FILTER + (
        'print("ids", os.getresuid(), os.getresgid(), os.getgroups(), os.environ["USER"], flush=True)\n'
        "try:\n    os.setuid(0)\nexcept PermissionError:\n    print('never root again', flush=True)\n"
    )
    with Running(open_directory, "--user", "nobody", "--group", "daemon", "--mode", "640", text=text) as process:
        user, group = 65534, 1
        ids = process.stdout.wait_for("ids ")
        assert ids == f"ids ({user}, {user}, {user}) ({group}, {group}, {group}) [{group}] nobody"
        process.stdout.wait_for("never root again")
        found = (open_directory / "s").stat()
        assert (found.st_uid, found.st_gid, found.st_mode & 0o777) == (user, group, 0o640)
        process.starts(1)


def test_systemd_is_told(run: Any, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(PATIENCE)
        process = run("--workers", "2", environment={"NOTIFY_SOCKET": str(tmp_path / "notify")})
        assert manager.recv(100) == b"READY=1\n"
        process.starts(2)
        process.reload()
        assert re.fullmatch(rb"RELOADING=1\nMONOTONIC_USEC=\d+\n", manager.recv(100))
        assert manager.recv(100) == b"READY=1\n"
        process.write("x = (")
        process.reload()
        assert manager.recv(100).startswith(b"RELOADING=1")
        assert manager.recv(100) == b"READY=1\n"
        process.signal(signal.SIGTERM)
        assert manager.recv(100) == b"STOPPING=1\n"
        assert process.wait() == 0


def test_a_socket_that_systemd_passes(tmp_path: Path) -> None:
    (tmp_path / "thefilter.py").write_text(FILTER)
    with socket.socket(socket.AF_UNIX) as passed:
        passed.bind(str(tmp_path / "activated"))
        passed.listen()
        launcher = (
            f"import os; os.dup2({passed.fileno()}, 3); "
            "os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='1'); "
            "from milter import cli; raise SystemExit(cli.main())"
        )
        arguments = ["-c", launcher, "run", "thefilter:app"]
        with FilterProcess(*arguments, directory=tmp_path, descriptors=[passed.fileno()]) as process:
            process.log.wait_for("is listening on fd:3")
            client = Client.connect(f"unix:{tmp_path}/activated")
            client.negotiate()
            client.connect_info()
            client.helo()
            assert send_message(client).answer.verdict is Verdict.CONTINUE
            client.close()
        assert (tmp_path / "activated").exists()


# ---- What is told of the mail


def test_the_log_is_json_with_a_line_for_each_message(run: Any) -> None:
    process = run("--access-log", "--log-format", "json")
    worker = process.worker()
    process.stop()
    entries = [json.loads(line) for line in process.stderr.lines]
    (access,) = [entry for entry in entries if entry["logger"] == "milter.access"]
    assert (access["pid"], access["level"], access["verdict"]) == (worker, "INFO", "accept")
    assert (access["sender"], access["actions"]) == ("ann@client.example", {"add_header": 2})


def test_a_log_level(run: Any) -> None:
    process = run("--log-level", "warning")
    process.version()
    process.stop()
    assert process.stderr.text == ""


def test_metrics_are_those_of_all_workers(run: Any, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    process = run("--workers", "2", "--metrics", str(port), environment={"TMPDIR": str(tmp_path)})
    process.starts(2)
    clients = [process.greeted() for _ in range(8)]
    for client in clients:
        process.marks(client)
    figures = scraped(port)
    assert figures['milter_messages_total{verdict="accept"}'] == "8.0"
    assert figures["milter_open_connections"] == "8.0"
    for client in clients:
        client.quit()
        client.close()
    process.reload()
    process.stdout.wait_for_count("stop 1", 2)
    process.version()
    assert scraped(port)['milter_messages_total{verdict="accept"}'] == "9.0"
    process.stop()
    assert list(tmp_path.glob("milter-metrics-*")) == []
    with pytest.raises(OSError, match="refused"):
        scraped(port)


@needs_proc
def test_the_process_that_tells_the_metrics_is_replaced(run: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    process = run("--metrics", str(port))
    worker = process.worker()
    (companion,) = [child for child in children(process.pid) if child != worker]
    os.kill(companion, signal.SIGKILL)
    process.stderr.wait_for(f"the process beside the workers, {companion}, was killed by SIGKILL; its place is taken")
    assert scraped(port)['milter_messages_total{verdict="accept"}'] == "1.0"
    process.stop()
    with pytest.raises(OSError, match="refused"):
        scraped(port)


@needs_proc
def test_a_process_of_metrics_that_cannot_live_is_given_up(run: Any) -> None:
    process = run("--metrics", "0")
    worker = process.worker()
    for death in range(1, 11):
        (companion,) = [child for child in children(process.pid) if child != worker]
        os.kill(companion, signal.SIGKILL)
        process.stderr.wait_for_count("was killed by SIGKILL", death)
    assert process.stderr.text.count("its place is taken") == 9
    assert process.stderr.text.count("it is not started again") == 1
    assert children(process.pid) == [worker]
    process.version()
    process.stop()


def children(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def scraped(port: int) -> dict[str, str]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=PATIENCE) as answer:
        lines = answer.read().decode().splitlines()
    figures = [line.rsplit(" ", 1) for line in lines if not line.startswith("#")]
    return {name: value for name, value in figures}  # noqa: C416  (mypy knows no pairs in lists)


@needs_proc
def test_a_system_without_descriptors_for_a_worker(run_until_ready: Any) -> None:
    process = run_until_ready("--workers", "2")
    most = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
    first, second = children(process.pid)
    resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (3, most[1]))  # and no new one: that is their number
    os.kill(first, signal.SIGKILL)
    process.stderr.wait_for("a worker cannot be started: Too many open files")
    assert process.worker() == second
    resource.prlimit(process.pid, resource.RLIMIT_NOFILE, most)
    process.starts(3)
    assert len(children(process.pid)) == 2
    process.stop()


# ---- app.run(workers=…)


def test_run_of_the_app_has_workers_too(tmp_path: Path) -> None:
    script = tmp_path / "thefilter.py"
    script.write_text(
        FILTER
        + f"\nif __name__ == '__main__':\n    app.run('unix:{tmp_path}/s', workers=2)\n"
        + "    print('returned', flush=True)\n"
    )
    with FilterProcess(script, directory=tmp_path) as process:
        process.log.wait_for_count(" is listening on ", 2)
        process.signal(signal.SIGHUP)
        process.log.wait_for("was loaded again: 2 new workers serve")
        process.signal(signal.SIGTERM)
        assert process.wait() == 0
    assert process.stdout.lines[-1] == "returned"
    assert process.stdout.lines.count("stop 1") == 4


# A supervisor that is so late that it hears of each death before it hears what the worker said.
LATE = """
import threading

from milter import supervisor


def wait_for_a_death(self):
    os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)


supervisor.Supervisor._look = wait_for_a_death


def ask_until_it_stops():
    while True:
        app.stop()


@app.on_start
def leave():
    threading.Thread(target=ask_until_it_stops, daemon=True).start()
"""


def test_the_last_words_of_a_worker_are_heard_after_its_death(tmp_path: Path) -> None:
    running = f"\nif __name__ == '__main__':\n    app.run('unix:{tmp_path}/s', workers=2)\n"
    script = tmp_path / "thefilter.py"
    script.write_text(FILTER + LATE + running)
    with FilterProcess(script, directory=tmp_path) as process:
        assert process.wait() == 0
    assert process.stdout.lines == ["start 1", "start 1", "stop 1", "stop 1"]
    assert "worker" not in process.log.text


def test_systemd_is_told_at_an_abstract_address(run: Any) -> None:
    name = f"milter-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(f"\0{name}")
        manager.settimeout(PATIENCE)
        run(environment={"NOTIFY_SOCKET": f"@{name}"})
        assert manager.recv(100) == b"READY=1\n"


def test_a_pidfile_that_became_somebody_else_s_is_left_alone(run: Any, tmp_path: Path) -> None:
    process = run("--pidfile", str(tmp_path / "pid"))
    process.starts(1)
    (tmp_path / "pid").write_text("1\n")
    process.stop()
    assert (tmp_path / "pid").read_text() == "1\n"


def test_ctrl_c_while_the_filter_is_imported_is_no_fault_of_the_filter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "interrupted.py").write_text("raise KeyboardInterrupt\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        load("interrupted:app")


@pytest.mark.parametrize(
    ("code", "told"),
    [(0, "ended with code 0"), (-9, "was killed by SIGKILL"), (-40, "was killed by signal 40")],
)
def test_the_end_of_a_worker_is_told_in_words(code: int, told: str) -> None:
    assert _how(code) == told
