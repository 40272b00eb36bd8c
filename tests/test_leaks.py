# SPDX-License-Identifier: GPL-3.0-or-later
"""Nothing is left of a connection: 100,000 of them, of mixed kinds (`tests/horde.py`), and a process as it was.

The first tenth warms up: the allocator's pools, libmilter's threads, Python's caches.
"""

import gc
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from milter import Address, Context, EomContext, Message, Milter, Params, Reply, Status
from milter.testing import MTA
from tests.conftest import Peer, Serve
from tests.horde import PATIENCE

PROC = Path("/proc/self")
REPOSITORY = Path(__file__).parent.parent
CLIENTS = 4

pytestmark = pytest.mark.skipif(not PROC.exists(), reason="the size of a process is told in /proc")


def mixed() -> Milter[Any, Any]:
    """A filter that makes state, raises, refuses, and changes messages; large ones lie in files.

    Half of its sessions have no state: of their end Python is told later, with others.
    """
    app = Milter("mixed", spool_size=4096)

    @app.on_connect
    def on_connect(ctx: Context, hostname: str, address: object) -> None:
        if ctx.id % 2:
            ctx.session.hostname = hostname

    @app.on_mail
    def on_mail(ctx: Context, sender: Address, params: Params) -> Status:
        ctx.transaction.macros = dict(ctx.macros)
        return Status.CONTINUE

    @app.on_rcpt
    def on_rcpt(ctx: Context, recipient: Address, params: Params) -> Reply | None:
        return Reply(550, "5.7.1", "not here") if recipient.startswith("nobody") else None

    @app.on_header
    def on_header(ctx: Context, name: str, value: str) -> None:
        if name == "X-Raise":
            raise RuntimeError(value)

    @app.on_unknown
    def on_unknown(ctx: Context, command: str) -> Status:
        return Status.REJECT

    @app.on_eom
    def on_eom(ctx: EomContext) -> None:
        ctx.add_header("X-Seen", "yes")

    @app.on_abort
    def on_abort(ctx: Context) -> None:
        if ctx.id % 2:
            ctx.session.aborted = True

    return app


def plain() -> Milter[Any, Any]:
    app = mixed()

    @app.on_message
    def judge(ctx: EomContext, message: Message) -> Reply | None:
        return edited(message)

    return app


def waiting() -> Milter[Any, Any]:
    app = mixed()

    @app.on_message
    async def judge(ctx: EomContext, message: Message) -> Reply | None:
        return edited(message)

    return app


def edited(message: Message) -> Reply | None:
    if "X-Refuse" in message.headers:
        return Reply(554, "5.7.1", "no", "not today")
    message.headers["X-A"] = "new"
    message.body = message.body[:100] + b"new\r\n" * 100
    return None


class Size(NamedTuple):
    """What this process has."""

    objects: int
    memory: int
    descriptors: int
    threads: int

    @classmethod
    def now(cls) -> "Size":
        gc.collect()
        pages = int((PROC / "statm").read_text().split()[1])
        descriptors, threads = (len(os.listdir(PROC / name)) for name in ("fd", "task"))
        return cls(len(gc.get_objects()), pages * os.sysconf("SC_PAGE_SIZE"), descriptors, threads)


def play(peer: Peer, sessions: int) -> None:
    """So many sessions, and none of them left."""
    count = sessions // CLIENTS
    command = [sys.executable, "-m", "tests.horde", peer.server.socket]
    clients = [
        subprocess.Popen([*command, str(number * count), str(count)], cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
        for number in range(CLIENTS)
    ]
    assert [client.communicate()[1] for client in clients] == [""] * CLIENTS
    run = peer.server._run
    assert run is not None
    assert run.wait_sessions(int(PATIENCE * 1000)) == 0


@pytest.mark.parametrize(("app", "sessions"), [(plain(), 80_000), (waiting(), 20_000)], ids=["plain", "coroutines"])
def test_100000_sessions_leave_nothing_behind(
    serve: Serve, caplog: pytest.LogCaptureFixture, app: Milter[Any, Any], sessions: int
) -> None:
    caplog.set_level(logging.CRITICAL, logger="milter")  # pytest keeps each record
    peer = serve(app)
    play(peer, sessions // 10)
    before = Size.now()
    play(peer, sessions - sessions // 10)
    after = Size.now()
    # Of the last sessions that ended, Python drops its objects at the next call.
    assert after.objects - before.objects < 3000
    assert after.memory - before.memory < sessions * 64
    assert abs(after.descriptors - before.descriptors) < 5
    assert after.threads - before.threads < 100  # libmilter has as many as sessions came at once


def test_sessions_of_tests_leave_nothing_behind(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, logger="milter")

    def send(count: int) -> None:
        for number in range(count):
            with MTA(app, raise_errors=False) as mta:
                mta.send(recipients=["nobody@mta.example", "bob@mta.example"], message=messages[number % 3])

    app = plain()
    messages = [b"X-Raise: yes\n\n", b"X-Refuse: yes\n\n", b"X-Large: yes\n\n" + b"0123456789abcd\n" * 1000]
    send(100)
    before = Size.now()
    send(1000)
    after = Size.now()
    assert after.objects - before.objects < 300
    assert after.memory - before.memory < 1000 * 2000  # the shim keeps each run, of some hundred bytes
    assert abs(after.descriptors - before.descriptors) < 5
    assert after.threads - before.threads < 5
