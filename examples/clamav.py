# SPDX-License-Identifier: GPL-3.0-or-later
"""Ask ClamAV's daemon about each message, hundreds at once in one process.

    CLAMD=unix:/run/clamav/clamd.ctl python examples/clamav.py inet:3000@localhost

The settings are environment variables:

- ``CLAMD``: where clamd listens: ``unix:/path`` or ``host:port``.
- ``CLAMAV_TIMEOUT``: seconds that a scan may take, with the waiting for one's turn; 120.
- ``CLAMAV_CONNECTIONS``: how many scans run at once in a worker; 10, clamd's own ``MaxThreads``. The others wait.
- ``CLAMAV_ON_VIRUS``: ``reject`` (the default) or ``quarantine``.
- ``CLAMAV_ON_ERROR``: what becomes of a message that could not be scanned: ``tempfail`` (closed, the default: the
  client tries again later) or ``accept`` (open: it passes, with ``X-Virus-Scanned: no``).

A message longer than clamd's ``StreamMaxLength`` could not be scanned; so let that be more than the MTA's limit.
"""

import asyncio
import io
import logging
import os
import struct
import sys
from dataclasses import dataclass

from milter import EomContext, Message, Milter, Reply, Status

log = logging.getLogger("clamav")

PIECE = 1 << 16
RESULT = "X-Virus-Scanned"


@dataclass(frozen=True)
class Settings:
    clamd: str = "unix:/run/clamav/clamd.ctl"
    timeout: float = 120.0
    connections: int = 10
    quarantine: bool = False
    pass_on_error: bool = False

    @classmethod
    def from_environment(cls) -> "Settings":
        return cls(
            clamd=os.environ.get("CLAMD", cls.clamd),
            timeout=float(os.environ.get("CLAMAV_TIMEOUT", cls.timeout)),
            connections=int(os.environ.get("CLAMAV_CONNECTIONS", cls.connections)),
            quarantine=os.environ.get("CLAMAV_ON_VIRUS", "reject") == "quarantine",
            pass_on_error=os.environ.get("CLAMAV_ON_ERROR", "tempfail") == "accept",
        )


class ScanError(Exception):
    """There is no answer, or none that says what is in the message."""


def filter_with(settings: Settings) -> Milter:
    app = Milter("clamav")
    turn = asyncio.Semaphore(settings.connections)

    @app.on_message
    async def scan_message(ctx: EomContext, message: Message) -> Status | Reply:
        try:
            async with asyncio.timeout(settings.timeout), turn:
                with message.open() as file:
                    virus = await scan(settings.clamd, file)
        except (OSError, TimeoutError, ScanError) as problem:
            log.error("%s could not be scanned: %s", ctx.queue_id, str(problem) or "it took too long")
            if not settings.pass_on_error:
                return Reply(451, "4.7.1", "the virus scanner is not available, try again later")
            message.headers[RESULT] = "no"
            return Status.CONTINUE
        if virus is None:
            message.headers[RESULT] = "clean"  # the only field: what others claim is deleted
            return Status.CONTINUE
        log.warning("%s from %s has %s", ctx.queue_id, ctx.address, virus)
        if settings.quarantine:
            message.headers[RESULT] = "infected"
            ctx.quarantine(f"virus {virus}")
            return Status.CONTINUE
        return Reply(554, "5.7.1", f"virus found: {virus}")

    return app


async def scan(clamd: str, file: io.BufferedReader) -> str | None:
    """The name of a virus, or None if there is none (clamd(8), INSTREAM)."""
    reader, writer = await connect(clamd)
    try:
        await send(writer, file)
        answer = (await reader.readuntil(b"\0")).decode("utf-8", "replace").rstrip("\0")
    except asyncio.IncompleteReadError as problem:
        raise ScanError(f"clamd hung up after it said {problem.partial!r}") from problem
    except ConnectionError as problem:  # before the end of a stream; what it said is lost with the connection
        raise ScanError(f"clamd hung up ({problem}): is the message longer than its StreamMaxLength?") from problem
    finally:
        writer.close()
    if answer == "stream: OK":
        return None
    if answer.endswith(" FOUND"):
        return answer.removeprefix("stream: ").removesuffix(" FOUND")
    raise ScanError(f"clamd says {answer!r}")


async def connect(clamd: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    try:
        if clamd.startswith("unix:"):
            return await asyncio.open_unix_connection(clamd.removeprefix("unix:"))
        host, _, port = clamd.rpartition(":")
        return await asyncio.open_connection(host, int(port))
    except OSError as problem:
        raise ScanError(f"no connection to clamd at {clamd}: {problem}") from problem


async def send(writer: asyncio.StreamWriter, file: io.BufferedReader) -> None:
    """Pieces, each with its length before it, and one of length 0. What clamd does not take yet is waited for."""
    writer.write(b"zINSTREAM\0")
    while piece := file.read(PIECE):
        writer.write(struct.pack("!L", len(piece)) + piece)
        await writer.drain()
    writer.write(struct.pack("!L", 0))
    await writer.drain()


app = filter_with(Settings.from_environment())

if __name__ == "__main__":
    app.run(sys.argv[1])
