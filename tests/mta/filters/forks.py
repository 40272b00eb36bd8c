# SPDX-License-Identifier: GPL-3.0-or-later
"""Each message has the verdict that its subject wants; on the way to it, children come back in all ways.

For `milter run forks:app`, and with coroutines for `milter run forks:waiting`.
"""

import asyncio
import itertools
import os
import sys
from typing import Any

from milter import EomContext, Message, Milter, Reply, Status

app = Milter("forks")
waiting = Milter("forks")
ways = itertools.count()


def fork() -> None:
    """The child returns, raises, or exits."""
    way = next(ways) % 3
    child = os.fork()
    if child != 0:
        os.waitpid(child, 0)
    elif way == 1:
        raise RuntimeError("in a child")
    elif way == 2:
        sys.exit(0)


def verdict(message: Message) -> Status | Reply:
    wanted, _, token = message.headers["Subject"].partition(" ")
    return Status.CONTINUE if wanted == "ham" else Reply(550, "5.7.1", f"spam {token}")


@app.on_mail
@waiting.on_mail
def begin(ctx: Any, sender: str, params: Any) -> Status:
    fork()
    return Status.CONTINUE


@app.on_message
def judge(ctx: EomContext, message: Message) -> Status | Reply:
    fork()
    return verdict(message)


@waiting.on_message
async def wait_and_judge(ctx: EomContext, message: Message) -> Status | Reply:
    await asyncio.sleep(0)
    fork()
    return verdict(message)
