# SPDX-License-Identifier: GPL-3.0-or-later
"""Starting, draining and stopping: real processes, real signals, and many runs in one process."""

import contextlib
import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from milter import EomContext, Milter, MilterError, SocketError, Status
from milter.libmilter import libmilter
from milter.testing import Client, PeerClosed, Verdict, WireError
from tests.conftest import Serve, begin_message, has_ipv6, send_content, send_message
from tests.filter_process import FilterProcess, RunFilter, running_filters
from tests.links import waits_with_select

SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]


@pytest.fixture
def run_filter() -> Iterator[RunFilter]:
    with running_filters() as run:
        yield run


def greeted(process: FilterProcess) -> Client:
    client = Client.connect(process.socket)
    client.negotiate()
    client.connect_info()
    client.helo()
    return client


# ---- Signals


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("spec", ["unix:{}/filter.sock", "inet:0@127.0.0.1", "inet6:0@::1"])
def test_a_signal_ends_an_idle_filter_with_exit_code_0(
    run_filter: RunFilter, tmp_path: Path, number: signal.Signals, spec: str
) -> None:
    if spec.startswith("inet6") and not has_ipv6():
        pytest.skip("this machine has no IPv6")
    process = run_filter("examples/client_addresses.py", spec.format(tmp_path))
    greeted(process).close()
    process.signal(number)
    assert process.wait() == 0
    assert process.stderr.text == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", SIGNALS)
def test_a_message_under_way_is_finished_and_nobody_new_is_served(
    run_filter: RunFilter, tmp_path: Path, number: signal.Signals
) -> None:
    process = run_filter("tests/filters/slow.py", f"unix:{tmp_path}/filter.sock")
    client = greeted(process)
    begin_message(client)
    client.header("Subject", "test")
    client.eoh()
    client.send(b"E")
    process.stdout.wait_for("at the end of a message")
    process.signal(number)
    process.log.wait_for("waiting up to 30 seconds for the end of open connections: 1")
    with pytest.raises(SocketError):
        Client.connect(f"unix:{tmp_path}/filter.sock")
    process.say("go on")
    assert [client.receive().letter for _ in range(2)] == [b"h", b"c"]
    client.quit()
    assert process.wait() == 0
    assert process.stdout.lines == ["at the end of a message", "stopped", "run() returned"]


def test_a_second_signal_ends_the_draining(run_filter: RunFilter) -> None:
    process = run_filter("tests/filters/slow.py", "inet:0@127.0.0.1", "3600")
    client = greeted(process)
    process.signal(signal.SIGTERM)
    process.log.wait_for("waiting up to 3600 seconds")
    process.signal(signal.SIGTERM)
    assert process.wait() == 0
    client.close()


def test_after_the_grace_open_connections_are_left_to_the_mta(run_filter: RunFilter) -> None:
    process = run_filter("tests/filters/slow.py", "inet:0@127.0.0.1", "0")
    client = greeted(process)
    begin_message(client)
    process.signal(signal.SIGTERM)
    assert process.wait() == 0
    with pytest.raises(WireError):
        send_content(client)


def test_a_handler_that_never_returns_does_not_keep_the_process_and_is_told_of(run_filter: RunFilter) -> None:
    process = run_filter("tests/filters/slow.py", "inet:0@127.0.0.1", "0")
    client = greeted(process)
    begin_message(client)
    client.send(b"E")
    process.stdout.wait_for("at the end of a message")
    process.signal(signal.SIGTERM)
    assert process.wait() == 70
    assert "handlers are still running" in process.log.text
    with pytest.raises(PeerClosed):
        client.receive()


@pytest.mark.parametrize("attempt", range(6))
def test_a_filter_ends_well_under_load(run_filter: RunFilter, attempt: int) -> None:
    process = run_filter("examples/guard.py", "inet:0@127.0.0.1")
    verdicts: list[Verdict] = []
    busy = threading.Barrier(5)

    def load() -> None:
        waited = False
        try:
            while True:
                client = greeted(process)
                verdicts.append(send_message(client).answer.verdict)
                client.close()
                if not waited:
                    busy.wait()
                    waited = True
        except (WireError, MilterError):
            pass

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    busy.wait()
    process.signal(SIGNALS[attempt % len(SIGNALS)])
    code = process.wait()
    for thread in threads:
        thread.join()
    assert code == 0, str(process)
    assert set(verdicts) == {Verdict.CONTINUE}


def test_a_process_that_a_handler_starts_can_be_terminated(run_filter: RunFilter) -> None:
    process = run_filter("tests/filters/children.py", "inet:0@127.0.0.1")
    client = greeted(process)
    client.close()
    assert process.stdout.wait_for("blocked") == "blocked in the child: []"


# ---- Hooks


def test_hooks_run_before_and_after_serving(run_filter: RunFilter) -> None:
    process = run_filter("tests/filters/hooks.py", "inet:0@127.0.0.1")
    assert process.stdout.lines == ["start"]
    process.stop()
    assert process.stdout.lines == ["start", "stop"]


def test_a_start_hook_that_raises_ends_the_start_and_leaves_no_socket(tmp_path: Path) -> None:
    with FilterProcess("tests/filters/hooks.py", f"unix:{tmp_path}/filter.sock", "start") as process:
        assert process.wait() == 1
        assert "RuntimeError: the database is gone" in process.stderr.text
        assert list(tmp_path.iterdir()) == []


def test_a_stop_hook_that_raises_is_told(run_filter: RunFilter) -> None:
    process = run_filter("tests/filters/hooks.py", "inet:0@127.0.0.1", "stop")
    process.signal(signal.SIGTERM)
    assert process.wait() == 1
    assert "RuntimeError: the database is gone" in process.stderr.text


def test_a_start_without_a_socket_is_one_clear_error(tmp_path: Path) -> None:
    with FilterProcess("examples/guard.py", f"unix:{tmp_path}/missing/filter.sock") as process:
        assert process.wait() == 1
        assert f"directory {tmp_path}/missing does not exist" in process.stderr.lines[-1]


def test_each_stop_hook_runs_in_reverse_order_whatever_the_others_raise(serve: Serve) -> None:
    app = Milter("test")
    calls: list[str] = []

    @app.on_stop
    def first() -> None:
        calls.append("first")

    @app.on_stop
    def second() -> None:
        calls.append("second")
        raise RuntimeError("the pool is gone")

    peer = serve(app)
    with pytest.raises(RuntimeError, match="the pool is gone"):
        peer.server.stop()
    assert calls == ["second", "first"]


def test_a_forked_child_leaves_the_filter_of_its_parent_alone(run_filter: RunFilter, tmp_path: Path) -> None:
    process = run_filter("tests/filters/forks.py", f"unix:{tmp_path}/filter.sock")
    assert process.stdout.wait_for("child ended") == "child ended with 0"
    assert "fork first, then start" in process.stdout.text
    greeted(process).close()
    process.stop()


# ---- Passed sockets


def test_systemd_may_pass_the_socket(tmp_path: Path) -> None:
    program = (
        "import os, sys; os.environ['LISTEN_PID'] = str(os.getpid());from milter import Milter; Milter('passed').run()"
    )
    with socket.socket() as passed:
        passed.bind(("127.0.0.1", 0))
        passed.listen()
        os.set_inheritable(passed.fileno(), True)

        def put() -> None:
            os.dup2(passed.fileno(), 3)

        process = subprocess.Popen(
            [sys.executable, "-c", program],
            env={**os.environ, "LISTEN_FDS": "1"},
            preexec_fn=put,
            close_fds=False,
        )
        client = Client.connect(f"inet:{passed.getsockname()[1]}@127.0.0.1")
        client.negotiate()
        client.close()
        process.terminate()
        assert process.wait() == 0


# ---- The shim alone


def test_a_shim_without_attached_callbacks_fails_closed(run_filter: RunFilter, tmp_path: Path) -> None:
    process = run_filter("tests/filters/unattached.py", f"unix:{tmp_path}/filter.sock")
    client = Client.connect(f"unix:{tmp_path}/filter.sock")
    client.negotiate()
    answer = client.connect_info()
    assert answer is not None
    assert answer.verdict is Verdict.TEMPFAIL
    process.say("end")
    process.wait()


CONTENT = ("data", "header", "eoh", "body", "unknown")
HANDLED = [c for n in range(len(CONTENT) + 1) for c in itertools.combinations(CONTENT, n)]


@pytest.mark.parametrize("handled", HANDLED, ids=lambda handled: "+".join(handled) or "none")
def test_no_command_is_dropped_whichever_stages_have_handlers(run_filter: RunFilter, handled: tuple[str, ...]) -> None:
    """In a process of its own: libmilter's table of states is changed for good by what is declined once."""
    client = greeted(run_filter("tests/filters/dead_ends.py", "inet:0@127.0.0.1", *handled))
    for unknown, header, body in itertools.product((False, True), repeat=3):
        client.unknown("FOO")
        client.mail("<ann>")
        client.rcpt("<bob>")
        if unknown:
            client.unknown("FOO")
        client.data()
        if header:
            client.header("Subject", "test")
        client.eoh()  # both MTAs say this always, also after no header and before no body
        if body:
            client.body(b"text\r\n")
        assert client.end_of_message().answer.verdict is Verdict.CONTINUE
    client.close()


# ---- Many runs in one process


def test_filters_run_one_after_the_other_in_one_process(tmp_path: Path) -> None:
    descriptors = []
    for number in range(10):
        app = Milter(f"number {number}")

        @app.on_eom
        def eom(ctx: EomContext, number: int = number) -> Status:
            ctx.add_header("X-Number", str(number))
            return Status.CONTINUE

        with app.start(f"unix:{tmp_path}/filter.sock") as server:
            client = Client.connect(server.socket)
            client.negotiate()
            client.connect_info()
            (change,) = send_message(client).changes
            assert change.value == str(number)  # type: ignore[union-attr]
            client.quit()
            client.wait_for_close()
            client.close()
        descriptors.append(len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0)
    assert len(set(descriptors[1:])) == 1, "no descriptor is left behind"
    assert list(tmp_path.iterdir()) == []


def test_two_filters_at_once_in_one_process_are_refused(serve: Serve, tmp_path: Path) -> None:
    serve(Milter("first"))
    with pytest.raises(MilterError, match="another filter is running in this process"):
        Milter("second").start(f"unix:{tmp_path}/second.sock")
    assert not (tmp_path / "second.sock").exists()


@pytest.mark.skipif(bool(libmilter.redirected), reason="libmilter does not see what kind of socket it is")
def test_another_kind_of_socket_needs_another_process(serve: Serve) -> None:
    serve(Milter("first")).server.stop()
    with pytest.raises(MilterError, match="needs another process"):
        Milter("second").start("inet:0@127.0.0.1")


def test_once_the_gate_is_closed_no_event_reaches_a_handler(serve: Serve) -> None:
    app = Milter("test")
    calls: list[str] = []
    app.on_mail(lambda ctx, sender, params: calls.append("mail"))
    app.on_rcpt(lambda ctx, recipient, params: calls.append("rcpt"))
    app.on_close(lambda ctx: calls.append("close"))
    peer = serve(app)
    client = peer.greeted()
    client.mail("<ann>")
    peer.server.stop(grace=0)
    answer = client.rcpt("<bob>")
    assert answer is not None
    assert answer.verdict is Verdict.TEMPFAIL
    assert client.end_of_message().answer.verdict is Verdict.TEMPFAIL
    client.quit()
    client.wait_for_close()
    assert calls == ["mail"]
    peer.server.engine._connections.clear()


def test_a_connection_after_the_stop_is_not_served(serve: Serve) -> None:
    peer = serve(Milter("test"))
    client = peer.client()
    client.negotiate()
    peer.server.stop(grace=0)
    with pytest.raises(SocketError):
        peer.client()
    client.close()
    peer.server.engine._connections.clear()


def test_run_outside_the_main_thread_is_refused() -> None:
    failures: list[BaseException] = []

    def run() -> None:
        with pytest.raises(MilterError, match="main thread") as caught:
            Milter("test").run("inet:0@127.0.0.1")
        failures.append(caught.value)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert len(failures) == 1


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"timeout": 0}, "timeout must be 1 or more"),
        ({"backlog": 0}, "backlog must be 1 or more"),
        ({"grace": -1}, "grace must be 0 or more"),
        ({"debug": -1}, "debug must be 0 or more"),
        ({"max_data_size": 1000}, "max_data_size must be 65535 or more"),
    ],
)
def test_an_option_out_of_range_is_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Milter("test").start("unix:unused", **options)


def test_an_unknown_option_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(TypeError, match=r"unknown options: workers_; there are access_log, backlog, debug, grace"):
        Milter("test").start("unix:unused", workers_=2)  # type: ignore[call-arg]


def test_a_server_that_was_never_started_says_so() -> None:
    from milter import Server

    server = Server(Milter("test"), "unix:unused")
    with pytest.raises(MilterError, match="not running"):
        _ = server.socket
    with pytest.raises(MilterError, match="never started"):
        server.stop()


def test_stopping_twice_is_fine(serve: Serve) -> None:
    peer = serve(Milter("test"))
    peer.server.stop()
    peer.server.stop()


# ---- Options and ends of their own


def test_a_stop_can_be_asked_for_by_a_handler(run_filter: RunFilter) -> None:
    process = run_filter("tests/filters/ends_itself.py", "inet:0@127.0.0.1", "stop")
    greeted(process).close()
    assert process.wait() == 0


@pytest.mark.skipif(waits_with_select(), reason="libmilter tries again for two minutes")
def test_libmilter_giving_up_is_an_error(run_filter: RunFilter) -> None:
    process = run_filter("tests/filters/ends_itself.py", "inet:0@127.0.0.1", "break")
    specification = process.socket
    greeted(process).close()
    with contextlib.suppress(SocketError):  # libmilter looks at its socket again, if it has not yet
        Client.connect(specification).close()
    assert process.wait() == 1
    assert "MilterError: libmilter has stopped serving" in process.stderr.lines[-1]


@pytest.mark.skipif(sys.platform != "linux", reason="how much stack threads get cannot be told here")
def test_handlers_have_enough_stack_where_threads_get_little(run_filter: RunFilter) -> None:
    process = run_filter("tests/filters/stacks.py", "inet:0@127.0.0.1")
    greeted(process).close()
    process.stop()
    assert int(process.stdout.lines[0]) >= 8 * 1024 * 1024 - 64 * 1024, "but for what the system takes of it"


def test_the_debug_level_shows_what_libmilter_does(run_filter: RunFilter) -> None:
    process = run_filter("tests/filters/options.py", "inet:0@127.0.0.1", "debug=6")
    greeted(process).close()
    process.stop()
    assert "got cmd 'H'" in process.stdout.text


def test_half_a_command_is_given_up_after_the_timeout(run_filter: RunFilter) -> None:
    process = run_filter("tests/filters/options.py", "inet:0@127.0.0.1", "timeout=1")
    client = greeted(process)
    client._socket.sendall(b"\0\0\0\x10M<ann")
    with pytest.raises(PeerClosed):
        client.receive()


def test_larger_packets_are_taken_on_demand(run_filter: RunFilter) -> None:
    process = run_filter("tests/filters/options.py", "inet:0@127.0.0.1", "max_data_size=1000000")
    client = greeted(process)
    client.mail("<ann>")
    client.rcpt("<bob>")
    client.data()
    assert client.header("X-Long", "x" * 200_000) is None
    answer = client.eoh()
    assert answer is not None
    assert answer.verdict is Verdict.CONTINUE
    assert process.stdout.wait_for("2") == "200000"
    client.close()


def test_many_connections_wait_to_be_accepted(run_filter: RunFilter) -> None:
    process = run_filter("tests/filters/options.py", "inet:0@127.0.0.1", "backlog=200")
    clients = [Client.connect(process.socket) for _ in range(200)]
    for client in clients:
        client.negotiate()
    for client in clients:
        client.close()


def test_asking_a_filter_to_stop_that_does_not_run_does_nothing(serve: Serve) -> None:
    app = Milter("test")
    app.stop()
    serve(app).server.stop()
    app.stop()
