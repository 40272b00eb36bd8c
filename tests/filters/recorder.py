# SPDX-License-Identifier: GPL-3.0-or-later
"""A filter that prints every call it gets, for comparisons: SOCKET replying|silent [NAME=NUMBER ...].

``silent`` observes all stages but the end of message. Header fields tell it what to do there: ``X-Body: N``
replaces the body with N bytes, ``X-Meet: N`` waits until N messages are at their end at the same time,
``X-Line: N`` prints N, waits for a line on standard input, and sends progress.
``descriptors=N`` opens N descriptors first; all other numbers are options of run().

Each line ends in a semicolon; that of a session's end tells how many have ended. SIGUSR1 does nothing, but
interrupts system calls.
"""

import itertools
import os
import resource
import signal
import sys
import threading
import zlib
from collections.abc import Callable
from typing import Any

from milter import ActionError, Context, EomContext, Milter, Status
from milter.options import StartOptions

path, mode, *arguments = sys.argv[1:]
numbers = {name: int(number) for name, _, number in (argument.partition("=") for argument in arguments)}
descriptors = numbers.pop("descriptors", 0)
options: StartOptions = numbers  # type: ignore[assignment]

app = Milter("recorder", header_replies="each")
one_at_a_time = threading.Lock()
closed = itertools.count(1)
meetings: dict[int, threading.Barrier] = {}


def record(stage: str, *values: object) -> None:
    with one_at_a_time:
        if stage == "close":
            values = (next(closed),)
        print(stage, *map(shown, values), end=";\n", flush=True)


def shown(value: object) -> str:
    if isinstance(value, bytes):
        return f"{len(value)} bytes {zlib.crc32(value):x}"
    if isinstance(value, str) and len(value) > 1000:
        return f"{len(value)} characters {zlib.crc32(value.encode()):x}"
    return ascii(value)


def recorder(stage: str) -> Callable[..., Any]:
    def handler(ctx: Context, *values: Any) -> Status:
        record(stage, *values)
        if stage == "header" and values[0].startswith("X-"):
            setattr(ctx.transaction, values[0][2:].lower(), int(values[1]))
        return Status.CONTINUE

    def observer(ctx: Context, *values: Any) -> None:
        handler(ctx, *values)

    return observer if mode == "silent" or stage in ("abort", "close") else handler


for stage in ("connect", "helo", "mail", "rcpt", "data", "header", "eoh", "body", "unknown", "abort", "close"):
    getattr(app, f"on_{stage}")(recorder(stage))


def meet(number: int) -> None:
    with one_at_a_time:
        meeting = meetings.setdefault(number, threading.Barrier(number))
    meeting.wait()


@app.on_eom
def eom(ctx: EomContext) -> Status:
    wanted = vars(ctx.transaction)
    record("eom", *ctx.recipients)
    try:
        ctx.add_header("X-Seen", "yes")
        if "body" in wanted:
            ctx.signal_progress()
            ctx.replace_body(b"x" * wanted["body"])
        if "meet" in wanted:
            meet(wanted["meet"])
        if "line" in wanted:
            record("waiting", wanted["line"])
            sys.stdin.readline()
            ctx.signal_progress()
            record("sent")
        ctx.add_header("X-Done", "yes")
    except ActionError:
        record("failed")
    return Status.CONTINUE


@app.on_start
def prepare() -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    for _ in range(descriptors):
        os.open(os.devnull, os.O_RDONLY)
    signal.signal(signal.SIGUSR1, lambda number, frame: None)
    signal.siginterrupt(signal.SIGUSR1, True)


app.run(path, **options)
