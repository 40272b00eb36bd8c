# SPDX-License-Identifier: GPL-3.0-or-later
"""The filter with this library, as one that asks somebody else: ``milter_waiting.py SECONDS SOCKET``."""

import asyncio
import sys

from milter import EomContext, Message, Milter

app = Milter("benchmark")


@app.on_message
async def total(ctx: EomContext, message: Message) -> None:
    size = sum(len(value) for _, value in message.headers.raw) + len(message.body)
    await asyncio.sleep(float(sys.argv[1]))
    message.headers["X-Sum"] = str(size)


if __name__ == "__main__":
    app.run(sys.argv[2], backlog=4096)
