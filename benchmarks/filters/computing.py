# SPDX-License-Identifier: GPL-3.0-or-later
"""A filter with the same work for each message, a millisecond or more of Python's time: ``computing:app``.

Unlike ``cpu_bound``, which stops by the clock, it shows if threads that run side by side make each other slow.
"""

from milter import EomContext, Message, Milter

app = Milter("computing")

STEPS = 20_000


@app.on_message
def compute(ctx: EomContext, message: Message) -> None:
    size = sum(len(value) for _, value in message.headers.raw) + len(message.body)
    total = size
    for step in range(STEPS):
        total = (total * 31 + step) & 0xFFFFFF
    message.headers["X-Sum"] = str(size)
