# SPDX-License-Identifier: GPL-3.0-or-later
"""The benchmark: its load generator tells right filters from wrong ones, and a run gives the figures it should."""

import json
import runpy
import socket
import sys
import threading
import xml.etree.ElementTree
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import __main__ as command
from benchmarks import chart, report, waiting
from benchmarks.contenders import Contender, Program
from benchmarks.generator import Generator, LoadFailed, Told
from benchmarks.process import FilterProcess, StartFailed
from benchmarks.requirements import REQUIRED, judge
from benchmarks.workshop import HERE, Workshop
from milter import Context, EomContext, Milter, Params, Status

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the benchmark reads /proc")

SIMPLE = {"connections": 3, "per_connection": 2, "messages": 40}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("workshop"))


@pytest.fixture(scope="module")
def generator(workshop: Workshop) -> Generator:
    return Generator(workshop.load())


def counting(**options: Any) -> Milter[Any, Any]:
    """A filter that counts as it should; what it makes of the sum, its caller adds."""
    app: Milter[Any, Any] = Milter("counting", **options)

    @app.on_mail
    def begin(ctx: Context, sender: str, params: Params) -> None:
        ctx.transaction.sum = 0

    @app.on_header
    def header(ctx: Context, name: str, value: str) -> None:
        value = value.removeprefix(" ") if options.get("leading_space") else value
        ctx.transaction.sum += len(value.encode("utf-8", "surrogateescape"))

    @app.on_body
    def body(ctx: Context, chunk: bytes) -> None:
        ctx.transaction.sum += len(chunk)

    return app


def adding(change: Callable[[EomContext], Status | None], **options: Any) -> Milter[Any, Any]:
    app = counting(**options)
    app.on_eom(change)
    return app


def play(generator: Generator, app: Milter[Any, Any], directory: Path, **options: float) -> Told:
    with app.start(f"unix:{directory}/f.sock", grace=0) as server:
        return generator.run(server.socket, **{**SIMPLE, **options})


# ---- Right filters ---------------------------------------------------------------------------


def right(ctx: EomContext) -> None:
    ctx.add_header("X-Sum", str(ctx.transaction.sum))


@pytest.mark.parametrize(
    "work",
    [
        pytest.param({}, id="some messages a connection"),
        pytest.param({"per_connection": 1}, id="a message a connection"),
        pytest.param({"per_connection": 0}, id="long-lived"),
        pytest.param({"body": 0}, id="no body"),
        pytest.param({"body": 300000}, id="several chunks"),
        pytest.param({"recipients": 3, "headers": 1}, id="three recipients"),
        pytest.param({"headers": 0}, id="no header"),
    ],
)
def test_a_right_filter(generator: Generator, tmp_path: Path, work: dict[str, float]) -> None:
    told = play(generator, adding(right), tmp_path, **work)
    assert (told["messages"], told["wrong"], told["complaints"]) == (40, 0, [])
    assert 0 < told["latency_us"]["p50"] <= told["latency_us"]["p99"] <= told["latency_us"]["max"]
    assert len(told["longest_us"]) == 3
    assert max(told["longest_us"]) >= told["latency_us"]["max"]


def test_a_right_filter_that_takes_the_leading_space(generator: Generator, tmp_path: Path) -> None:
    def right_with_space(ctx: EomContext) -> None:
        ctx.add_header("X-Sum", f" {ctx.transaction.sum}")

    assert play(generator, adding(right_with_space, leading_space=True), tmp_path)["wrong"] == 0
    assert play(generator, adding(right, leading_space=True), tmp_path)["messages"] == 0


@pytest.mark.parametrize("script", ["milter_replying", "milter_observing"])
def test_the_benchmarks_own_filters(generator: Generator, tmp_path: Path, script: str) -> None:
    app = runpy.run_path(str(HERE / "filters" / f"{script}.py"))["app"]
    told = play(generator, app, tmp_path)
    assert (told["messages"], told["wrong"]) == (40, 0)


def test_the_filter_that_waits(generator: Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = str(HERE / "filters" / "milter_waiting.py")
    monkeypatch.setattr(sys, "argv", [script, "0.001"])
    told = play(generator, runpy.run_path(script)["app"], tmp_path, connections=40, per_connection=1)
    assert (told["messages"], told["wrong"]) == (40, 0)


@pytest.mark.parametrize(
    ("told", "code", "verdict"),
    [
        ({"messages": 500, "wrong": 0, "seconds": 1.99}, 0, "ok"),
        ({"messages": 500, "wrong": 0, "seconds": 2.01}, 1, "MISSED"),
        ({"messages": 499, "wrong": 0, "seconds": 1.5}, 1, "MISSED"),
        ({"messages": 500, "wrong": 1, "seconds": 1.5}, 1, "MISSED"),
    ],
)
def test_waiting_is_judged(told: Told, code: int, verdict: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert waiting.judge({"complaints": ["no answer"], **told}, 500, 1.0, 50000) == code
    said = capsys.readouterr().out
    assert f"(required: all within 2 s): {verdict}." in said
    assert "wrong: no answer" in said


# ---- Wrong filters ---------------------------------------------------------------------------


def off_by_one(ctx: EomContext) -> None:
    ctx.add_header("X-Sum", str(ctx.transaction.sum + 1))


def constant(ctx: EomContext) -> None:
    ctx.add_header("X-Sum", "5120")


def wrong_name(ctx: EomContext) -> None:
    ctx.add_header("X-Summ", str(ctx.transaction.sum))


def twice(ctx: EomContext) -> None:
    right(ctx)
    right(ctx)


def nothing(ctx: EomContext) -> None:
    pass


def inserting(ctx: EomContext) -> None:
    ctx.insert_header(1, "X-Sum", str(ctx.transaction.sum))


def refusing(ctx: EomContext) -> Status:
    right(ctx)
    return Status.REJECT


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (off_by_one, "added header 'X-Sum?"),
        (constant, "added header 'X-Sum?5120?', due was 'X-Sum?"),
        (wrong_name, "added header 'X-Summ?"),
        (twice, "more than one header was added"),
        (nothing, "no header was added"),
        (inserting, "the answer to E was i"),
        (refusing, "the answer to E was r"),
    ],
)
def test_a_wrong_filter(
    generator: Generator, tmp_path: Path, change: Callable[[EomContext], Status | None], complaint: str
) -> None:
    told = play(generator, adding(change), tmp_path)
    # A constant is right for one message of 64, and in 40 of them at most once.
    assert told["wrong"] >= 39
    assert told["wrong"] + told["messages"] in (40, 41)  # the rehearsal counts when it was wrong
    assert complaint in told["complaints"][0]


@pytest.mark.parametrize(
    ("stage", "verdict", "complaint"),
    [
        ("on_connect", Status.TEMPFAIL, "the answer to C was t"),
        ("on_helo", Status.ACCEPT, "the answer to H was a"),
        ("on_mail", Status.REJECT, "the answer to M was r"),
        ("on_rcpt", Status.REJECT, "the answer to R was r"),
        ("on_header", Status.ACCEPT, "the answer to N was a"),
        ("on_body", Status.DISCARD, "the answer to B was d"),
    ],
)
def test_a_filter_that_decides_early(
    generator: Generator, tmp_path: Path, stage: str, verdict: Status, complaint: str
) -> None:
    app = adding(right)
    handlers: dict[str, Callable[..., Status]] = {
        "on_helo": lambda ctx, name: verdict,
        "on_body": lambda ctx, chunk: verdict,
    }
    getattr(app, stage)(handlers.get(stage, lambda ctx, first, second: verdict))
    told = play(generator, app, tmp_path)
    assert told["messages"] == 0
    assert told["wrong"] >= 40
    assert complaint in told["complaints"]


@pytest.fixture
def stubborn(tmp_path: Path) -> Iterator[Callable[[bytes | None], str]]:
    """Makes a peer that answers each connection with some bytes, or closes it (None)."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s.sock"))
        listener.listen()
        kept = []

        def serve(answer: bytes | None) -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                if answer is None:
                    connection.close()
                else:
                    connection.sendall(answer)
                    kept.append(connection)

        def start(answer: bytes | None) -> str:
            threading.Thread(target=serve, args=[answer], daemon=True).start()
            return f"unix:{tmp_path}/s.sock"

        yield start
        listener.shutdown(socket.SHUT_RDWR)
        for connection in kept:
            connection.close()


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (None, "the filter closed the connection before the"),
        (b"", "no answer to O within 1 seconds"),
        (b"\0\0\0\1c", "the answer to the negotiation was c"),
        (b"\7\0\0\1O", "a packet of 117440513 bytes"),
    ],
)
def test_a_peer_that_is_no_filter(
    generator: Generator, stubborn: Callable[[bytes | None], str], answer: bytes | None, complaint: str
) -> None:
    told = generator.run(stubborn(answer), messages=3, patience=1)
    assert told["messages"] == 0
    assert told["wrong"] > 0
    assert complaint in told["complaints"][0]


def test_no_filter(generator: Generator, tmp_path: Path) -> None:
    told = generator.run(f"unix:{tmp_path}/none.sock")
    assert "no connection" in told["complaints"][0]
    with pytest.raises(LoadFailed, match="a socket is unix:PATH or inet:PORT@HOST"):
        generator.run("none.sock")


# ---- What it says ----------------------------------------------------------------------------


class Listener:
    """A filter on the bare protocol: agrees to `steps`, answers what `replies` says, and keeps what it was told."""

    def __init__(self, path: Path, steps: int, replies: dict[str, bytes]) -> None:
        self.socket = f"unix:{path}"
        self.connections: list[list[bytes]] = []
        self._steps = steps.to_bytes(4, "big")
        self._replies = replies
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        with self._listener:
            while True:
                try:
                    connection, _ = self._listener.accept()
                except OSError:
                    return
                told: list[bytes] = []
                self.connections.append(told)
                with connection, connection.makefile("rb") as stream:
                    while size := stream.read(4):
                        packet = stream.read(int.from_bytes(size, "big"))
                        told.append(packet)
                        self._answer(connection, chr(packet[0]))

    def _answer(self, connection: socket.socket, letter: str) -> None:
        default = {"D": b"", "A": b"", "Q": b"", "O": b"O\0\0\0\6\0\0\0\1" + self._steps}.get(letter, b"c")
        answer = self._replies.get(letter, default)
        if answer:
            connection.sendall(len(answer).to_bytes(4, "big") + answer)

    def finish(self) -> None:
        """Ends once all that was sent has been read."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()

    def commands(self) -> list[str]:
        """Of each connection the letters; a packet of macros is the small letter of the command that it belongs to."""
        return ["".join(map(self._letter, told)) for told in self.connections]

    @staticmethod
    def _letter(packet: bytes) -> str:
        return chr(packet[1]).lower() if packet[:1] == b"D" else chr(packet[0])


def listen(generator: Generator, directory: Path, steps: int, replies: dict[str, bytes], **work: float) -> Listener:
    """What a message, or several, are for such a filter; the rehearsal is the first connection."""
    listener = Listener(directory / "l.sock", steps, replies)
    generator.run(listener.socket, **{"headers": 2, "body": 100, "messages": 1, **work})
    listener.finish()
    return listener


def test_it_says_what_postfix_says(generator: Generator, tmp_path: Path) -> None:
    listener = listen(generator, tmp_path, 0, {}, recipients=2, per_connection=2, messages=3)
    opening, message = "OcChH", "mMrRrRtTlLlLnNbBeE"
    ended = "AAQ"
    assert listener.commands() == [
        opening + message + ended,
        opening + message + "A" + message + ended,
        opening + message + ended,
    ]
    macros = [packet for packet in listener.connections[0] if packet[:1] == b"D"]
    assert [packet[1:2] for packet in macros] == [b"C", b"H", b"M", b"R", b"R", b"T", b"L", b"L", b"N", b"B", b"E"]
    assert [b"i\0" in packet for packet in macros] == [False] * 4 + [True] * 7


def test_declined_steps_are_left_out(generator: Generator, tmp_path: Path) -> None:
    declined = 0x1 | 0x2 | 0x4 | 0x8 | 0x10 | 0x20 | 0x40 | 0x200
    assert listen(generator, tmp_path, declined, {}).commands()[0] == "OchmrteEAAQ"


def test_macros_that_were_asked_for(generator: Generator, tmp_path: Path) -> None:
    asked = b"O\0\0\0\6\0\0\1\1\0\0\0\0" + b"\0\0\0\2{client_addr} j\0" + b"\0\0\0\5{i} {none}\0"
    told = listen(generator, tmp_path, 0, {"O": asked}).connections[0]
    assert b"DM{client_addr}\x00192.0.2.8\0j\0mx.sink.example\0" in told
    assert b"DE{i}\x004YbQ2x3kTzz9rjV\0" in told


def test_skip_leaves_out_what_repeats(generator: Generator, tmp_path: Path) -> None:
    skipping = {"R": b"s", "L": b"s", "B": b"s"}
    listener = listen(generator, tmp_path, 0x400, skipping, recipients=3, headers=3, body=200000)
    assert listener.commands()[0] == "OcChHmMrRtTlLnNbBeEAAQ"


def test_values_come_with_the_leading_space_if_agreed(generator: Generator, tmp_path: Path) -> None:
    with_space = listen(generator, tmp_path, 0x100000, {}).connections[0]
    assert [packet.split(b"\0")[1][:1] for packet in with_space if packet[:1] == b"L"] == [b" ", b" "]


# ---- A run -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("results") / "results.json"
    some = ["--only", "each-8", "--only", "unix-1", "--only", "tcp-1", "--only", "idle", "--only", "soak"]
    filters = ["--filter", "c-nr", "--filter", "c-replying"]
    quickly = ["--quick", "--seconds", "0.05", "--soak", "40", "--json", str(file), "--cache", str(workshop.directory)]
    assert command.main([*some, *filters, *quickly]) == 0
    read: dict[str, Any] = json.loads(file.read_text())
    return read


def test_the_results_have_all_that_the_report_needs(results: dict[str, Any]) -> None:
    assert results.keys() == {"format", "machine", "settings", "contenders", "scenarios", "required"}
    assert results["scenarios"].keys() == {"each-8", "unix-1", "tcp-1", "idle", "soak"}
    for name, scenario in results["scenarios"].items():
        assert scenario["results"].keys() == {"c-nr", "c-replying"}
        for result in scenario["results"].values():
            assert result["peak_rss_kib"] >= result["rss_kib"] > 0
            assert result["switches_per_message"] > 0
            assert len(result["rounds"]) == (1 if name in ("idle", "soak") else 2)
    rates = results["scenarios"]["each-8"]["results"]["c-nr"]["median"]
    assert rates.keys() >= {"per_second", "p50_us", "p99_us", "max_us", "load_share"}
    assert "kib_per_connection" in results["scenarios"]["idle"]["results"]["c-nr"]["median"]
    assert len(results["scenarios"]["soak"]["results"]["c-nr"]["rounds"][0]["rss_kib"]) == 21
    assert {one["verdict"] for one in results["required"]} == {"not measured"}


def test_the_report_shows_each_filter(results: dict[str, Any]) -> None:
    for shown in (report.text(results), report.markdown(results)):
        assert shown.count("C, replying") >= 5
        assert "8 connections, a message each" in shown
        assert "WRONG" not in shown
    document = report.fill(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n", results)
    assert document.startswith(f"before\n{report.BEGIN}\n")
    assert document.endswith(f"{report.END}\nafter\n")
    assert "old" not in document


def test_the_chart_is_well_formed(results: dict[str, Any]) -> None:
    drawn = xml.etree.ElementTree.fromstring(chart.draw(results))
    labels = {element.text for element in drawn.iter("{http://www.w3.org/2000/svg}text")}
    assert labels >= {"C, no reply", "C, replying", "1.00"}


def test_a_wrong_filter_gets_no_figures(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "wrong.py"
    source = (HERE / "filters" / "milter_replying.py").read_text()
    script.write_text(source.replace("str(ctx.transaction.size)", "str(ctx.transaction.size + 1)"))
    wrong = Contender("wrong", "the wrong one", lambda _: Program([sys.executable, str(script)]))
    silent = Contender(
        "silent", "one that ends", lambda _: Program([sys.executable, "-c", "raise OSError('no luck')"]), optional=True
    )
    monkeypatch.setattr(command, "CONTENDERS", [wrong, silent])
    monkeypatch.setenv("PYTHONPATH", str(HERE.parent))

    quickly = ["--quick", "--only", "each-8", "--seconds", "0.05", "--cache", str(workshop.directory)]
    assert command.main(quickly) == 1
    shown = capsys.readouterr().out
    assert "the wrong one: WRONG: " in shown
    assert "added header 'X-Sum?" in shown
    assert "one that ends: not measured: it does not start: OSError: no luck" in shown
    rows = [line.split() for line in shown.splitlines() if line.startswith(("  the wrong one", "  one that ends"))]
    assert [set(row[3:]) for row in rows] == [{"–"}, {"–"}]


def test_requirements_are_judged() -> None:
    def rate(per_second: float) -> dict[str, Any]:
        return {"median": {"per_second": per_second}, "rounds": [{"per_second": per_second}]}

    def verdict(ours: float, theirs: float) -> str:
        results = {"milter-message": rate(ours), "c-nr": rate(theirs)}
        judged = judge({"each-8": {"results": results}})
        return str(judged[0]["verdict"])

    assert REQUIRED[0].limit == 1.3
    assert verdict(1300, 1000) == "ok"
    assert verdict(1299, 1000) == "MISSED"
    idle = {"median": {"kib_per_connection": 25.1}, "rounds": []}
    judged = {one["what"]: one for one in judge({"idle": {"results": {"milter-message": idle}}})}
    assert judged["on_message, memory of an idle connection"]["verdict"] == "MISSED"


def test_a_filter_does_not_import_what_the_benchmark_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    program = [sys.executable, "-c", "import os; print('at', os.environ.get('PYTHONPATH'))"]
    with pytest.raises(StartFailed, match="at None"):
        FilterProcess(Program(program), "unix", tmp_path, "asked")
    with pytest.raises(StartFailed, match="at /elsewhere"):
        FilterProcess(Program(program, {"PYTHONPATH": "/elsewhere"}), "unix", tmp_path, "told")
