# SPDX-License-Identifier: GPL-3.0-or-later
"""Figures for Prometheus: of one process, and of several summed up."""

import os
import re
import socket
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from milter import Context, Milter, MilterError, Reply, SocketError, Status, metrics
from milter.testing import Client
from tests.conftest import Serve, begin_message, send_content, send_message
from tests.filter_process import FilterProcess


def told(address: str | None) -> dict[str, float]:
    """The figures at an address, by name and labels."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    samples = (line.rpartition(" ") for line in lines if not line.startswith("#"))
    return {name: float(value) for name, _, value in samples}


def messages(figures: dict[str, float]) -> dict[str, float]:
    """How many there were, by verdict; only those that there were."""
    return labelled(figures, "milter_messages_total", "verdict")


def labelled(figures: dict[str, float], name: str, label: str) -> dict[str, float]:
    pattern = re.compile(rf'{name}{{{label}="(\w+)"}}')
    found = ((pattern.fullmatch(key), value) for key, value in figures.items())
    return {match[1]: value for match, value in found if match and value}


# ---- One process -----------------------------------------------------------------------------


def test_messages_are_counted_by_verdict(serve: Serve) -> None:
    app = Milter("test")
    verdicts: dict[str, Status | Reply] = {
        "accept": Status.ACCEPT,
        "continue": Status.CONTINUE,
        "reject": Reply(550, None, "no"),
        "discard": Status.DISCARD,
        "tempfail": Status.TEMPFAIL,
    }

    @app.on_mail
    def answer(ctx: Context, sender: str, params: object) -> Status | Reply:
        return verdicts[sender]

    peer = serve(app, metrics="0")
    client = peer.greeted()
    for name in verdicts:
        client.mail(name)
        client.abort()
    client.mail("continue")
    client.rcpt("<bob@mta.example>")
    client.data()
    send_content(client)
    figures = told(peer.server.metrics_address)
    assert messages(figures) == {"accept": 2, "reject": 1, "discard": 1, "tempfail": 1, "abort": 1}
    assert figures['milter_handler_seconds_count{stage="mail"}'] == 6


def test_without_an_access_log_nothing_is_written_to_it(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    send_message(serve(Milter("test"), metrics="0").greeted())
    assert [record for record in caplog.records if record.name == "milter.access"] == []


def test_a_verdict_that_there_was_none_of_is_told_as_0(serve: Serve) -> None:
    figures = told(serve(Milter("test"), metrics="0").server.metrics_address)
    for verdict in ("accept", "reject", "tempfail", "discard", "abort"):
        assert figures[f'milter_messages_total{{verdict="{verdict}"}}'] == 0
    assert figures['milter_handler_errors_total{stage="eom"}'] == 0


def test_handlers_that_raise_and_refused_connections_are_counted(serve: Serve) -> None:
    app = Milter("test")

    @app.on_helo
    def greet(ctx: Context, name: str) -> Status:
        if name == "broken":
            raise RuntimeError("no manners")
        return Status.REJECT if name == "liar" else Status.CONTINUE

    @app.on_data
    def watch(ctx: Context) -> None:
        raise RuntimeError("no eyes")

    peer = serve(app, metrics="0")
    for name in ("broken", "liar", "liar"):
        client = peer.client()
        client.negotiate()
        client.connect_info()
        client.helo(name)
    send_message(peer.greeted())
    figures = told(peer.server.metrics_address)
    assert labelled(figures, "milter_handler_errors_total", "stage") == {"helo": 1, "data": 1}
    assert labelled(figures, "milter_refused_connections_total", "verdict") == {"tempfail": 1, "reject": 2}
    assert messages(figures) == {"tempfail": 1}


def test_refused_recipients_are_counted_and_a_message_of_none_else_is_refused(serve: Serve) -> None:
    app = Milter("test")

    @app.on_rcpt
    def choose(ctx: Context, recipient: str, params: object) -> Status:
        return {"no@mta.example": Status.REJECT, "later@mta.example": Status.TEMPFAIL}.get(recipient, Status.CONTINUE)

    peer = serve(app, metrics="0")
    client = peer.greeted()
    for recipients in (["no"], ["no", "no"], ["no", "later"], ["no", "bob"], ["bob"]):
        client.mail("<ann@client.example>")
        for recipient in recipients:
            client.rcpt(f"<{recipient}@mta.example>")
        client.abort()
    client.mail("<ann@client.example>")
    client.rcpt("<no@mta.example>")
    client.rcpt("<bob@mta.example>")
    client.data()
    send_content(client)
    figures = told(peer.server.metrics_address)
    assert messages(figures) == {"reject": 2, "tempfail": 1, "abort": 2, "accept": 1}
    assert labelled(figures, "milter_refused_recipients_total", "verdict") == {"reject": 6, "tempfail": 1}


def test_how_long_handlers_took_is_told_for_stages_that_have_some(serve: Serve) -> None:
    app = Milter("test")
    app.on_header(lambda ctx, name, value: Status.CONTINUE)
    peer = serve(app, metrics="0")
    client = peer.greeted()
    begin_message(client)
    client.header("To", "bob")
    send_content(client)
    figures = told(peer.server.metrics_address)
    assert figures['milter_handler_seconds_count{stage="header"}'] == 2
    assert figures['milter_handler_seconds_bucket{le="+Inf",stage="header"}'] == 2
    assert figures['milter_handler_seconds_sum{stage="header"}'] > 0
    assert 'milter_handler_seconds_count{stage="eom"}' not in figures


def test_open_connections_are_right_without_python(serve: Serve) -> None:
    app = Milter("test")
    peer = serve(app, metrics="0")

    def count() -> float:
        return told(peer.server.metrics_address)["milter_open_connections"]

    assert count() == 0
    clients = [peer.client() for _ in range(3)]
    for client in clients:
        client.negotiate()
    assert count() == 3
    for left, client in enumerate(clients):
        client.quit()
        client.wait_for_close()
        peer.forget(client)
        assert count() == 2 - left


def test_a_filter_can_be_started_again_and_counts_anew(serve: Serve) -> None:
    peers = []
    for _ in range(2):
        peer = serve(Milter("test"), metrics="0")
        send_message(peer.greeted())
        figures = told(peer.server.metrics_address)
        assert messages(figures) == {"accept": 1}
        assert figures["milter_open_connections"] == 1
        peer.hang_up()
        peer.server.stop()
        peers.append(peer)
    assert peers[0].server.metrics_address != peers[1].server.metrics_address


def test_after_the_stop_nobody_answers(serve: Serve) -> None:
    peer = serve(Milter("test"), metrics="0")
    address = peer.server.metrics_address
    peer.server.stop()
    with pytest.raises(urllib.error.URLError, match="refused"):
        told(address)


def test_metrics_of_the_filters_own_are_told_too(serve: Serve) -> None:
    from prometheus_client import REGISTRY, Counter

    own = Counter("own_viruses", "Found")
    own.inc(3)
    try:
        peer = serve(Milter("test"), metrics="0")
        assert told(peer.server.metrics_address)["own_viruses_total"] == 3
    finally:
        REGISTRY.unregister(own)


# ---- The endpoint ----------------------------------------------------------------------------


def test_there_is_nothing_else_at_the_endpoint(serve: Serve) -> None:
    peer = serve(Milter("test"), metrics="127.0.0.1:0")
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"http://{peer.server.metrics_address}/other", timeout=30)


@pytest.mark.parametrize("path", ["/", "/metrics?name=milter_messages_total"])
def test_the_figures_are_found_under_other_names_too(serve: Serve, path: str) -> None:
    peer = serve(Milter("test"), metrics="0")
    with urllib.request.urlopen(f"http://{peer.server.metrics_address}{path}", timeout=30) as answer:
        assert b"milter_open_connections 0.0\n" in answer.read()


def test_a_failure_to_tell_is_an_error_of_the_server_and_logged(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(page: object) -> None:
        raise RuntimeError("no figures")

    peer = serve(Milter("test"), metrics="0")
    monkeypatch.setattr(metrics, "_opened", fail)
    with pytest.raises(urllib.error.HTTPError, match="500"):
        told(peer.server.metrics_address)
    assert "no figures" in caplog.text
    monkeypatch.undo()
    assert told(peer.server.metrics_address)["milter_open_connections"] == 0


def test_one_who_reads_nothing_holds_up_nobody(serve: Serve) -> None:
    peer = serve(Milter("test"), metrics="0")
    assert peer.server.metrics_address is not None
    host, _, port = peer.server.metrics_address.rpartition(":")
    with socket.create_connection((host, int(port))) as silent:
        assert told(peer.server.metrics_address)
        silent.setblocking(False)
        with pytest.raises(BlockingIOError):  # it was not waited for until its time was over
            silent.recv(1)


def test_without_a_host_only_this_machine_can_ask() -> None:
    with metrics.listen("0") as listener:
        assert listener.getsockname()[0] == "127.0.0.1"
        assert metrics.address_of(listener).startswith("127.0.0.1:")


@pytest.mark.parametrize("address", ["", ":9100", "host", "host:", "::1:9100", "host:65536", "1.2.3.4:x", "\u0663"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="is no address for metrics: write host:port"):
        metrics.listen(address)


def test_an_address_in_use_is_told_and_nothing_stays_open(tmp_path: Path) -> None:
    path = f"unix:{tmp_path}/filter.sock"
    app = Milter("test")
    with metrics.listen("0") as listener:
        address = metrics.address_of(listener)
        with pytest.raises(SocketError, match=f"metrics cannot be told on {address}: Address already in use"):
            app.start(path, metrics=address)
    with app.start(path, metrics="0") as server:
        assert told(server.metrics_address)


def test_a_start_that_fails_ends_the_endpoint_too(tmp_path: Path) -> None:
    app = Milter("test")

    @app.on_start
    def fail() -> None:
        raise RuntimeError("no database")

    with metrics.listen("0") as listener:
        address = metrics.address_of(listener)
    with pytest.raises(RuntimeError) as failure:
        app.start(f"unix:{tmp_path}/filter.sock", metrics=address)
    metrics.listen(address).close()
    assert failure.traceback  # which kept what was begun, so that nobody else has ended it


def test_without_the_package_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(MilterError, match=r"pip install 'milter-cffi\[prometheus\]'"):
        Milter("test").start(f"unix:{tmp_path}/filter.sock", metrics="0")
    with pytest.raises(MilterError, match=r"pip install 'milter-cffi\[prometheus\]'"), metrics.directory():
        pass


def test_without_a_directory_for_temporary_files_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    before = dict(os.environ)
    monkeypatch.setattr(tempfile, "tempdir", "/nonexistent")
    told = r"let TMPDIR name one that can be written \(No such file"
    with pytest.raises(MilterError, match=told), metrics.directory():
        pass
    assert os.environ == before


# ---- Several processes -----------------------------------------------------------------------


def greeted(path: Path) -> Client:
    client = Client.connect(f"unix:{path}")
    client.negotiate()
    client.connect_info()
    client.helo()
    return client


def test_the_figures_of_all_workers_are_summed_and_stay_when_one_dies(tmp_path: Path) -> None:
    sockets = [tmp_path / f"{number}.sock" for number in range(2)]
    with FilterProcess("tests/filters/counted.py", tmp_path, "2") as process:
        for path in sockets:
            process.log.wait_for(f"is listening on unix:{path}")
        address = process.stdout.wait_for("127.0.0.1:")
        directory = Path(process.stdout.wait_for("/milter-metrics-"))
        clients = [greeted(path) for path in sockets]
        for client in (clients[0], clients[0], clients[1]):
            send_message(client)
        figures = told(address)
        assert messages(figures) == {"accept": 3}
        assert figures['milter_handler_seconds_count{stage="eom"}'] == 3
        assert figures["own_messages_total"] == 3
        assert figures["milter_open_connections"] == 2

        process.say("1")
        process.stdout.wait_for("killed 1")
        figures = told(address)
        assert messages(figures) == {"accept": 3}
        assert figures["milter_open_connections"] == 1

        clients[0].quit()
        clients[0].wait_for_close()
        assert told(address)["milter_open_connections"] == 0
        assert directory.stat().st_mode & 0o777 == 0o700
        process.end_input()
        assert process.wait() == 0
        assert process.stdout.lines[-1] == "end"
        assert not directory.exists()
        for client in clients:
            client.close()


def test_the_directory_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    from prometheus_client import values

    before = values.ValueClass
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "/of/the/users")
    with metrics.directory() as directory:
        assert os.environ["PROMETHEUS_MULTIPROC_DIR"] == str(directory.path)
        assert values.ValueClass is not before
    assert os.environ["PROMETHEUS_MULTIPROC_DIR"] == "/of/the/users"
    assert values.ValueClass is before
    assert not directory.path.exists()


def test_figures_are_told_at_an_address_of_ipv6(serve: Serve) -> None:
    with socket.socket(socket.AF_INET6) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            pytest.skip("this machine has no IPv6")
    address = serve(Milter("test"), metrics="[::1]:0").server.metrics_address
    assert str(address).startswith("[::1]:")
    assert told(address)["milter_open_connections"] == 0


@pytest.mark.parametrize("address", ["::1:9100", "host:", "host:x", "host:65536", ":9100"])
def test_a_wrong_address_for_metrics_is_explained(address: str) -> None:
    with pytest.raises(ValueError, match="is no address for metrics"):
        metrics._host_and_port(address)
