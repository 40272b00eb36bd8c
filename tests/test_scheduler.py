# SPDX-License-Identifier: GPL-3.0-or-later
"""How the threads of many sessions get into Python (shim/turns.c): nobody is held up by a handler that waits.

That an event is served once, and by one thread at a time, is told by tests/stress.
"""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from milter import Context, EomContext, Message, Milter, Params, Status
from milter._shim import lib
from milter.testing import Client, Verdict
from tests.conftest import Serve, begin_message, send_content, send_message

LIMIT = 30.0
"""Seconds after which something hangs."""


class Progress:
    """Messages that were done."""

    def __init__(self) -> None:
        self._done = 0
        self._changed = threading.Condition()

    def note(self) -> None:
        with self._changed:
            self._done += 1
            self._changed.notify_all()

    def wait_for(self, more: int) -> bool:
        with self._changed:
            wanted = self._done + more
            return self._changed.wait_for(lambda: self._done >= wanted, LIMIT)


def test_a_handler_that_waits_holds_nobody_up(serve: Serve) -> None:
    """Some wait until others have got on, again and again, and in the middle of their traffic."""
    app = Milter("test")
    progress = Progress()
    over = threading.Event()

    @app.on_rcpt
    def check(ctx: Context, recipient: str, params: Params) -> Status:
        if recipient == "slow@mta.example" and not progress.wait_for(20):
            return Status.REJECT
        return Status.CONTINUE

    @app.on_message
    def read(ctx: EomContext, message: Message) -> None:
        assert message.body == b"text\r\n"

    def wait_often(client: Client) -> list[Verdict]:
        client.mail("<ann@client.example>")
        answers = [answer.verdict for _ in range(20) if (answer := client.rcpt("<slow@mta.example>")) is not None]
        client.abort()
        return answers

    def keep_busy(client: Client) -> None:
        while not over.is_set():
            assert send_message(client).answer.verdict is Verdict.CONTINUE
            progress.note()

    peer = serve(app)
    with ThreadPoolExecutor(6) as pool:
        try:
            busy = [pool.submit(keep_busy, peer.greeted()) for _ in range(4)]
            waiting = [pool.submit(wait_often, peer.greeted()) for _ in range(2)]
            assert [answer for future in waiting for answer in future.result()] == [Verdict.CONTINUE] * 40
        finally:
            over.set()
        for future in busy:
            future.result()


@pytest.mark.skipif(not lib.milter_io_wrapped(), reason="libmilter promises several sessions to one worker here")
@pytest.mark.parametrize("sessions", [2, 5])
def test_who_was_served_waits_for_nobody(serve: Serve, sessions: int) -> None:
    """Each message waits for the same one of all other sessions, so none of these may wait for it."""
    app = Milter("test")
    meeting = threading.Barrier(sessions, timeout=LIMIT)

    @app.on_message
    def meet(ctx: EomContext, message: Message) -> None:
        meeting.wait()

    def send_many(client: Client) -> list[Verdict]:
        verdicts = []
        for _ in range(100):
            begin_message(client)
            verdicts.append(send_content(client).answer.verdict)
        return verdicts

    peer = serve(app)
    with ThreadPoolExecutor(sessions) as pool:
        for verdicts in pool.map(send_many, [peer.greeted() for _ in range(sessions)]):
            assert verdicts == [Verdict.CONTINUE] * 100
