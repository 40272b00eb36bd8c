# SPDX-License-Identifier: GPL-3.0-or-later
"""examples/clamav.py, with a small clamd of the tests' own, which speaks the protocol over real sockets."""

import contextlib
import socketserver
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from examples.clamav import Settings, filter_with
from milter._shim import lib
from milter.testing import Outcome, Quarantine
from tests.conftest import Serve
from tests.example_filters import delivered, field, refusal, send

EICAR = b"EICAR-STANDARD-ANTIVIRUS-TEST-FILE"
CLEAN = b"Subject: x\nX-Virus-Scanned: clean, I swear\n\nHi.\n"
INFECTED = b"Subject: x\nX-Virus-Scanned: clean, I swear\n\n" + EICAR + b"\n"


class Clamd(socketserver.StreamRequestHandler):
    """What clamd does with INSTREAM; ``answer`` replaces what it would say, ``limit`` is its StreamMaxLength."""

    answer: bytes | None = None
    limit = 1 << 30
    scanned: ClassVar[list[bytes]] = []
    barrier: threading.Barrier | None = None

    def handle(self) -> None:
        assert self.rfile.read(10) == b"zINSTREAM\0"
        content = bytearray()
        while size := struct.unpack("!L", self.rfile.read(4))[0]:
            if len(content) + size > self.limit:
                self.wfile.write(b"INSTREAM size limit exceeded. ERROR\0")
                return
            content += self.rfile.read(size)
        self.scanned.append(bytes(content))
        if self.barrier is not None:
            with contextlib.suppress(threading.BrokenBarrierError):
                self.barrier.wait(60)
        self.ends()
        usual = b"stream: Eicar-Test-Signature FOUND\0" if EICAR in content else b"stream: OK\0"
        self.wfile.write(usual if self.answer is None else self.answer)

    def ends(self) -> None:
        """Before the answer is given."""


class UnixServer(socketserver.ThreadingUnixStreamServer):
    request_queue_size = 128


class TcpServer(socketserver.ThreadingTCPServer):
    request_queue_size = 128


StartClamd = Callable[..., str]


@pytest.fixture
def clamd(tmp_path: Path) -> Iterator[StartClamd]:
    """Starts one, and tells where it listens."""
    servers: list[socketserver.BaseServer] = []

    def start(transport: str = "unix", kind: type[Clamd] = Clamd, **attributes: object) -> str:
        handler = type("Clamd", (kind,), {"scanned": [], **attributes})
        server: UnixServer | TcpServer
        if transport == "unix":
            server = UnixServer(str(tmp_path / "clamd.sock"), handler)
            name = f"unix:{tmp_path}/clamd.sock"
        else:
            server = TcpServer(("127.0.0.1", 0), handler)
            name = f"127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        servers.append(server)
        return name

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_a_clean_message_is_marked_and_a_virus_refused(serve: Serve, clamd: StartClamd, transport: str) -> None:
    peer = serve(filter_with(Settings(clamd(transport))))
    assert field(delivered(send(peer, CLEAN)), "X-Virus-Scanned") == "clean"
    assert refusal(send(peer, INFECTED)) == "554 virus found: Eicar-Test-Signature"


def test_the_whole_message_is_scanned_byte_for_byte(serve: Serve, clamd: StartClamd) -> None:
    scanned: list[bytes] = []
    content = b"Subject: x\r\n\r\n" + b"".join(b"line %07d\r\n" % number for number in range(200_000))
    app = filter_with(Settings(clamd(scanned=scanned)))
    send(serve(app), content)
    assert scanned == [content]


def test_a_virus_can_be_put_into_quarantine(serve: Serve, clamd: StartClamd) -> None:
    transcript = send(serve(filter_with(Settings(clamd(), quarantine=True))), INFECTED)
    assert transcript.outcome is Outcome.ACCEPTED
    assert transcript.end is not None
    assert Quarantine("virus Eicar-Test-Signature") in transcript.end.changes
    assert field(delivered(transcript), "X-Virus-Scanned") == "infected"


TROUBLE: list[tuple[str, dict[str, object]]] = [
    ("clamd says 'stream: no memory ERROR'", {"answer": b"stream: no memory ERROR\0"}),
    ("clamd says '\ufffd'", {"answer": b"\xff\0"}),
    ("clamd hung up after it said b''", {"answer": b""}),
    ("clamd ", {"limit": 10}),  # hung up, or what it says about the length, whatever comes first
]


@pytest.mark.parametrize(("says", "trouble"), TROUBLE, ids=["error", "nonsense", "hangs up", "too long"])
@pytest.mark.parametrize("size", [1, 200_000])
def test_without_an_answer_the_client_tries_again(
    serve: Serve,
    clamd: StartClamd,
    says: str,
    trouble: dict[str, object],
    size: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    transcript = send(serve(filter_with(Settings(clamd(**trouble)))), CLEAN + b"x\n" * size)
    assert refusal(transcript) == "451 the virus scanner is not available, try again later"
    assert f"could not be scanned: {says}" in caplog.text


def test_a_message_may_pass_unscanned(serve: Serve, tmp_path: Path) -> None:
    settings = Settings(f"unix:{tmp_path}/nobody.sock", pass_on_error=True)
    assert field(delivered(send(serve(filter_with(settings)), CLEAN)), "X-Virus-Scanned") == "no"


def test_nobody_there_is_no_clean_message(serve: Serve, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    transcript = send(serve(filter_with(Settings(f"unix:{tmp_path}/nobody.sock"))), CLEAN)
    assert transcript.outcome is Outcome.TEMPFAILED
    assert f"no connection to clamd at unix:{tmp_path}/nobody.sock: " in caplog.text


def test_a_scan_that_takes_too_long_is_given_up(
    serve: Serve, clamd: StartClamd, caplog: pytest.LogCaptureFixture
) -> None:
    barrier = threading.Barrier(2)
    transcript = send(serve(filter_with(Settings(clamd(barrier=barrier), timeout=0.01))), CLEAN)
    barrier.abort()
    assert transcript.outcome is Outcome.TEMPFAILED
    assert "could not be scanned: it took too long" in caplog.text


@pytest.mark.skipif(not lib.milter_io_wrapped(), reason="libmilter promises several sessions to one worker here")
def test_scans_run_at_once(serve: Serve, clamd: StartClamd) -> None:
    together = threading.Barrier(8)  # nobody gets an answer before all eight were asked
    peer = serve(filter_with(Settings(clamd(barrier=together))))
    outcomes: list[Outcome | None] = []
    clients = [threading.Thread(target=lambda: outcomes.append(send(peer, CLEAN).outcome)) for _ in range(8)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    assert outcomes == [Outcome.ACCEPTED] * 8


class Busy(Clamd):
    """Knows how many scans ran at once."""

    lock = threading.Lock()
    active = 0
    most = 0

    def handle(self) -> None:
        with self.lock:
            Busy.active += 1
            Busy.most = max(Busy.most, Busy.active)
        super().handle()

    def ends(self) -> None:
        with self.lock:
            Busy.active -= 1


def test_no_more_scans_run_at_once_than_allowed(serve: Serve, clamd: StartClamd) -> None:
    peer = serve(filter_with(Settings(clamd(kind=Busy), connections=1)))
    message = CLEAN + b"x\n" * 200_000
    clients = [threading.Thread(target=send, args=(peer, message)) for _ in range(8)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    assert Busy.most == 1


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLAMD", "localhost:3310")
    for name, value in {"TIMEOUT": "1", "CONNECTIONS": "2", "ON_VIRUS": "quarantine", "ON_ERROR": "accept"}.items():
        monkeypatch.setenv(f"CLAMAV_{name}", value)
    assert Settings.from_environment() == Settings("localhost:3310", 1.0, 2, quarantine=True, pass_on_error=True)
