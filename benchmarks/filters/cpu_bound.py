# SPDX-License-Identifier: GPL-3.0-or-later
"""A filter that computes for a millisecond of processor time before each answer: ``cpu_bound:app``."""

import time

from milter import EomContext, Message, Milter

app = Milter("cpu_bound")

MILLISECOND = 1_000_000


@app.on_message
def compute(ctx: EomContext, message: Message) -> None:
    end = time.thread_time_ns() + MILLISECOND
    size = sum(len(value) for _, value in message.headers.raw) + len(message.body)
    message.headers["X-Sum"] = str(size)
    while time.thread_time_ns() < end:
        pass
