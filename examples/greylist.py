# SPDX-License-Identifier: GPL-3.0-or-later
"""Greylisting: who sends to somebody for the first time is asked to come back in some minutes. Most spammers do not.

    GREYLIST_STORE=/var/lib/greylist/greylist.db python examples/greylist.py inet:3000@localhost
    GREYLIST_STORE=redis://localhost:6379/0 python examples/greylist.py inet:3000@localhost

The settings are environment variables:

- ``GREYLIST_STORE``: a file for SQLite, which all workers of one machine share; or the URL of a Redis, which several
  machines share (``pip install redis``).
- ``GREYLIST_DELAY``: seconds until a client may come back; 300. ``GREYLIST_WINDOW``: seconds within which it must;
  86400.
- ``GREYLIST_KEEP``: seconds for which one that came back is known, since it last sent; 3110400 (36 days).
- ``GREYLIST_ON_ERROR``: what becomes of mail while the store cannot be asked: ``accept`` (open, the default:
  greylisting saves work, it does not protect) or ``tempfail`` (closed).

Clients are known by their network (/24 of IPv4, /64 of IPv6), since large senders try again from another machine.
Clients that authenticated, or that come from private addresses, are not asked to wait.
"""

import ipaddress
import logging
import os
import sqlite3
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from milter import Address, Context, InetAddress, Milter, Params, Reply, Status

log = logging.getLogger("greylist")

PRIVATE = "127.0.0.0/8 10.0.0.0/8 172.16.0.0/12 192.168.0.0/16 ::1/128 fc00::/7"
TRUSTED = [ipaddress.ip_network(text) for text in PRIVATE.split()]


@dataclass(frozen=True)
class Settings:
    store: str = "greylist.db"
    delay: int = 300
    window: int = 24 * 3600
    keep: int = 36 * 24 * 3600
    pass_on_error: bool = True

    @classmethod
    def from_environment(cls) -> "Settings":
        return cls(
            store=os.environ.get("GREYLIST_STORE", cls.store),
            delay=int(os.environ.get("GREYLIST_DELAY", cls.delay)),
            window=int(os.environ.get("GREYLIST_WINDOW", cls.window)),
            keep=int(os.environ.get("GREYLIST_KEEP", cls.keep)),
            pass_on_error=os.environ.get("GREYLIST_ON_ERROR", "accept") != "tempfail",
        )


class StoreError(Exception):
    """The store cannot be asked."""


class Store(Protocol):
    """Remembers texts for a time. Handlers of several threads use it at once."""

    def first_seen(self, key: str, now: float, keep: int) -> float:
        """When this key was seen first: now, unless it was seen within the last `keep` seconds."""
        ...

    def renew(self, key: str, now: float, keep: int) -> None:
        """Remember the key for `keep` seconds from now on."""
        ...

    def knows(self, key: str, now: float) -> bool: ...

    def close(self) -> None: ...


def filter_with(settings: Settings, clock: Callable[[], float] = time.time) -> Milter:
    app = Milter("greylist")
    stores: list[Store] = []

    @app.on_start
    def open_it() -> None:
        stores.append(open_store(settings.store))

    @app.on_stop
    def close_it() -> None:
        stores.pop().close()

    @app.on_rcpt(macros=["{auth_type}"])
    def greet(ctx: Context, recipient: Address, params: Params) -> Status | Reply:
        if not isinstance(ctx.address, InetAddress) or is_trusted(ctx.address) or ctx.macros.get("{auth_type}"):
            return Status.CONTINUE
        try:
            wait = seconds_to_wait(stores[0], settings, clock(), ctx.address, ctx.sender, recipient)
        except StoreError as problem:
            log.error("the store cannot be asked: %s", problem)
            return Status.CONTINUE if settings.pass_on_error else Status.TEMPFAIL
        if wait:
            return Reply(451, "4.7.1", f"greylisted, try again in {wait} seconds")
        return Status.CONTINUE

    return app


def seconds_to_wait(
    store: Store, settings: Settings, now: float, address: InetAddress, sender: Address | None, recipient: Address
) -> int:
    """0 if the client came back in time, or is known to come back."""
    client = network(address)
    if store.knows(f"known {client}", now):
        store.renew(f"known {client}", now, settings.keep)
        return 0
    # However they are written: a server that tries again may spell them otherwise.
    envelope = f"{sender.canonical if sender else '<>'} {recipient.canonical}"
    first = store.first_seen(f"tried {client} {envelope}", now, settings.window)
    wait = round(first + settings.delay - now)
    if wait > 0:
        return wait
    store.renew(f"known {client}", now, settings.keep)
    return 0


def network(address: InetAddress) -> str:
    length = 24 if address.ip.version == 4 else 64
    return str(ipaddress.ip_network(f"{address.host}/{length}", strict=False))


def is_trusted(address: InetAddress) -> bool:
    return any(address.ip in network for network in TRUSTED)


# ---- Stores


def open_store(name: str) -> Store:
    return RedisStore(name) if name.startswith(("redis://", "rediss://", "unix://")) else SqliteStore(name)


WAIT = 5.0  # seconds


def log_ahead(connection: sqlite3.Connection) -> None:
    """Let readers and a writer work side by side. Here SQLite never waits for other processes: it is asked again."""
    end = time.monotonic() + WAIT
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as problem:
            if problem.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() >= end:
                raise
            time.sleep(0.01)


class SqliteStore:
    """A file that the workers of one machine share."""

    def __init__(self, path: str) -> None:
        # One connection for all threads, in turn; other processes wait for up to `WAIT` seconds.
        self._connection = sqlite3.connect(path, timeout=WAIT, check_same_thread=False, isolation_level=None)
        self._lock = threading.Lock()
        log_ahead(self._connection)
        self._connection.execute("PRAGMA synchronous = NORMAL")  # a power cut may cost a few seconds of memory
        self._connection.execute(
            "CREATE TABLE IF NOT EXISTS seen (key TEXT PRIMARY KEY, first REAL NOT NULL, until REAL NOT NULL)"
        )
        self._connection.execute("CREATE INDEX IF NOT EXISTS seen_until ON seen (until)")
        self._next_cleaning = 0.0

    def first_seen(self, key: str, now: float, keep: int) -> float:
        if now >= self._next_cleaning:
            self._one("DELETE FROM seen WHERE until < :now RETURNING 1", now=now)
            self._next_cleaning = now + 3600
        (first,) = self._one(
            "INSERT INTO seen VALUES (:key, :now, :until) ON CONFLICT (key) DO UPDATE SET "
            "first = iif(until < :now, :now, first), until = iif(until < :now, :until, until) RETURNING first",
            key=key,
            now=now,
            until=now + keep,
        )
        return float(first)

    def renew(self, key: str, now: float, keep: int) -> None:
        self._one(
            "INSERT INTO seen VALUES (:key, :now, :until) ON CONFLICT (key) DO UPDATE SET until = :until RETURNING 1",
            key=key,
            now=now,
            until=now + keep,
        )

    def knows(self, key: str, now: float) -> bool:
        (found,) = self._one("SELECT EXISTS (SELECT 1 FROM seen WHERE key = :key AND until >= :now)", key=key, now=now)
        return bool(found)

    def close(self) -> None:
        self._connection.close()

    def _one(self, statement: str, key: str = "", **values: float) -> tuple[float, ...]:
        """The first row of the answer. (A lone surrogate stands for a byte that is no UTF-8: SQLite takes none.)"""
        text = key.encode("utf-8", "surrogateescape").decode("latin-1")
        try:
            with self._lock:
                rows = self._connection.execute(statement, {"key": text, **values}).fetchall()
        except sqlite3.Error as problem:
            raise StoreError(str(problem)) from problem
        return tuple(rows[0]) if rows else ()


class RedisStore:
    """A server that several machines share. It forgets by itself what is old."""

    def __init__(self, url: str) -> None:
        import redis

        self._errors = redis.RedisError
        self._server = redis.Redis.from_url(  # pyright: ignore[reportUnknownMemberType]
            url, socket_timeout=5.0, socket_connect_timeout=5.0
        )

    def first_seen(self, key: str, now: float, keep: int) -> float:
        try:
            # A transaction: between the two there is nobody else.
            with self._server.pipeline() as together:  # pyright: ignore[reportUnknownMemberType]
                together.set(self._name(key), repr(now), ex=keep, nx=True)
                together.get(self._name(key))
                _, first = together.execute()
        except self._errors as problem:
            raise StoreError(str(problem)) from problem
        return float(first)

    def renew(self, key: str, now: float, keep: int) -> None:
        try:
            self._server.set(self._name(key), repr(now), ex=keep)
        except self._errors as problem:
            raise StoreError(str(problem)) from problem

    def knows(self, key: str, now: float) -> bool:
        try:
            return bool(self._server.exists(self._name(key)))
        except self._errors as problem:
            raise StoreError(str(problem)) from problem

    def close(self) -> None:
        self._server.close()

    def _name(self, key: str) -> bytes:
        return b"greylist " + key.encode("utf-8", "surrogateescape")


app = filter_with(Settings.from_environment())

if __name__ == "__main__":
    app.run(sys.argv[1])
