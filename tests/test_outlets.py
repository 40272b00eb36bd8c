# SPDX-License-Identifier: GPL-3.0-or-later
"""Output and log that cannot be written: mail goes on, and what was lost is told."""

import contextlib
import errno
import io
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from milter import outlets
from milter.outlets import Outlet, patient_stream, reader_is_gone
from milter.testing import Client, Verdict
from tests.conftest import send_message
from tests.filter_process import PATIENCE
from tests.launched import BOTH, Program

CHATTY = """
import logging, sys
from milter import Context, Milter, Status

app = Milter("chatty")

@app.on_helo
def talk(ctx: Context, name: str) -> Status:
    print("printed", name)
    print("printed", name, file=sys.stderr, flush=True)
    sys.stdout.flush()
    logging.getLogger("mine").warning("logged %s", name)
    return Status.CONTINUE
"""


def verdict(path: str, helo: str = "client.example") -> Verdict:
    with contextlib.closing(Client.connect(path)) as client:
        client.negotiate()
        client.connect_info()
        greeting = client.helo(helo)
        if greeting is not None and greeting.verdict is not Verdict.CONTINUE:
            return greeting.verdict
        return send_message(client).answer.verdict


def fill(descriptor: int) -> None:
    os.set_blocking(descriptor, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(descriptor, b"x" * 4096)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(descriptor, b"x")
    os.set_blocking(descriptor, True)


def full_pipe() -> tuple[int, int]:
    reader, writer = os.pipe()
    fill(writer)
    return reader, writer


def full_socket() -> tuple[int, int]:
    reader, writer = socket.socketpair()
    fill(writer.fileno())
    return reader.detach(), writer.detach()


class Reader:
    """Reads a descriptor to its end, on a thread, and is asked for what came."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._text = b""
        self._news = threading.Condition()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def wait_for(self, text: bytes) -> None:
        with self._news:
            assert self._news.wait_for(lambda: text in self._text, PATIENCE), self._text[-2000:]

    def finish(self) -> bytes:
        self._thread.join(PATIENCE)
        return self._text

    def _read(self) -> None:
        with open(self._descriptor, "rb", buffering=0) as stream:
            while data := stream.read(65536):
                with self._news:
                    self._text += data.lstrip(b"x")
                    self._news.notify_all()


@pytest.mark.parametrize("make", [full_pipe, full_socket])
@pytest.mark.parametrize("options", [["--access-log"], ["--access-log", "--log-format", "json", "--workers", "2"]])
def test_output_that_is_not_read_stops_no_mail(
    tmp_path: Path, make: Callable[[], tuple[int, int]], options: list[str]
) -> None:
    reader, writer = make()
    redirect = f"os.dup2({writer}, 1); os.dup2({writer}, 2); os.close({writer})"
    with Program("milter run", CHATTY, tmp_path, *options, before=redirect, descriptors=[writer]) as process:
        os.close(writer)
        for _ in range(5):
            assert verdict(process.socket) is Verdict.CONTINUE
        pipe = Reader(reader)  # now it is read
        while b"has room again; lines lost until now: " not in pipe._text:
            assert verdict(process.socket, "again.example") is Verdict.CONTINUE
        pipe.wait_for(b"logged again.example")
        pipe.wait_for(b"printed again.example")
        process.stop()
    assert b"printed client.example" not in pipe.finish()


@pytest.mark.parametrize("number", [1, 2])
def test_a_reader_that_has_gone_stops_no_mail(tmp_path: Path, number: int) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    redirect = f"os.dup2({writer}, {number})"
    with Program("milter run", CHATTY, tmp_path, "--access-log", before=redirect, descriptors=[writer]) as process:
        os.close(writer)
        for _ in range(3):
            assert verdict(process.socket) is Verdict.CONTINUE
        process.stop()
    if number == 1:
        assert process.stderr.text.count("standard output cannot be written (Broken pipe): lines are lost") == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a disk that is always full")
def test_a_full_disk_stops_no_mail(tmp_path: Path) -> None:
    redirect = "f = os.open('/dev/full', os.O_WRONLY); os.dup2(f, 1); os.dup2(f, 2)"
    with Program("milter run", CHATTY, tmp_path, "--access-log", before=redirect) as process:
        for _ in range(3):
            assert verdict(process.socket) is Verdict.CONTINUE
        process.stop()


@pytest.mark.parametrize("by", BOTH)
def test_stray_bytes_can_be_printed(tmp_path: Path, by: str) -> None:
    strict = {"PYTHONIOENCODING": "ascii:strict"}
    with Program(by, CHATTY, tmp_path, environment=strict) as process:
        assert verdict(process.socket, "caf\udce9") is Verdict.CONTINUE
        process.stop()
    assert r"printed caf\udce9" in process.stdout.lines
    assert any(r"logged caf" in line for line in process.stderr.lines)


# ---- One outlet --------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(outlets, "time", clock)
    return clock


class Place:
    """Where an outlet leads in a test: it takes what it is sent, or uses up the time that it gets."""

    def __init__(self, clock: Clock) -> None:
        self.full = False
        self.given: list[float] = []
        self._clock = clock

    def send(self, data: bytes, seconds: float) -> None:
        self.given.append(round(seconds, 3))
        if self.full:
            self._clock.now += seconds
            raise BlockingIOError(errno.EAGAIN, "full")


def test_the_waiting_is_a_small_part_of_the_time(clock: Clock) -> None:
    place = Place(clock)
    outlet = Outlet("it", place.send)
    place.full = True
    for pause in (0, 0, 2, 1, 1000, 0):
        clock.now += pause
        outlet.write(b"line\n")
    assert place.given == [1.0, 0.0, 0.2, 0.1, 1.0, 0.0]


def test_a_reader_that_takes_lines_now_and_then_slows_nobody_either(clock: Clock) -> None:
    place = Place(clock)
    outlet = Outlet("it", place.send)
    began = clock.now
    for number in range(1000):
        place.full = number % 2 == 0
        clock.now += 0.01
        outlet.write(b"line\n")
    assert clock.now - began < 10 * 1.2 + 1  # ten seconds of work


def test_lost_lines_are_counted_and_told_when_there_is_room(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    place = Place(clock)
    outlet = Outlet("it", place.send)
    place.full = True
    for text in (b"one\n", b"two\nthree\n", b"four"):
        outlet.write(text)
    assert caplog.messages == [
        "it cannot be written (full): lines are lost until that is mended. Mail is served as before"
    ]
    place.full = False
    outlet.write(b"five\n")
    outlet.write(b"six\n")
    assert caplog.messages[1:] == ["it has room again; lines lost until now: 4"]


@pytest.fixture(params=["opened again", "not to be opened"])
def pipe(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, io.TextIOWrapper]]:
    """The reading end of a pipe, and an ordinary stream that writes into it."""
    if request.param == "not to be opened":

        def refuse(*arguments: object) -> int:
            raise PermissionError(errno.EACCES, "another user's")

        monkeypatch.setattr(os, "open", refuse)
    reader, writer = os.pipe()
    with open(writer, "w", encoding="utf-8") as stream:
        yield reader, stream
    os.close(reader)


def test_a_full_pipe_takes_lines_again_once_it_is_read(pipe: tuple[int, io.TextIOWrapper]) -> None:
    reader, stream = pipe
    lost: list[OSError] = []
    patient = patient_stream(stream, "it", lost.append)
    fill(stream.fileno())
    patient.write("lost\n")
    patient.flush()
    assert [str(failure) for failure in lost] == [f"[Errno {errno.EAGAIN}] nothing reads it, or too slowly"]
    os.read(reader, 1 << 20)
    patient.write("kept\n")
    patient.flush()
    assert os.read(reader, 1 << 20).lstrip(b"x") == b"kept\n"


def test_while_a_loss_is_told_others_can_use_the_stream(pipe: tuple[int, io.TextIOWrapper]) -> None:
    """As logging does: one thread has its lock, and waits for the stream; the one that tells waits for that lock."""
    _, stream = pipe
    other_is_done = threading.Event()

    def use_it() -> None:
        patient.flush()
        other_is_done.set()

    def tell(failure: OSError) -> None:
        threading.Thread(target=use_it, daemon=True).start()
        assert other_is_done.wait(PATIENCE)

    patient = patient_stream(stream, "it", tell)
    fill(stream.fileno())
    patient.write("lost\n")
    patient.flush()
    assert other_is_done.is_set()


def test_a_line_that_was_cut_ends_before_the_next_one(pipe: tuple[int, io.TextIOWrapper]) -> None:
    reader, stream = pipe
    patient = patient_stream(stream, "it", lambda failure: None)
    patient.write("y" * (1 << 21))
    patient.flush()
    begun = os.read(reader, 1 << 21)
    assert set(begun) == {ord("y")}
    patient.write("kept\n")
    patient.flush()
    assert os.read(reader, 1 << 20) == b"\nkept\n"


def test_much_goes_through_a_pipe_that_is_read(pipe: tuple[int, io.TextIOWrapper]) -> None:
    reader, stream = pipe
    patient = patient_stream(stream, "it")
    gathered = Reader(os.dup(reader))
    text = "y" * (1 << 20)
    print(text, file=patient, flush=True)
    gathered.wait_for(text.encode() + b"\n")


def test_a_patient_stream_is_what_it_stands_for(pipe: tuple[int, io.TextIOWrapper]) -> None:
    _, stream = pipe
    patient = patient_stream(stream, "it")
    assert patient.fileno() == stream.fileno()
    assert not patient.isatty()
    assert patient_stream(patient, "it") is patient


def test_the_flags_of_the_descriptor_stay(pipe: tuple[int, io.TextIOWrapper]) -> None:
    _, stream = pipe
    patient_stream(stream, "it").write("x")
    assert os.get_blocking(stream.fileno())


def test_what_has_no_descriptor_stays_as_it_is() -> None:
    stream = io.StringIO()
    assert patient_stream(stream, "it") is stream
    assert not reader_is_gone(stream)
