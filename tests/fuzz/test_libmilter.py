# SPDX-License-Identifier: GPL-3.0-or-later
"""What libmilter itself does wrong with the packets of a broken MTA, shown on a plain filter in C.

Each fault is told in docs/libmilter.md, with what the library does about it. A test that fails here says that this
libmilter is better than those known, and that the page is to be changed.
"""

import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import pytest

from build_milter import libmilter_flags
from milter.testing import Client, PeerClosed
from milter.testing.wire import Packet, pack_offer
from tests.fuzz.sanitized import AS_IT_IS, COMPILED, SANITIZERS, compiler, libmilter, source

BARE = Path(__file__).parent / "bare" / "filter.c"
ALL = pack_offer(6, 0x1FF, 0x1FFFFF)
NOTHING_DECLINED = pack_offer(6, 0x1FF, 0x1FFFFF & ~0x300)
CONNECT = b"client.example\x004\x00\x19192.0.2.1\0"
Start: TypeAlias = Callable[..., "Filter"]


class Filter:
    """The plain filter, a process of its own."""

    def __init__(self, program: Path, *arguments: str) -> None:
        self.spec = f"unix:{program}.sock"
        command = [str(program), self.spec, *arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"listening\n"

    def client(self, offer: bytes = NOTHING_DECLINED) -> Client:
        client = Client.connect(self.spec)
        client.send(b"O", offer)
        client.receive()
        return client

    def greeted(self, offer: bytes = NOTHING_DECLINED) -> Client:
        client = self.client(offer)
        client.send(b"C", CONNECT)
        assert client.receive().letter == b"c"
        return client

    def kill(self) -> bytes:
        """What it has said of its faults."""
        self.process.kill()
        return self.process.communicate()[1]

    def crash(self) -> bytes:
        """Wait for its end by itself; what it has said."""
        return self.process.communicate(timeout=60)[1]


def compiled(directory: Path, *flags: str) -> Path:
    program = directory / "filter"
    warnings = ["-Wall", "-Wextra", "-Werror"]
    command = [*compiler(), "-std=c11", "-g", *warnings, str(BARE), "-o", str(program), *flags, "-pthread"]
    subprocess.run(command, check=True)
    return program


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the system's libmilter."""
    return compiled(tmp_path_factory.mktemp("bare"), *libmilter_flags())


@pytest.fixture(scope="module")
def sanitized_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a libmilter that was compiled from its source with sanitizers, all its faults left in."""
    sources = source()
    if sources is None:
        pytest.skip("MILTER_SOURCE names no source of libmilter (scripts/fuzz.sh --libmilter fetches it)")
    directory = tmp_path_factory.mktemp("sanitized")
    archive = libmilter(sources, directory / "libmilter", AS_IT_IS) / "libmilter.a"
    return compiled(directory, SANITIZERS, *COMPILED, f"-I{sources / 'include'}", str(archive))


@pytest.fixture
def start(program: Path) -> Iterator[Start]:
    filters: list[Filter] = []

    def start_filter(*arguments: str) -> Filter:
        filters.append(Filter(program, *arguments))
        return filters[-1]

    yield start_filter
    for each in filters:
        each.kill()


@pytest.fixture
def sanitized(sanitized_program: Path) -> Iterator[Filter]:
    each = Filter(sanitized_program)
    yield each
    each.kill()


def next_answer(client: Client) -> Packet:
    """What comes next, when the last thing that was said is an unknown command, whose answer is known."""
    client.send(b"U", b"four\0")
    return client.receive()


TO_THE_UNKNOWN_COMMAND = Packet(b"y", b"550 4\0")


# ---- Faults that any build shows


def test_an_unknown_command_is_read_beyond_its_end(start: Start) -> None:
    """24 bytes fill a piece of glibc's memory; behind them is its bookkeeping, which is not 0."""
    client = start().greeted()
    client.send(b"U", b"x" * 24)
    answer = client.receive()
    assert answer.letter == b"y"
    assert int(answer.data.split()[1].strip(b"\0")) > 24


def test_a_helo_without_an_end_is_never_answered(start: Start) -> None:
    client = start().greeted()
    client.send(b"H", b"client.example")
    assert next_answer(client) == TO_THE_UNKNOWN_COMMAND


def test_a_body_with_the_end_of_the_message_is_answered_twice(start: Start) -> None:
    client = start("accept-body").greeted()
    for command, data in ((b"M", b"<ann>\0"), (b"R", b"<bob>\0"), (b"N", b"")):
        client.send(command, data)
        assert client.receive().letter == b"c"
    client.send(b"E", b"text\r\n")
    assert client.receive() == Packet(b"a")
    # What comes next the MTA takes for the answer to the next message's MAIL: accepted, unseen.
    assert client.receive() == Packet(b"a")


def test_an_empty_name_of_a_header_field_shifts_its_value(start: Start) -> None:
    client = start().greeted()
    for command, data in ((b"M", b"<ann>\0"), (b"R", b"<bob>\0")):
        client.send(command, data)
        assert client.receive().letter == b"c"
    client.send(b"L", b"\0value\0another\0")
    assert client.receive().data == b"550 a header field without a name\0"


def test_what_one_connection_declines_counts_for_all_others(start: Start) -> None:
    """An RCPT right after ABORT is dropped without an answer, until somebody has declined unknown commands."""
    bare = start()

    def recipient_after_abort() -> Client:
        client = bare.greeted()
        client.send(b"M", b"<ann>\0")
        assert client.receive().letter == b"c"
        client.send(b"A")
        client.send(b"R", b"<bob>\0")
        return client

    assert next_answer(recipient_after_abort()) == TO_THE_UNKNOWN_COMMAND
    bare.client(ALL)
    assert next_answer(recipient_after_abort()).letter == b"c"


def test_a_command_before_the_negotiation_is_answered(start: Start) -> None:
    client = Client.connect(start().spec)
    client.send(b"M", b"<ann>\0")
    assert client.receive().letter == b"c"


# ---- Faults that the sanitizers show


def provoked(bare: Filter, *packets: tuple[bytes, bytes]) -> bytes:
    """Send these after the negotiation; what the filter says as it crashes."""
    client = bare.client()
    try:
        for command, data in packets:
            client.send(command, data)
        while True:
            client.receive()
    except PeerClosed:
        return bare.crash()


def test_a_macro_without_a_value_is_looked_up_beyond_the_list(sanitized: Filter) -> None:
    said = provoked(sanitized, (b"C", CONNECT), (b"D", b"Cj\0mta.example\0i\0"), (b"M", b"<look>\0"))
    assert re.search(rb"heap-buffer-overflow.*smfi_getsymval", said, re.DOTALL)


def test_an_unknown_command_without_an_end_is_read_beyond_its_memory(sanitized: Filter) -> None:
    said = provoked(sanitized, (b"U", b"x" * 24))
    assert re.search(rb"heap-buffer-overflow.*on_unknown", said, re.DOTALL)


def test_a_hostname_without_an_end_is_read_one_byte_beyond_its_memory(sanitized: Filter) -> None:
    said = provoked(sanitized, (b"C", b"x" * 24))
    assert re.search(rb"heap-buffer-overflow.*READ of size 1.*st_connectinfo", said, re.DOTALL)


def test_the_flags_of_an_offer_are_counted_with_a_shift_into_the_sign(sanitized: Filter) -> None:
    sanitized.client(pack_offer(2, 0x3F, 0x7F))
    said = sanitized.kill()
    assert b"left shift of 1 by 31 places" in said
