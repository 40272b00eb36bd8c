# SPDX-License-Identifier: GPL-3.0-or-later
"""The filter with this library, on the whole message: ``milter_message.py SOCKET``."""

import sys

from milter import EomContext, Message, Milter

app = Milter("benchmark")


@app.on_message
def total(ctx: EomContext, message: Message) -> None:
    size = sum(len(value) for _, value in message.headers.raw) + len(message.body)
    message.headers["X-Sum"] = str(size)


if __name__ == "__main__":
    app.run(sys.argv[1])
