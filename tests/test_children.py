# SPDX-License-Identifier: GPL-3.0-or-later
"""Handlers that fork: their children have nothing of the filter, and each message has its own verdict.

Real processes on the real libmilter; what the filter's handlers do is told in filters/forking.py.
``MILTER_FORKING_MESSAGES`` sets the number of messages of the long test; many need ``--timeout 0``.
"""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from milter.listener import connect
from milter.testing import Client
from tests.filter_process import PATIENCE, REPOSITORY, FilterProcess
from tests.test_supervisor import Running

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="the tests read /proc")

# What a child does, and what its parent's handler answers: mostly the exit code.
ACTS = {
    "return": "0",
    "raise": "1",
    "exit": "3",
    "exit-well": "0",
    "exit-text": "1",
    "leave": "4",
    "again": "0",
    "exec": "0",
    "print": "0",
    "terminal": "5",
    "handlers": "0",
    "terminate": "-15",
    "pool-fork": "[2, 4]",
    "pool-spawn": "[2, 4]",
    "pool-forkserver": "[2, 4]",
    "executor-fork": "[2, 4]",
    "executor-forkserver": "[2, 4]",
    "thread": "[0]",
    "subprocess": "1",
    "preexec": "1",
    "system": "6",
    "spawn": "1",
    "status": "0000000000000000",
    "descriptors": "0",
}


def forking(socket: str, *arguments: str) -> FilterProcess:
    # Python 3.12 and newer warn of each fork of a process with threads.
    return FilterProcess("-W", "ignore::DeprecationWarning", "tests/filters/forking.py", socket, *arguments)


def greeted(process: FilterProcess) -> Client:
    client = Client.connect(process.socket, timeout=PATIENCE)
    client.negotiate()
    client.connect_info()
    client.helo()
    return client


def said(client: Client, address: str) -> str:
    """The text that a handler has answered MAIL with."""
    return str(client.mail(f"<{address}@client.example>")).removeprefix("550 5.7.1 ")


def said_by_coroutine(client: Client, address: str) -> str:
    client.mail("<pass@client.example>")
    return str(client.rcpt(f"<{address}@client.example>")).removeprefix("550 5.7.1 ")


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("handlers", ["plain", "coroutines"])
def test_whatever_a_child_does_each_message_has_its_own_verdict(handlers: str, act: str) -> None:
    ask = said_by_coroutine if handlers == "coroutines" else said
    with forking("inet:0@127.0.0.1", handlers) as process, greeted(process) as client, greeted(process) as other:
        for number in range(3):
            assert ask(client, f"nothing.before{number}") == f"before{number} None"
            assert ask(client, f"{act}.during{number}") == f"during{number} {ACTS[act]}"
            assert ask(client, f"nothing.after{number}") == f"after{number} None"
            assert ask(other, f"nothing.other{number}") == f"other{number} None"
        assert zombies_of(process.pid) == []
    written = {"exit-text": "the child gives up"} | dict.fromkeys(("raise", "again"), "FileNotFoundError")
    assert process.stderr.text.count(written.get(act, "Traceback")) == (3 if act in written else 0)
    assert process.stdout.text.count("the child has written this") == (3 if act == "print" else 0)
    assert "failed in" not in process.log.text


def zombies_of(process: int) -> list[str]:
    tasks = Path(f"/proc/{process}/task")
    children = [child for task in tasks.glob("*/children") for child in task.read_text().split()]
    return [child for child in children if is_zombie(child)]


def is_zombie(process: str) -> bool:
    try:
        return "State:\tZ" in Path(f"/proc/{process}/status").read_text()
    except OSError:  # it was waited for meanwhile
        return False


def test_handlers_that_come_next_do_not_run_in_a_child() -> None:
    with forking("inet:0@127.0.0.1") as process, greeted(process) as client:
        assert said(client, "next.x") == "continue"
        assert said(client, "nothing.after") == "after None"
    assert process.stdout.text.count("the next handler") == 1


def test_a_child_cannot_use_a_context() -> None:
    with forking("inet:0@127.0.0.1") as process, greeted(process) as client:
        assert said(client, "context") == "1"
        assert said(client, "nothing.after") == "after None"
    assert "impossible in a forked child" in process.stderr.text


def test_a_child_of_a_coroutine_cannot_go_on_with_the_loop() -> None:
    with forking("inet:0@127.0.0.1", "coroutines") as process, greeted(process) as client:
        assert said_by_coroutine(client, "await") == "await 1"
        assert said_by_coroutine(client, "task") == "task 3"
        assert said_by_coroutine(client, "nothing.after") == "after None"
    assert "the event loop is the parent's" in process.stderr.lines[-1]


def test_children_of_handlers_that_do_not_reply_of_hooks_and_of_signals_end_as_well() -> None:
    with forking("inet:0@127.0.0.1", "everywhere", "on_start=exit") as process:
        with greeted(process) as client:
            client.mail("<pass@client.example>")
            client.abort()
            client.quit()
            client.wait_for_close()
        process.stderr.wait_for_count("at the side: 1", 3)
        process.signal(signal.SIGUSR1)
        assert process.stdout.wait_for("of a signal") == "of a signal: 7"
    assert process.stdout.lines[0] == "on_start: 3"
    assert process.stderr.text.count("at the side: 1") == 4
    assert process.log.text.count("is listening") == 1


@pytest.mark.parametrize("act", ["return", "raise", "terminate", "pool-fork", "pool-forkserver", "pool-spawn"])
def test_children_of_on_start_end_as_well(act: str) -> None:
    with forking("inet:0@127.0.0.1", f"on_start={act}") as process, greeted(process) as client:
        assert said(client, "nothing.after") == "after None"
    assert f"on_start: {ACTS[act]}" in process.stdout.lines
    assert process.log.text.count("is listening") == 1


def test_a_daemonic_process_does_not_keep_the_filter_from_ending() -> None:
    with forking("inet:0@127.0.0.1") as process, greeted(process) as client:
        assert said(client, "daemonic.x") == "x begun"


IMPORT = """
import multiprocessing, os, sys, time
from milter import Context, Milter, Status

child = os.fork()
if child == 0:
    {act}
else:
    os.write(1, b"child: %d\\n" % os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(1000,))
    process.start()
    process.terminate()
    process.join()
    os.write(1, b"process: %d\\n" % process.exitcode)

app = Milter("importing")
app.on_mail(lambda ctx, sender, params: Status.REJECT)
"""


@pytest.mark.parametrize(("act", "code"), [("pass", 0), ("sys.exit(3)", 3), ("1 / 0", 1), ("os._exit(4)", 4)])
def test_children_of_a_module_that_is_imported_end_as_well(tmp_path: Path, act: str, code: int) -> None:
    with Running(tmp_path, text=IMPORT.format(act=act)) as process:
        assert process.stdout.wait_for("child") == f"child: {code}"
        assert process.stdout.wait_for("process") == "process: -15"
        with greeted(process) as client:
            assert str(client.mail("<ann@client.example>")) == "reject"
    assert process.log.text.count("is listening") == 1


# ---- A child that lives longer


@pytest.mark.parametrize("where", ["inet:0@127.0.0.1", "inet:0", "inet6:0@::1", "unix"])
def test_a_child_that_lives_on_holds_no_connection_no_listener_and_no_bell(where: str, tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        process = stack.enter_context(forking(f"unix:{tmp_path}/s" if where == "unix" else where))
        client, other = greeted(process), greeted(process)
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)
        child = int(said(client, f"live:{os.fsencode(pipe).hex()}.x").split()[1])
        stack.callback(os.kill, child, signal.SIGKILL)
        stack.callback(os.close, os.open(pipe, os.O_WRONLY))  # once the child has given up the filter's output
        for caller in (client, other):
            caller.quit()
            caller.wait_for_close()
            caller.close()
        assert sockets_of(child) == [], "no connection, and no listener"
        assert len(set(files_of(child, "pipe:"))) <= 1, "no bell, and no log; but libmilter's own"
        assert not is_zombie(str(child))
        process.stop()
        with pytest.raises(Exception, match="cannot connect"):
            connect(process.socket, PATIENCE)
        again = stack.enter_context(forking(process.socket))
        assert said(greeted(again), "nothing.again") == "again None"


def sockets_of(process: int) -> list[str]:
    return files_of(process, "socket:")


def files_of(process: int, kind: str) -> list[str]:
    found = []
    for link in Path(f"/proc/{process}/fd").iterdir():
        with contextlib.suppress(OSError):
            found.append(os.readlink(link))
    return [name for name in found if name.startswith(kind)]


LIVING = """
import contextlib, os, sys, time
from milter import Milter, Reply

app = Milter("living")

@app.on_mail
def mail(ctx, sender, params):
    child = os.fork()
    if child:
        return Reply(550, "5.7.1", str(child))
    outputs = {os.fstat(number)[1:3] for number in (1, 2, int(sys.modules["sitecustomize"]._DESCRIPTOR))}
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):
            if number < 3 or os.fstat(number)[1:3] in outputs:  # the streams of `milter run` have their own
                os.dup2(nothing, number)
    time.sleep(1000)
"""


def test_a_child_of_a_worker_holds_neither_the_metrics_nor_their_process(tmp_path: Path) -> None:
    pytest.importorskip("prometheus_client")
    port = free_port()
    with Running(tmp_path, "--metrics", str(port), text=LIVING) as process:
        child = int(str(greeted(process).mail("<fork@client.example>")).split()[-1])
        try:
            assert sockets_of(child) == []
            process.stop()
            with socket.create_server(("127.0.0.1", port)):
                assert not is_zombie(str(child))
        finally:
            os.kill(child, signal.SIGKILL)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


BUSY_OUTPUT = """
import os, sys, threading
import milter.children
from tests.filters.forking import code_of

def read_on():
    while True:
        os.read(reader, 65536)

reader, writer = os.pipe()
number = int(sys.argv[1])
os.dup2(writer, number)
stream = open(number, "w", buffering=1 if number == 2 else -1)
setattr(sys, ["stdin", "stdout", "stderr"][number], stream)
thread = threading.Thread(target=stream.write, args=("x" * 100000,))  # more than the pipe takes
thread.start()
assert os.read(reader, 1000) == b"x" * 1000  # so it is at it
child = os.fork()
if child == 0:
    os.set_blocking(reader, False)
    try:
        while os.read(reader, 65536):
            pass
    except BlockingIOError:
        stream.write("from the child\\n")
        stream.flush()
        os.set_blocking(reader, True)
        seen = b""
        while b"from the child\\n" not in seen:  # what the parent's thread writes meanwhile may be before it
            seen += os.read(reader, 65536)
        os._exit(0)
code = code_of(child)
os.set_blocking(reader, True)
threading.Thread(target=read_on, daemon=True).start()  # until the other one has written all, and nothing comes any more
thread.join()
os._exit(code)
"""


@pytest.mark.parametrize("number", [1, 2])
def test_a_child_writes_whatever_another_thread_was_writing(number: int) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", BUSY_OUTPUT, str(number)]
    done = subprocess.run(command, env=environment, cwd=REPOSITORY, check=False, timeout=PATIENCE)
    assert done.returncode == 0


# ---- Very many messages

MESSAGES = int(os.environ.get("MILTER_FORKING_MESSAGES", "400"))
CONNECTIONS = 8
ON_ONE_CONNECTION = 25  # libmilter, linked as it is, lets a session wait behind others that never pause

# How often, among a thousand, each act comes; and what is answered.
MIXTURE = {"nothing": 300, "return": 150, "raise": 150, "exit": 80, "leave": 80, "again": 40, "print": 40}
MIXTURE |= {"exit-text": 20, "thread": 20, "subprocess": 40, "preexec": 5, "system": 10, "terminate": 20, "fail": 20}
MIXTURE |= {"pool-fork": 2, "executor-fork": 2, "exec": 1}
ANSWERS = ACTS | {"nothing": "None"}


def said_at_end(client: Client, act: str) -> str:
    client.mail("<pass@client.example>")
    client.rcpt("<bob@mta.example>")
    client.data()
    client.header("Subject", f"{act}@client.example")
    client.eoh()
    client.body(b"text\r\n")
    return str(client.end_of_message().answer).removeprefix("550 5.7.1 ")


def wrong_verdicts(process: FilterProcess, asks: Sequence[Callable[[Client, str], str]], first: int) -> list[str]:
    """Send many messages, some on each connection; the answers that do not belong to them."""
    randomly = random.Random(first)
    numbers = range(first, MESSAGES, CONNECTIONS)
    wrong = []
    for start in range(0, len(numbers), ON_ONE_CONNECTION):
        with greeted(process) as client:
            for number in numbers[start : start + ON_ONE_CONNECTION]:
                act = randomly.choices(list(MIXTURE), list(MIXTURE.values()))[0]
                answer = randomly.choice(asks)(client, f"{act}.token{number}")
                if answer != ("tempfail" if act == "fail" else f"token{number} {ANSWERS[act]}"):
                    wrong.append(f"{act} {number}: {answer}")
            client.quit()
            client.wait_for_close()
    return wrong


@pytest.mark.parametrize("handlers", ["plain", "coroutines"])
def test_of_very_many_messages_each_has_its_own_verdict(handlers: str) -> None:
    asks = [said, said_at_end, *([said_by_coroutine] if handlers == "coroutines" else [])]
    with forking("inet:0@127.0.0.1", handlers) as process, ThreadPoolExecutor(CONNECTIONS) as pool:
        client = greeted(process)
        assert said(client, "pool-fork.first") == "first [2, 4]"
        before = descriptors_of(process.pid)
        done = [pool.submit(wrong_verdicts, process, asks, first) for first in range(CONNECTIONS)]
        assert [line for future in done for line in future.result()] == []
        assert zombies_of(process.pid) == []
        assert said(client, "nothing.last") == "last None"
        assert len(descriptors_of(process.pid)) == len(before)
        client.close()


def descriptors_of(process: int) -> list[str]:
    return os.listdir(f"/proc/{process}/fd")


# ---- As process 1

ORPHANS = """
import os, signal, sys
from milter import Context, Milter, Reply

app = Milter("orphans", on_error="shutdown")

@app.on_mail
def mail(ctx, sender, params):
    if sender.startswith("fail"):
        raise RuntimeError("no more")
    for _ in range(5):
        child = os.fork()
        if child == 0:
            if os.fork() == 0:
                os._exit(0)
            os._exit(os.getpid() % 100)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == child % 100
    return Reply(550, "5.7.1", str(os.getpid()))

if __name__ == "__main__":
    app.run(sys.argv[1])
"""


class InContainer(FilterProcess):
    """A filter that is process 1."""

    def __init__(self, directory: Path, *arguments: str) -> None:
        (directory / "thefilter.py").write_text(ORPHANS)
        python = [sys.executable, "-W", "ignore::DeprecationWarning"]
        command = ["unshare", "--kill-child", "--pid", "--fork", "--mount-proc", *python, *arguments]
        # Isolated: the Python that is process 1 takes the library's log, no other.
        super().__init__("-I", "-c", f"import os; os.execvp('unshare', {command})", directory=directory)

    def first(self) -> int:
        """Its number outside of the container."""
        return int(Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text())

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.first(), number)


needs_container = pytest.mark.skipif(
    subprocess.run(
        ["unshare", "--kill-child", "--pid", "--fork", "--mount-proc", "true"], check=False, capture_output=True
    ).returncode
    != 0,
    reason="no process of one's own namespace can be had",
)

COMMANDS = [["thefilter.py"], ["-m", "milter", "run", "thefilter:app", "--socket"]]


@needs_container
@pytest.mark.parametrize("command", COMMANDS)
def test_as_process_1_it_waits_for_orphans_and_takes_no_exit_code_from_others(
    command: list[str], tmp_path: Path
) -> None:
    with InContainer(tmp_path, *command, f"unix:{tmp_path}/s") as process, greeted(process) as client:
        served_by = {said(client, "fork") for _ in range(20)}
        assert len(served_by) == 1
        assert served_by != {"1"}
        limit = time.monotonic() + PATIENCE
        while zombies_of(process.first()):  # they are waited for as they come
            assert time.monotonic() < limit, "zombies are left"
            os.sched_yield()
        client.quit()
    assert "failed" not in process.log.text


@needs_container
@pytest.mark.parametrize("command", COMMANDS)
def test_as_process_1_it_ends_with_the_exit_code_of_the_filter(command: list[str], tmp_path: Path) -> None:
    with InContainer(tmp_path, *command, f"unix:{tmp_path}/s") as process:
        with greeted(process) as client:
            client.mail("<fail@client.example>")
            client.quit()
        assert process.wait() == (1 if command == COMMANDS[0] else 70)


@needs_container
def test_as_process_1_it_tells_by_what_signal_the_filter_was_ended(tmp_path: Path) -> None:
    with InContainer(tmp_path, "thefilter.py", f"unix:{tmp_path}/s") as process:
        greeted(process).close()
        first = process.first()
        os.kill(int(Path(f"/proc/{first}/task/{first}/children").read_text()), signal.SIGKILL)
        assert process.wait() == 128 + signal.SIGKILL


@needs_container
def test_as_process_1_with_threads_it_says_what_it_cannot_do(tmp_path: Path) -> None:
    program = "import threading, thefilter; threading.Thread(target=threading.Event().wait, daemon=True).start();"
    with InContainer(tmp_path, "-c", f"{program} thefilter.app.run('unix:{tmp_path}/s')") as process:
        with greeted(process) as client:
            assert said(client, "fork") == "1"
        assert "cannot wait for orphans" in process.log.text
