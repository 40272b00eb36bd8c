# SPDX-License-Identifier: GPL-3.0-or-later
"""A filter under fire: a process of its own, and what is expected of it."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from milter.libmilter import libmilter
from tests.filter_process import FilterProcess
from tests.fuzz.link import WHOLE, Ending, Surprise, compare, exchange
from tests.fuzz.model import Kind, Model, Process
from tests.fuzz.mutation import Packets, encoded
from tests.fuzz.sanitized import Sanitized

FILTER = Path(__file__).parent / "filters" / "ordered.py"

# A conversation without faults, after which the filter is known to be well.
WELL: Packets = [
    (b"O", b"\0\0\0\6" + b"\0\0\1\xff" + b"\0\x1f\xff\xff"),
    (b"C", b"well.example\x004\x00\x19192.0.2.7\0"),
    (b"H", b"well.example\0"),
    (b"M", b"<well@client.example>\0"),
    (b"R", b"<bob@mta.example>\0"),
    (b"T", b""),
    (b"L", b"Subject\0 well\0"),
    (b"N", b""),
    (b"B", b"all is well\r\n" * 300),
    (b"E", b""),
    (b"Q", b""),
]

# With this offer the library declines unknown commands, which libmilter then takes for declined on all connections.
_DECLINING: Packets = [(b"O", b"\0\0\0\6" + b"\0\0\1\xff" + b"\0\0\1\0"), (b"Q", b"")]

# What UndefinedBehaviorSanitizer is known to find in libmilter, see docs/libmilter.md.
_KNOWN = re.compile(r"libmilter/engine\.c:\d+:\d+: runtime error: left shift of 1 by 31 places")


class Target:
    """One filter.

    Arguments:
        directory: for its socket.
        build: the library with sanitizers; None for the one that is imported here.
    """

    def __init__(self, directory: Path, kind: Kind, build: Sanitized | None = None) -> None:
        self.kind = kind
        self.model = Process(build.redirected if build is not None else bool(libmilter.redirected))
        self.process = FilterProcess(
            FILTER,
            f"unix:{directory}/{kind.value}.sock",
            kind.value,
            library=build.library if build is not None else None,
            # One arena: else each new thread takes memory that it may never need.
            environment={"MALLOC_ARENA_MAX": "1", **(build.environment if build is not None else {})},
        )

    @property
    def where(self) -> str:
        return self.process.socket

    def send(self, stream: bytes, cuts: list[int], ending: Ending = WHOLE) -> None:
        """Raises `Surprise` for an answer that is wrong."""
        received = exchange(self.where, stream, cuts, ending)
        prediction = Model(self.model, self.kind).stream(stream if ending.at is None else stream[: ending.at])
        if received is not None:
            compare(received, prediction)

    def decline_unknown_commands(self) -> None:
        self.send(encoded(_DECLINING), [])

    def check(self) -> None:
        """It lives, it serves the next client well, and has said nothing unexpected."""
        self.send(encoded(WELL), [])
        said = [line for line in self.process.stdout.lines if line.startswith("UNEXPECTED")]
        said += [line for line in self.process.stderr.lines if "runtime error" in line and not _KNOWN.search(line)]
        if said:
            raise Surprise("the filter said:\n" + "\n".join(said))

    def footprint(self) -> "Footprint":
        """Needs /proc."""
        pid = self.process.pid
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return Footprint(pages * os.sysconf("SC_PAGE_SIZE") >> 10, len(os.listdir(f"/proc/{pid}/fd")))


@dataclass(frozen=True)
class Footprint:
    """What a process has of the machine."""

    kibibytes: int
    descriptors: int
