# SPDX-License-Identifier: GPL-3.0-or-later
"""Nothing is left of a connection: no Python objects, no descriptors, not a kilobyte a message."""

import gc
import logging
import os
from pathlib import Path

import pytest

from milter import Address, Context, EomContext, Milter, Params, Reply, Status
from tests.conftest import Peer, Serve, begin_message, send_content

STATM = Path("/proc/self/statm")
ROUNDS = 2000


def mixed() -> Milter:
    """A filter that makes state, raises, refuses with a text and changes messages."""
    app = Milter("mixed")

    @app.on_mail
    def mail(ctx: Context, sender: Address, params: Params) -> Status:
        ctx.session.sender = sender
        ctx.transaction.macros = dict(ctx.macros)
        return Status.CONTINUE

    @app.on_header
    def header(ctx: Context, name: str, value: str) -> None:
        if ctx.id % 5 == 0:
            raise RuntimeError(value)

    @app.on_eom
    def eom(ctx: EomContext) -> Status | Reply:
        ctx.add_header("X-Seen", "yes")
        ctx.replace_body(b"new\r\n" * 100)
        return Reply(550, "5.7.1", "no", "not today") if ctx.id % 3 == 0 else Status.CONTINUE

    return app


def converse(peer: Peer, number: int) -> None:
    """One connection: with a message, with two, aborted, or dropped in the middle."""
    client = peer.greeted()
    begin_message(client)
    if number % 4 != 0:
        send_content(client, b"text\r\n" * 200)
    if number % 4 == 1:
        client.abort()
        begin_message(client)
        client.abort()
    if number % 4 == 2:
        client.quit()
        client.wait_for_close()
    client.close()
    peer.forget(client)


def resident() -> int:
    """Bytes of this process in memory."""
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not STATM.exists(), reason="the size of a process is told in /proc")
def test_many_connections_leave_nothing_behind(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, logger="milter")  # pytest keeps each record
    peer = serve(mixed())
    for number in range(ROUNDS // 4):
        converse(peer, number)
    gc.collect()
    objects, size, descriptors = len(gc.get_objects()), resident(), len(os.listdir("/proc/self/fd"))
    for number in range(ROUNDS):
        converse(peer, number)
    gc.collect()
    # A connection that dropped may be under way still, with its handful of objects.
    assert len(gc.get_objects()) - objects < ROUNDS // 10
    assert resident() - size < ROUNDS * 500
    assert abs(len(os.listdir("/proc/self/fd")) - descriptors) < 5
