# SPDX-License-Identifier: GPL-3.0-or-later
"""libmilter's I/O, wrapped or not: the same conversations, with both ways of linking, to the last byte and call.

Each test plays its bytes to a filter that records its calls (filters/recorder.py), once for each way of
linking that is possible here, and compares: with one another, and with what must come. Answers are waited
for; so what was sent before them has been read when the next bytes are sent.
"""

import contextlib
import ctypes
import fcntl
import functools
import os
import resource
import signal
import socket
import struct
import termios
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import pytest

from milter.listener import connect
from milter.testing.wire import Decoder, Packet
from tests.filter_process import PATIENCE, FilterProcess, running_filters
from tests.links import built_library, waits_with_select

MODES = ("replying", "silent")
LINKS = ("static", "shared")

OFFER = Packet(b"O", b"\0\0\0\6" + b"\0\0\1\xff" + b"\0\x1f\xff\xff")
GREETING = [
    OFFER,
    Packet(b"D", b"Cj\0mta.example\0"),
    Packet(b"C", b"client.example\x004\x00\x19192.0.2.1\0"),
    Packet(b"H", b"client.example\0"),
]
ENVELOPE = [
    Packet(b"D", b"Mi\0QID\0"),
    Packet(b"M", b"<ann@client.example>\0SIZE=100\0"),
    Packet(b"R", b"<bob@mta.example>\0"),
    Packet(b"T"),
]
CONTENT = [Packet(b"L", b"Subject\0test\0"), Packet(b"N"), Packet(b"B", b"text\r\n"), Packet(b"E")]
MESSAGE = [*ENVELOPE, *CONTENT]
UNKNOWN = Packet(b"U", b"FOO\0")
QUIT = Packet(b"Q")


def message(**wanted: int) -> list[Packet]:
    """One that tells the recorder what to do at its end."""
    fields = [Packet(b"L", f"X-{name.title()}\0{number}\0".encode()) for name, number in wanted.items()]
    return [*ENVELOPE, *fields, *CONTENT]


SESSION = [*GREETING, UNKNOWN, *MESSAGE, Packet(b"A"), *ENVELOPE, Packet(b"A"), QUIT]


def encoded(packets: list[Packet]) -> bytes:
    return b"".join(packet.encode() for packet in packets)


def answers(packet: Packet, mode: str) -> int:
    """How many packets the recorder answers with. At the end of a message there are two new header fields, too."""
    if packet.letter == b"E":
        return 3
    if packet.letter in b"DAQK" or (mode == "silent" and packet.letter != b"O"):
        return 0
    return 1


def answers_before(packets: list[Packet], mode: str, position: int) -> int:
    """How many packets come in answer to the first `position` bytes of the conversation."""
    count = 0
    for packet in packets:
        position -= len(packet.encode())
        if position < 0:
            break
        count += answers(packet, mode)
    return count


def spin_until(condition: Callable[[], bool]) -> None:
    """For what nobody can wait for without asking again and again."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"waited for {PATIENCE:g} seconds"
        os.sched_yield()


# ---- One conversation


class Connection:
    """An MTA that says what it is told to, and keeps what it hears."""

    def __init__(self, specification: str, timeout: float = PATIENCE) -> None:
        self.socket = connect(specification, timeout)
        self._decoder = Decoder()
        self.heard: list[Packet] = []

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def try_to_send(self, data: bytes) -> None:
        """As much as the filter takes."""
        with contextlib.suppress(OSError):
            self.socket.sendall(data)

    def hear(self, count: int) -> None:
        """Wait until `count` packets have come altogether."""
        while len(self.heard) < count:
            packet = self._decoder.next()
            if packet is None:
                data = self.socket.recv(65536)
                assert data, f"the filter closed the connection after {self.heard}"
                self._decoder.feed(data)
            else:
                self.heard.append(packet)

    def hear_end(self) -> None:
        """Everything until the filter closes the connection."""
        with contextlib.suppress(ConnectionResetError):  # the filter did not read all
            while data := self.socket.recv(65536):
                self._decoder.feed(data)
        while packet := self._decoder.next():
            self.heard.append(packet)

    def wait_for_bytes(self, size: int) -> None:
        """Wait until so many have come, and leave them unread."""
        spin_until(lambda: self._queued(termios.FIONREAD) >= size)

    def wait_until_read(self) -> None:
        """Wait until the filter has taken all that was sent from the system."""
        spin_until(lambda: not self._unread())

    def _queued(self, queue: int) -> int:
        size = array("i", [0])
        fcntl.ioctl(self.socket, queue, size)
        return size[0]

    def _unread(self) -> int:
        if self.socket.family == socket.AF_UNIX:
            return self._queued(termios.TIOCOUTQ)
        if not Path("/proc/net/tcp").exists():
            pytest.skip("what TCP has not delivered yet is told in /proc")
        here, there = (f":{name[1]:04X}" for name in (self.socket.getsockname(), self.socket.getpeername()))
        for line in Path("/proc/net/tcp").read_text().splitlines():
            _, local, remote, _, queues, *_ = line.split()
            if local.endswith(there) and remote.endswith(here):
                return int(queues.partition(":")[2], 16)
        return 0

    def close(self) -> None:
        self.socket.close()

    def reset(self) -> None:
        """Close it so that the other side gets an error."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()


@dataclass(frozen=True)
class Recording:
    """What an MTA heard, and which calls the filter got."""

    heard: list[Packet]
    calls: list[str]


class Stage:
    """A recorder that runs, linked in one way."""

    def __init__(self, process: FilterProcess, mode: str) -> None:
        self.process = process
        self.mode = mode
        self._closed = 0
        self._read = 0

    def connect(self) -> Connection:
        return Connection(self.process.socket)

    @contextlib.contextmanager
    def recorded(self, sessions: int = 1) -> Iterator[tuple[Connection, Recording]]:
        """A connection with so many sessions (QUIT_NC begins another one), one connection after the other."""
        connection, calls = self.connect(), list[str]()
        try:
            yield connection, Recording(connection.heard, calls)
        finally:  # also of a test that is skipped: the next one counts on it
            connection.close()
            calls += self.calls(sessions)

    def calls(self, sessions: int) -> list[str]:
        """Those since the last time, once so many more sessions are closed."""
        self._closed += sessions
        if self._closed:
            self.process.stdout.wait_for(f"close {self._closed};")
        lines = self.process.stdout.lines
        new, self._read = lines[self._read :], len(lines)
        return ["close" if line.startswith("close") else line.rstrip(";") for line in new]


Staged: TypeAlias = Callable[..., Stage]


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By way of linking: where the library is."""
    found = {link: built_library(link, tmp_path_factory.mktemp(link)) for link in LINKS}
    return {link: library for link, library in found.items() if library is not None}


@pytest.fixture(scope="module", params=["unix", "inet"])
def staged(
    request: pytest.FixtureRequest, libraries: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Staged]:
    """Recorders by way of linking, mode and options, started when they are first asked for."""
    with contextlib.ExitStack() as stack:

        @functools.cache
        def start(link: str, mode: str, *options: str) -> Stage:
            path = tmp_path_factory.mktemp("recorder") / "s"
            specification = f"unix:{path}" if request.param == "unix" else "inet:0@127.0.0.1"
            run = stack.enter_context(running_filters(library=libraries[link]))
            return Stage(run("tests/filters/recorder.py", specification, mode, *options), mode)

        yield start


@pytest.fixture
def links(libraries: dict[str, Path]) -> list[str]:
    return list(libraries)


def same(recordings: list[Recording]) -> Recording:
    """What is the same in all of them, and not empty."""
    first = recordings[0]
    for other in recordings[1:]:
        assert other == first
    assert first.heard
    assert first.calls
    return first


def play(stage: Stage, packets: list[Packet], cuts: list[int], sessions: int = 1) -> Recording:
    """Send the packets in pieces; before each piece, the answers to what was sent must have come."""
    data = encoded(packets)
    with stage.recorded(sessions) as (connection, recording):
        for begin, end in zip([0, *cuts], [*cuts, len(data)], strict=True):
            connection.hear(answers_before(packets, stage.mode, begin))
            connection.send(data[begin:end])
        connection.hear_end()
    return recording


# ---- Bytes, however they are cut


@pytest.mark.parametrize("mode", MODES)
def test_a_session_cut_at_any_point_is_the_same(staged: Staged, links: list[str], mode: str) -> None:
    size = len(encoded(SESSION))
    whole = same([play(staged(link, mode), SESSION, []) for link in links])
    assert len(whole.heard) == answers_before(SESSION, mode, size)
    for link in links:
        stage = staged(link, mode)
        for cut in range(1, size):
            assert play(stage, SESSION, [cut]) == whole, f"cut at {cut} of {size}"
        assert play(stage, SESSION, list(range(1, size))) == whole, "byte by byte"


LARGE = [
    *GREETING,
    *ENVELOPE,
    Packet(b"L", b"Long\0" + b"v" * 65_529 + b"\0"),
    Packet(b"N"),
    *(Packet(b"B", bytes([number]) * 65_535) for number in range(5)),
    Packet(b"B", b"b" * 16_384),
    Packet(b"E"),
    *message(body=200_000),
    QUIT,
]
"""Packets of the maximal size among small ones, in both directions."""


@pytest.mark.parametrize("mode", MODES)
def test_packets_of_the_maximal_size(staged: Staged, links: list[str], mode: str) -> None:
    recordings = []
    for link in links:
        with staged(link, mode).recorded() as (connection, recording):
            sender = threading.Thread(target=connection.send, args=[encoded(LARGE)])
            sender.start()  # the new body comes before all of it is read
            connection.hear_end()
            sender.join()
        recordings.append(recording)
    heard = same(recordings).heard
    assert b"".join(packet.data for packet in heard if packet.letter == b"b") == b"x" * 200_000


@pytest.mark.parametrize("mode", MODES)
def test_a_packet_above_the_maximal_size_ends_the_session(staged: Staged, links: list[str], mode: str) -> None:
    packets = [*GREETING, *ENVELOPE, Packet(b"N")]
    head = Packet(b"B", b"b" * 65_536).encode()[:5]
    recordings = []
    for link in links:
        with staged(link, mode).recorded() as (connection, recording):
            connection.send(encoded(packets) + head)
            connection.hear_end()
        recordings.append(recording)
    calls = same(recordings).calls
    assert calls[-2:] == ["abort", "close"]


only_with_poll = pytest.mark.skipif(waits_with_select(), reason="select serves no descriptor above 1023")


@only_with_poll
@pytest.mark.parametrize("mode", MODES)
def test_descriptors_above_1024(staged: Staged, links: list[str], mode: str) -> None:
    allow_descriptors(2100)
    cuts = [4, 5, 30, 200]
    expected = play(staged(links[0], mode), SESSION, cuts)
    for link in links:
        assert play(staged(link, mode, "descriptors=1500"), SESSION, cuts) == expected


def allow_descriptors(count: int) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most < count:
        pytest.skip(f"this process may open {most} descriptors at most, and needs {count}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


@pytest.mark.parametrize("mode", MODES)
def test_system_calls_that_are_interrupted(staged: Staged, links: list[str], mode: str) -> None:
    expected = play(staged(links[0], mode), SESSION, [])
    size = len(encoded(SESSION))
    for link in links:
        stage = staged(link, mode)
        with interruptions(stage.process.pid):
            assert play(stage, SESSION, list(range(1, size))) == expected


@contextlib.contextmanager
def interruptions(pid: int) -> Iterator[None]:
    """Signals for all threads of a process, again and again."""
    library = ctypes.CDLL(None)
    if not hasattr(library, "tgkill"):
        pytest.skip("no tgkill() to send a signal to another process's thread")
    if not Path(f"/proc/{pid}/task").exists():
        pytest.skip("which threads another process has is told in /proc")
    over = threading.Event()

    def interrupt() -> None:
        while not over.is_set():
            for thread in os.listdir(f"/proc/{pid}/task"):
                library.tgkill(pid, int(thread), signal.SIGUSR1)

    interrupter = threading.Thread(target=interrupt)
    interrupter.start()
    try:
        yield
    finally:
        over.set()
        interrupter.join()


# ---- Ends of a conversation


def close(connection: Connection) -> None:
    connection.close()


def reset(connection: Connection) -> None:
    connection.reset()


def half_close(connection: Connection) -> None:
    connection.socket.shutdown(socket.SHUT_WR)
    connection.hear_end()


@pytest.mark.parametrize("read", [True, False], ids=["answers read", "answers unread"])
@pytest.mark.parametrize("leave", [close, reset, half_close])
@pytest.mark.parametrize("mode", MODES)
def test_a_peer_that_vanishes_at_any_point(
    staged: Staged, links: list[str], mode: str, leave: Callable[[Connection], None], read: bool
) -> None:
    data = encoded(SESSION)
    heard = play(staged(links[0], mode), SESSION, []).heard
    ends = {0, len(data)}
    for packet in SESSION:
        ends |= {max(ends - {len(data)}) + length for length in (3, 5, len(packet.encode()))}
    for end in sorted(ends):
        due = answers_before(SESSION, mode, end)
        recordings = []
        for link in links:
            with staged(link, mode).recorded(int(end >= len(OFFER.encode()))) as (connection, recording):
                connection.send(data[:end])
                if read:
                    connection.hear(due)
                else:
                    connection.wait_for_bytes(len(encoded(heard[:due])))
                connection.wait_until_read()
                leave(connection)
            recordings.append(recording)
        assert all(recording == recordings[0] for recording in recordings), f"after {end} bytes"


@pytest.mark.parametrize("mode", MODES)
def test_a_new_session_on_the_same_connection(staged: Staged, links: list[str], mode: str) -> None:
    again = Packet(b"K")
    packets = [*GREETING, *MESSAGE, again, *GREETING[1:], *MESSAGE, again, *GREETING[1:], *MESSAGE, QUIT]
    bounds = [len(encoded(packets[:number])) for number in range(1, len(packets))]
    for cuts in ([], bounds):
        calls = same([play(staged(link, mode), packets, cuts, sessions=3) for link in links]).calls
        assert calls.count("close") == 3


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rest", [b"\0", b"\0\0\0\1A", b"\xff" * 70_000])
def test_bytes_after_quit_are_nobodys(staged: Staged, links: list[str], mode: str, rest: bytes) -> None:
    packets = [*GREETING, *MESSAGE]
    recordings = []
    for link in links:
        with staged(link, mode).recorded() as (connection, recording):
            connection.send(encoded(packets))
            connection.hear(answers_before(packets, mode, len(encoded(packets))))
            connection.try_to_send(QUIT.encode() + rest)
            connection.hear_end()
        recordings.append(recording)
    assert same(recordings).calls[-1] == "close"


@pytest.mark.parametrize("mode", MODES)
def test_a_handler_hears_at_once_that_nobody_is_there(staged: Staged, links: list[str], mode: str) -> None:
    for number, link in enumerate(links, MODES.index(mode) * len(links)):
        stage = staged(link, mode)
        with stage.recorded() as (connection, recording):
            connection.send(encoded([*GREETING, *message(line=number)]))
            stage.process.stdout.wait_for(f"waiting {number};")
            connection.reset()
            stage.process.say("go on")
        assert recording.calls[-3:] == [f"waiting {number}", "failed", "close"]


# ---- Time-outs: the only tests here that take a second


def test_a_peer_that_stops_in_the_middle_is_given_up(staged: Staged, links: list[str]) -> None:
    packets = [*GREETING, *MESSAGE]
    data = encoded(packets)
    ends = [len(encoded(packets[:number])) + more for number, more in ((1, 4), (5, 5), (8, 1), (10, 5))]
    recordings = []
    for link in links:
        stage = staged(link, "silent", "timeout=1")
        connections = [stage.connect() for _ in ends]
        for end, connection in zip(ends, connections, strict=True):
            connection.send(data[:end])
            connection.hear(answers_before(packets, "silent", end))
        for connection in connections:
            connection.hear_end()
            connection.close()
        recordings.append((sorted(stage.calls(len(ends))), [connection.heard for connection in connections]))
    assert all(recording == recordings[0] for recording in recordings)
    assert recordings[0][0].count("abort") == 2


@pytest.mark.parametrize(
    ("mode", "session", "letters"),
    [
        ("silent", [*GREETING, *message(body=20_000_000)], b"Ohpb"),
        ("replying", [*GREETING, *[UNKNOWN] * 50_000], b"Oc"),
    ],
    ids=["one large answer", "many small ones"],
)
def test_a_peer_that_does_not_read_is_given_up_and_holds_up_nobody(
    staged: Staged, links: list[str], mode: str, session: list[Packet], letters: bytes
) -> None:
    others = [*GREETING, *MESSAGE, QUIT]
    for link in links:
        stage = staged(link, mode, "timeout=1")
        if mode == "replying" and stage.process.socket.startswith("inet"):
            pytest.skip("TCP holds millions of small answers")
        slow, other = stage.connect(), stage.connect()
        sender = threading.Thread(target=slow.try_to_send, args=[encoded(session)])
        sender.start()
        slow.wait_for_bytes(100)
        other.send(encoded(others))
        other.hear_end()
        other.close()
        assert len(other.heard) == answers_before(others, mode, len(encoded(others)))
        assert stage.calls(2).count("close") == 2
        sender.join()
        slow.hear_end()
        assert {packet.letter for packet in slow.heard} == {bytes([letter]) for letter in letters}
        slow.close()


# ---- Many connections


STATM = "/proc/{}/statm"
MANY = 2000


def offered(stage: Stage, count: int) -> list[Connection]:
    """Open so many connections at once, each of them after its negotiation."""
    connections = [stage.connect() for _ in range(count)]
    for connection in connections:
        connection.send(OFFER.encode())
    for connection in connections:
        connection.hear(1)
    return connections


@only_with_poll
@pytest.mark.skipif(not Path(STATM.format("self")).exists(), reason="the size of a process is told in /proc")
def test_two_thousand_connections_at_once(staged: Staged, links: list[str]) -> None:
    allow_descriptors(MANY + 100)
    session = [*GREETING, *MESSAGE]
    expected = play(staged(links[0], "silent"), [*session, QUIT], [])
    idle = {}
    for link in links:
        stage = staged(link, "silent", f"backlog={MANY}")
        play(stage, [*session, QUIT], [])
        # The first half starts as many threads as there will be; the other one tells what a connection takes.
        connections = offered(stage, MANY // 2)
        before = resident(stage.process.pid)
        connections += offered(stage, MANY // 2)
        idle[link] = (resident(stage.process.pid) - before) // (MANY // 2)
        for connection in connections:
            connection.send(encoded(session[1:]))
        for connection in connections:
            connection.send(QUIT.encode())
            connection.hear_end()
            connection.close()
        assert all(connection.heard == expected.heard for connection in connections)
        assert sorted(stage.calls(MANY)) == sorted(expected.calls * MANY)
    # libmilter may have a thread for each connection; what was redirected adds nearly nothing.
    assert max(idle.values()) <= 25 * 1024, idle
    assert max(idle.values()) - idle["shared"] <= 4 * 1024, idle


def resident(pid: int) -> int:
    """Bytes of a process in memory."""
    return int(Path(STATM.format(pid)).read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("count", [4, 8, 64])
def test_sessions_that_never_pause_do_not_keep_others_waiting(staged: Staged, links: list[str], count: int) -> None:
    """libmilter's own way of handing out sessions to workers may leave one waiting for ever."""
    if "static" not in links:
        pytest.skip("libmilter's system calls are not redirected here")
    enough, far_too_much = 20, 10_000
    done, news = [0] * count, threading.Condition()
    connections = [staged("static", "silent").connect() for _ in range(count)]

    def talk(number: int) -> None:
        connection, heard = connections[number], 1
        connection.send(encoded(GREETING))
        while not over():
            heard += 3
            connection.send(encoded(MESSAGE))
            connection.hear(heard)
            with news:
                done[number] += 1
                news.notify()

    def over() -> bool:
        return min(done) >= enough or max(done) >= far_too_much

    talkers = [threading.Thread(target=talk, args=[number], daemon=True) for number in range(count)]
    for talker in talkers:
        talker.start()
    with news:
        news.wait_for(over, PATIENCE)
    assert min(done) >= enough, f"messages of each connection: {sorted(done)}"
    for talker, connection in zip(talkers, connections, strict=True):
        talker.join()
        connection.close()
    staged("static", "silent").calls(count)


@pytest.mark.parametrize("count", [3, 20, 100])
def test_as_many_messages_at_once_as_there_are(staged: Staged, links: list[str], count: int) -> None:
    """Each of them waits in its handler for the others."""
    if "static" not in links:
        pytest.skip("libmilter's system calls are not redirected here")
    stage = staged("static", "silent")
    session = [*GREETING, *message(meet=count), QUIT]
    connections = [stage.connect() for _ in range(count)]
    for connection in connections:
        connection.send(encoded(session))
    for connection in connections:
        connection.hear_end()
        connection.close()
        assert len(connection.heard) == answers_before(session, "silent", len(encoded(session)))
    stage.calls(count)
