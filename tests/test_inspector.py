# SPDX-License-Identifier: GPL-3.0-or-later
"""``milter inspect``, ``milter check`` and ``milter version``, as a person runs them."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from milter.testing import Client, Verdict
from tests.conftest import send_message
from tests.filter_process import FilterProcess, RunFilter, running_filters
from tests.launched import Launched
from tests.test_outlets import fill

STAGES = ["negotiate", "connect", "helo", "mail", "rcpt", "data", "header", "eoh", "body", "eom", "close"]


@pytest.fixture
def run_filter() -> Iterator[RunFilter]:
    with running_filters() as run:
        yield run


def milter(*arguments: str, code: int = 0) -> str:
    """Run ``milter`` to its end; its standard output."""
    process = subprocess.run([sys.executable, "-m", "milter", *arguments], capture_output=True, text=True, check=False)
    assert process.returncode == code, process.stderr
    return process.stdout + process.stderr


def converse(process: FilterProcess) -> None:
    """A message in which much is unusual."""
    client = Client.connect(process.socket)
    client.negotiate()
    client.macros(b"C", {"j": "mta.example", "{client_addr}": "192.0.2.1"})
    client.connect_info("client\x1b[31m.example", "192.0.2.1")
    client.helo("caf\udce9")
    client.unknown("FOO bar")
    client.macros(b"M", {"{auth_authen}": "ann"})
    client.mail("<ann@client.example>", "SIZE=100")
    client.abort()
    client.mail("<>")
    client.rcpt("<bob@mta.example>", "NOTIFY=NEVER")
    client.macros(b"T", {"i": "4F00"})
    client.data()
    client.header("Subject", "folded\n twice\n\tover")
    client.eoh()
    client.body(b"line\r\n\0\xff\x07\r\n")
    client.end_of_message()
    client.quit()
    client.wait_for_close()


def test_inspect_prints_each_stage_with_arguments_and_macros(run_filter: RunFilter) -> None:
    inspector = run_filter("-m", "milter", "inspect", "inet:0@127.0.0.1")
    converse(inspector)
    inspector.stop()
    stages = [line.split()[1].lower() for line in inspector.stdout.lines if line.startswith("[")]
    assert stages == ["negotiate", "connect", "helo", "unknown", "mail", "abort", *STAGES[3:]]
    text = inspector.stdout.text
    for piece in (
        r"hostname     client\x1b[31m.example",
        r"address      192.0.2.1:0",
        r"name         caf\xe9",
        "command      FOO bar",
        "params       SIZE=100",
        "params       none",
        r"\tover",
        r"chunk        line",
        r"\x00\xff\x07",
        "{auth_authen}        ann",
        "i                    4F00",
        "recipients   bob@mta.example",
    ):
        assert piece in text
    assert "\x1b" not in text
    assert inspector.stderr.lines == ["inspecting on inet:0@127.0.0.1; Ctrl-C ends", "inspector ended"]


def test_inspect_repeats_a_macro_only_when_it_changes(run_filter: RunFilter) -> None:
    inspector = run_filter("-m", "milter", "inspect", "inet:0@127.0.0.1")
    converse(inspector)
    inspector.stop()
    assert len(re.findall(r"^    j +mta\.example$", inspector.stdout.text, re.MULTILINE)) == 1


def test_inspect_prints_json_objects_with_all_macros(run_filter: RunFilter) -> None:
    inspector = run_filter("-m", "milter", "inspect", "--json", "inet:0@127.0.0.1")
    converse(inspector)
    inspector.stop()
    events = [json.loads(line) for line in inspector.stdout.lines]
    assert [event["stage"] for event in events if event["stage"] not in ("unknown", "abort")] == [
        "negotiate",
        "connect",
        "helo",
        "mail",
        *STAGES[3:],
    ]
    by_stage = {event["stage"]: event for event in events}
    assert len({event["connection"] for event in events}) == 1
    assert by_stage["helo"]["name"].encode("utf-8", "surrogateescape") == b"caf\xe9"
    assert by_stage["header"] | {"macros": {}} == {
        "connection": events[0]["connection"],
        "stage": "header",
        "name": "Subject",
        "value": "folded\n twice\n\tover",
        "macros": {},
    }
    assert by_stage["header"]["macros"]["j"] == "mta.example"
    assert by_stage["header"]["macros"]["i"] == "4F00"
    assert by_stage["body"]["chunk"].encode("utf-8", "surrogateescape") == b"line\r\n\0\xff\x07\r\n"


@pytest.mark.parametrize(("choice", "coloured"), [("always", True), ("never", False), ("auto", False)])
def test_inspect_colours_a_terminal_and_not_a_pipe(run_filter: RunFilter, choice: str, coloured: bool) -> None:
    inspector = run_filter("-m", "milter", "inspect", "--color", choice, "inet:0@127.0.0.1")
    converse(inspector)
    inspector.stop()
    assert ("\x1b[1mCONNECT\x1b[0m" in inspector.stdout.text) is coloured


def test_inspect_colours_a_terminal(tmp_path: Path) -> None:
    try:
        here, there = os.openpty()
    except OSError as failure:  # a bare chroot has no /dev/pts
        pytest.skip(f"no pseudo-terminal: {failure}")
    with subprocess.Popen(
        [sys.executable, "-m", "milter", "inspect", f"unix:{tmp_path}/s"], stdout=there, stderr=subprocess.PIPE
    ) as inspector:
        assert inspector.stderr is not None
        inspector.stderr.readline()
        client = Client.connect(f"unix:{tmp_path}/s")
        client.negotiate()
        client.connect_info()
        client.close()
        inspector.send_signal(signal.SIGINT)
        assert inspector.wait() == 0
    os.close(there)
    assert b"\x1b[1mCONNECT\x1b[0m" in os.read(here, 65536)
    os.close(here)


def test_inspect_tells_a_bad_socket_in_one_line(tmp_path: Path) -> None:
    assert milter("inspect", f"unix:{tmp_path}/missing/s", code=1).count("\n") == 1


def test_check_shows_what_a_filter_does(run_filter: RunFilter) -> None:
    guard = run_filter("examples/guard.py", "inet:0@127.0.0.1")
    output = milter("check", guard.socket)
    assert re.search(r"^verdict +accepted$", output, re.MULTILINE)
    assert "\n+X-Guard: passed\n" in output


def test_check_shows_a_rejected_recipient_and_exits_with_1(run_filter: RunFilter) -> None:
    guard = run_filter("examples/guard.py", "inet:0@127.0.0.1")
    output = milter("check", guard.socket, "--to", "boss@internal.example", code=1)
    assert "550 5.7.1 internal addresses are not for you, we are 100% sure" in output


def test_check_sends_a_message_from_a_file(run_filter: RunFilter, tmp_path: Path) -> None:
    guard = run_filter("examples/guard.py", "inet:0@127.0.0.1")
    mail = tmp_path / "mail.eml"
    mail.write_bytes(b"Subject: forbidden\n\nping\n")
    output = milter("check", guard.socket, str(mail), code=1)
    assert "554-5.7.1 this subject is forbidden" in output
    mail.write_bytes(b"Subject: ping\n\nping\n")
    assert "\n-ping\n+pong\n" in milter("check", guard.socket, str(mail))


def test_check_tells_that_nobody_is_there(tmp_path: Path) -> None:
    assert "is the filter running" in milter("check", f"unix:{tmp_path}/s", code=2)


def test_version_names_the_library_and_libmilter() -> None:
    lines = milter("version").splitlines()
    assert re.fullmatch(r"milter \d+\.\d+\.\d+", lines[0])
    assert re.fullmatch(r"libmilter 1\.0\.\d+ running, 1\.0\.\d+ compiled against", lines[1])
    assert re.fullmatch(
        r"libmilter is linked (shared|(static|shared), I/O wrapped: .*accept close .*poll .*)", lines[2]
    )


def test_the_version_of_libmilter_is_a_function_too() -> None:
    import milter as package

    assert package.libmilter_version()[:2] == (1, 0)


def test_help_names_the_commands() -> None:
    output = milter("--help")
    for command in ("inspect", "check", "version"):
        assert command in output
    milter("nonsense", code=2)


def test_inspect_shows_a_client_without_an_address(run_filter: RunFilter) -> None:
    inspector = run_filter("-m", "milter", "inspect", "inet:0@127.0.0.1")
    client = Client.connect(inspector.socket)
    client.negotiate()
    client.connect_info("unknown", None)
    client.close()
    inspector.stdout.wait_for("CLOSE")
    assert "    address      unknown" in inspector.stdout.lines


# ---- A reader that goes --------------------------------------------------------------------------


def test_inspect_ends_when_its_reader_has_gone_and_defers_no_mail(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    arguments = ("-m", "milter", "inspect", f"unix:{tmp_path}/s")
    with Launched(f"os.dup2({writer}, 1)", *arguments, descriptors=[writer]) as inspector:
        os.close(writer)
        client = Client.connect(inspector.socket)
        client.negotiate()
        client.connect_info()
        client.helo()
        assert send_message(client).answer.verdict is Verdict.CONTINUE
        client.quit()
        client.close()
        assert inspector.wait() == 128 + signal.SIGPIPE
    assert not any("Traceback" in line for line in inspector.stderr.lines)


def test_inspect_goes_on_when_its_reader_pauses(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    fill(writer)
    arguments = ("-m", "milter", "inspect", f"unix:{tmp_path}/s")
    with Launched(f"os.dup2({writer}, 1)", *arguments, descriptors=[writer]) as inspector:
        os.close(writer)
        client = Client.connect(inspector.socket)
        client.negotiate()
        client.connect_info()
        client.helo()
        assert send_message(client).answer.verdict is Verdict.CONTINUE
        client.quit()
        client.close()
        inspector.stop()
    os.close(reader)
    assert "lines are lost, since they cannot be written" in inspector.stderr.text


@pytest.mark.parametrize("command", [["version"], ["check", "SOCKET"]])
def test_a_command_whose_reader_has_gone_ends_as_others_do(
    run_filter: RunFilter, tmp_path: Path, command: list[str]
) -> None:
    if "SOCKET" in command:
        inspector = run_filter("-m", "milter", "inspect", "inet:0@127.0.0.1")
        command = ["check", inspector.socket]
    reader, writer = os.pipe()
    os.close(reader)
    started = [sys.executable, "-m", "milter", *command]
    process = subprocess.run(started, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (process.returncode, process.stderr) == (128 + signal.SIGPIPE, "")
