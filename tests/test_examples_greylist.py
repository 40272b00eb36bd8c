# SPDX-License-Identifier: GPL-3.0-or-later
"""examples/greylist.py, with each store. Time is a number that the tests set."""

import multiprocessing
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import fakeredis
import pytest
import redis

from examples import greylist
from examples.greylist import Settings, SqliteStore, filter_with
from milter.testing import Envelope, Outcome, Transcript
from tests.conftest import Peer, Serve
from tests.example_filters import from_address, refusal, send

MESSAGE = b"Subject: x\n\nHi.\n"
START = 1_800_000_000.0


class Clock:
    now = START

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=["sqlite", "redis"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a store that is empty."""
    if request.param == "sqlite":
        yield str(tmp_path / "greylist.db")
        return
    server = fakeredis.FakeServer()
    monkeypatch.setattr(redis.Redis, "from_url", lambda url, **options: fakeredis.FakeRedis(server=server))
    yield "redis://greylist.example:6379/0"


def attempt(
    peer: Peer, address: str = "192.0.2.1", sender: str = "ann@client.example", recipient: str = "bob@mta.example"
) -> Transcript:
    return send(peer, MESSAGE, Envelope.of(sender, recipient), from_address(address))


def test_the_first_attempt_waits_and_a_later_one_passes(serve: Serve, store: str, clock: Clock) -> None:
    peer = serve(filter_with(Settings(store), clock))
    assert refusal(attempt(peer)) == "451 greylisted, try again in 300 seconds"
    clock.now += 299
    assert refusal(attempt(peer)) == "451 greylisted, try again in 1 seconds"
    clock.now += 1
    assert attempt(peer).outcome is Outcome.ACCEPTED


def test_who_came_back_is_known_whatever_it_sends(serve: Serve, store: str, clock: Clock) -> None:
    peer = serve(filter_with(Settings(store), clock))
    attempt(peer)
    clock.now += 300
    attempt(peer)
    assert attempt(peer, sender="eve@client.example").outcome is Outcome.ACCEPTED


def test_another_sender_recipient_or_network_waits_for_itself(serve: Serve, store: str, clock: Clock) -> None:
    peer = serve(filter_with(Settings(store), clock))
    attempt(peer)
    clock.now += 300
    others = [
        attempt(peer, sender="eve@client.example"),
        attempt(peer, recipient="carl@mta.example"),
        attempt(peer, "198.51.100.1"),
    ]
    assert ["in 300 seconds" in refusal(other) for other in others] == [True] * 3


@pytest.mark.parametrize(("first", "second"), [("192.0.2.1", "192.0.2.200"), ("2001:db8::1", "2001:db8::ffff:1")])
def test_another_machine_of_the_network_may_try_again(
    serve: Serve, store: str, clock: Clock, first: str, second: str
) -> None:
    peer = serve(filter_with(Settings(store), clock))
    attempt(peer, first)
    clock.now += 300
    assert attempt(peer, second, sender="Ann@Client.Example").outcome is Outcome.ACCEPTED


def test_a_refused_recipient_does_not_stop_the_others(serve: Serve, store: str, clock: Clock) -> None:
    peer = serve(filter_with(Settings(store), clock))
    attempt(peer, recipient="bob@mta.example")
    clock.now += 300
    both = Envelope.of("ann@client.example", "new@mta.example", "bob@mta.example")
    transcript = send(peer, MESSAGE, both, from_address("192.0.2.1"))
    assert [mailbox.address for mailbox in transcript.recipients] == ["bob@mta.example"]


def test_what_was_learned_outlives_the_filter(serve: Serve, store: str, clock: Clock) -> None:
    peer = serve(filter_with(Settings(store), clock))
    attempt(peer)
    peer.server.stop()
    clock.now += 300
    assert attempt(serve(filter_with(Settings(store), clock))).outcome is Outcome.ACCEPTED


@pytest.mark.parametrize("address", ["127.0.0.1", "10.1.2.3", "::1", "fd00::1"])
def test_private_addresses_do_not_wait(serve: Serve, store: str, address: str) -> None:
    assert attempt(serve(filter_with(Settings(store))), address).outcome is Outcome.ACCEPTED


def test_who_is_authenticated_does_not_wait(serve: Serve, store: str) -> None:
    session = from_address("192.0.2.1", auth_type="PLAIN")
    assert send(serve(filter_with(Settings(store))), MESSAGE, session=session).outcome is Outcome.ACCEPTED


def test_an_address_of_stray_bytes_can_be_remembered(serve: Serve, store: str, clock: Clock) -> None:
    peer = serve(filter_with(Settings(store), clock))
    attempt(peer, sender="\udcff@client.example")
    clock.now += 300
    assert attempt(peer, sender="\udcff@client.example").outcome is Outcome.ACCEPTED


def test_who_comes_back_too_late_begins_anew(serve: Serve, tmp_path: Path, clock: Clock) -> None:
    peer = serve(filter_with(Settings(str(tmp_path / "greylist.db"), window=600), clock))
    attempt(peer)
    clock.now += 601
    assert "in 300 seconds" in refusal(attempt(peer))


def test_who_is_known_is_forgotten_after_a_while(serve: Serve, tmp_path: Path, clock: Clock) -> None:
    path = tmp_path / "greylist.db"
    settings = Settings(str(path), keep=1000)
    peer = serve(filter_with(settings, clock))
    attempt(peer)
    clock.now += 300
    attempt(peer)
    for _ in range(3):  # each renews it
        clock.now += 1000
        assert attempt(peer).outcome is Outcome.ACCEPTED
    clock.now += 1001
    assert attempt(peer, sender="eve@client.example").outcome is Outcome.TEMPFAILED
    clock.now += 25 * 3600
    attempt(peer)
    with sqlite3.connect(path) as connection:  # nothing old is kept
        ((rows,),) = connection.execute("SELECT count(*) FROM seen")
    connection.close()
    assert rows == 1


class BrokenStore:
    def first_seen(self, key: str, now: float, keep: int) -> float:
        raise AssertionError("not asked")

    def renew(self, key: str, now: float, keep: int) -> None:
        raise AssertionError("not asked")

    def knows(self, key: str, now: float) -> bool:
        raise greylist.StoreError("the disk is full")

    def close(self) -> None: ...


@pytest.mark.parametrize(("pass_on_error", "outcome"), [(True, Outcome.ACCEPTED), (False, Outcome.TEMPFAILED)])
def test_a_store_that_cannot_be_asked_is_passed_or_waited_for(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, pass_on_error: bool, outcome: Outcome
) -> None:
    monkeypatch.setattr(greylist, "open_store", lambda name: BrokenStore())
    assert attempt(serve(filter_with(Settings(pass_on_error=pass_on_error)))).outcome is outcome


def test_an_error_of_sqlite_is_one_of_the_store(tmp_path: Path) -> None:
    store = SqliteStore(str(tmp_path / "greylist.db"))
    store.close()
    with pytest.raises(greylist.StoreError, match="closed"):
        store.knows("key", START)


def test_an_error_of_redis_is_one_of_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    server = fakeredis.FakeServer()
    monkeypatch.setattr(redis.Redis, "from_url", lambda url, **options: fakeredis.FakeRedis(server=server))
    store = greylist.open_store("redis://greylist.example:6379/0")
    server.connected = False
    with pytest.raises(greylist.StoreError):
        store.knows("key", START)
    with pytest.raises(greylist.StoreError):
        store.renew("key", START, 1)
    with pytest.raises(greylist.StoreError):
        store.first_seen("key", START, 1)


def open_and_use(path: str) -> None:
    store = SqliteStore(path)
    for number in range(10):
        store.first_seen(f"key {number}", START, 1000)
    store.close()


def test_workers_may_open_one_file_at_once(tmp_path: Path) -> None:
    path = str(tmp_path / "greylist.db")
    workers = [multiprocessing.get_context("spawn").Process(target=open_and_use, args=(path,)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 2


def test_a_file_that_another_process_writes_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = sqlite3.connect(tmp_path / "greylist.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        other.execute("ROLLBACK")

    monkeypatch.setattr("examples.greylist.time.sleep", wait)
    SqliteStore(str(tmp_path / "greylist.db")).close()
    other.close()
    assert len(waits) == 1


@pytest.mark.parametrize("problem", ["another process never ends", "there is no folder"])
def test_a_file_that_cannot_be_opened_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problem: str
) -> None:
    other = sqlite3.connect(tmp_path / "greylist.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    monkeypatch.setattr(greylist, "WAIT", 0.0)
    name = {"another process never ends": "greylist.db", "there is no folder": "none/greylist.db"}[problem]
    with pytest.raises(sqlite3.OperationalError):
        SqliteStore(str(tmp_path / name))
    other.close()


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"STORE": "/x", "DELAY": "1", "WINDOW": "2", "KEEP": "3", "ON_ERROR": "tempfail"}.items():
        monkeypatch.setenv(f"GREYLIST_{name}", value)
    assert Settings.from_environment() == Settings("/x", 1, 2, 3, pass_on_error=False)
