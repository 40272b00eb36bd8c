# SPDX-License-Identifier: GPL-3.0-or-later
"""The command ``milter check``: exit codes, and what it shows, against a milter that follows a script."""

import argparse
import errno
import io
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from milter.checker import add_arguments, main
from milter.testing.wire import Decoder, Packet, pack_offer

Check = Callable[..., int]


def serve(listener: socket.socket, script: Mapping[bytes, bytes]) -> None:
    """Answer one connection: what the script has for a letter, CONTINUE else; b"" hangs up."""
    decoder = Decoder()
    connection, _ = listener.accept()
    with connection:
        connection.settimeout(10)
        while data := connection.recv(65536):
            decoder.feed(data)
            while (packet := decoder.next()) is not None:
                if packet.letter in b"DAQ":
                    continue
                answer = script.get(packet.letter, Packet(b"c").encode())
                if not answer:
                    return
                connection.sendall(answer)


@pytest.fixture
def check(tmp_path: Path) -> Iterator[Check]:
    """Run the command against a milter with a script; extra arguments follow the socket."""
    threads: list[threading.Thread] = []

    def run(script: Mapping[bytes, bytes], *arguments: str) -> int:
        whole = {b"O": Packet(b"O", pack_offer(6, 0x1FF, 0)).encode(), **script}
        path = tmp_path / "socket"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen()
            thread = threading.Thread(target=serve, args=(listener, whole), daemon=True)
            thread.start()
            threads.append(thread)
            return command(f"unix:{path}", *arguments)

    yield run
    for thread in threads:
        thread.join(10)


def command(*arguments: str) -> int:
    parser = argparse.ArgumentParser(prog="milter check")
    add_arguments(parser)
    return main(parser.parse_args(arguments))


def packets(*parts: tuple[bytes, bytes]) -> bytes:
    return b"".join(Packet(letter, data).encode() for letter, data in parts)


@pytest.mark.parametrize(
    ("answer", "code", "shown"),
    [
        (b"c", 0, "verdict   accepted\n"),
        (b"a", 0, "verdict   accepted at mail\n"),
        (b"d", 0, "verdict   discarded at mail\n"),
        (b"r", 1, "verdict   rejected at mail\nreply     550 5.7.1 Command rejected\n"),
        (b"t", 75, "verdict   deferred at mail\nreply     451 4.7.1 Service unavailable"),
    ],
)
def test_the_exit_code_is_what_a_client_would_be_told(
    check: Check, capsys: pytest.CaptureFixture[str], answer: bytes, code: int, shown: str
) -> None:
    assert check({b"M": packets((answer, b""))}) == code
    assert shown in capsys.readouterr().out


def test_changes_and_delivery_are_shown_and_nothing_reaches_the_terminal_raw(
    check: Check, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "mail.eml"
    file.write_bytes(b"Subject: \xff\x1b[31m\n\tfold\n\nbody \x07\n")
    end = packets((b"p", b""), (b"h", b"X-New\0v\x1b\0"), (b"-", b"<a@x>\0"), (b"q", b"held\0"), (b"c", b""))
    assert (
        check({b"E": end}, str(file), "--to", "a@x", "--to", "b@x", "--client", "h.example[2001:db8::1]", "--delivered")
        == 0
    )
    output = capsys.readouterr().out
    assert "connect   h.example [2001:db8::1]" in output
    assert "verdict   accepted, but quarantined: held\nreply     250 2.0.0 Ok\n" in output
    assert "changes   add header X-New: v\\x1b\n          remove recipient <a@x>\n" in output
    assert output.endswith(
        "MAIL FROM:<ann@client.example>\nRCPT TO:<b@x>\n\n"
        "Received: from client.example (h.example [2001:db8::1])\n\tby mta.example\n"
        "Subject: \\xff\\x1b[31m\n\tfold\nX-New: v\\x1b\n\nbody \\x07\n"
    )


def test_a_refused_recipient_is_shown_with_its_reply(check: Check, capsys: pytest.CaptureFixture[str]) -> None:
    assert check({b"R": packets((b"y", b"550 5.7.1 100%% no\0"))}, "--mta", "sendmail") == 1
    output = capsys.readouterr().out
    assert "verdict   rejected: no recipient is left\n" in output
    assert "550 5.7.1 <bob@mta.example>... 100% no   (to RCPT TO:<bob@mta.example>)\n" in output


def test_changes_that_postfix_refuses_defer_the_message(check: Check, capsys: pytest.CaptureFixture[str]) -> None:
    end = packets((b"b", b"x"), (b"p", b""), (b"b", b"y"), (b"c", b""))
    assert check({b"E": end}) == 75
    assert "reply     451 4.3.5 " in capsys.readouterr().out


def test_each_kind_of_change_is_named(check: Check, capsys: pytest.CaptureFixture[str]) -> None:
    end = packets(
        (b"i", b"\0\0\0\1X-In\0a\0"),
        (b"m", b"\0\0\0\1Subject\0\0"),
        (b"m", b"\0\0\0\2X-Other\0b\0"),
        (b"e", b"<new@x>\0RET=HDRS\0"),
        (b"e", b"<newer@x>\0"),
        (b"2", b"<eve@x>\0NOTIFY=NEVER\0"),
        (b"p", b""),
        (b"b", b"one\r\n"),
        (b"b", b"two\r\n"),
        (b"c", b""),
    )
    assert check({b"E": end}) == 0
    assert capsys.readouterr().out.partition("changes   ")[2].partition("\n\n")[0].splitlines() == [
        "insert header at 1, X-In: a",
        "          delete header Subject, number 1",
        "          replace header X-Other, number 2: b",
        "          replace sender <new@x> RET=HDRS",
        "          replace sender <newer@x>",
        "          add recipient <eve@x> NOTIFY=NEVER",
        "          replace the body: 10 bytes",
        "          (progress reported: 1)",
    ]


def test_a_message_whose_recipients_are_all_removed_is_not_delivered(
    check: Check, capsys: pytest.CaptureFixture[str]
) -> None:
    end = packets((b"-", b"<bob@mta.example>\0"), (b"c", b""))
    assert check({b"E": end}, "--delivered") == 0
    assert capsys.readouterr().out.endswith("\n\nnothing is delivered: no recipient is left\n")


def test_nothing_is_delivered_of_a_message_that_is_refused(check: Check, capsys: pytest.CaptureFixture[str]) -> None:
    assert check({b"E": packets((b"r", b""))}, "--delivered") == 1
    assert capsys.readouterr().out.endswith("reply     550 5.7.1 Command rejected\n")


def test_a_long_argument_is_shown_in_part(check: Check, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "mail.eml"
    file.write_bytes(b"Subject: " + b"x" * 100 + b"\n\n")
    assert check({}, str(file)) == 0
    assert f"header    Subject: {'x' * 48}... continue\n" in capsys.readouterr().out


def test_a_directory_that_cannot_be_read_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "locked").mkdir()
    (tmp_path / "mail.eml").write_bytes(b"Subject: x\n\n")
    scandir = os.scandir

    def refusing(path: str) -> object:  # root can read any directory, and tests may run as root
        if path.endswith("locked"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    assert command("unix:/none", str(tmp_path)) == 2
    assert capsys.readouterr().err == f"milter check: {tmp_path}/locked cannot be read: Permission denied\n"


def test_a_message_comes_from_standard_input(
    check: Check, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"X-In: 1\n\n")))
    assert check({}, "-") == 0
    assert "X-In: 1" in capsys.readouterr().out


def test_a_milter_that_hangs_up_is_one_line_below_what_it_answered(
    check: Check, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check({b"R": b""}) == 2
    captured = capsys.readouterr()
    assert "mail      <ann@client.example>" in captured.out
    assert captured.err.count("\n") == 1
    assert "the milter closed the connection after RCPT" in captured.err


def test_nobody_there_or_no_message_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(f"unix:{tmp_path}/none") == 2
    assert command("nonsense:1") == 2
    assert command(f"unix:{tmp_path}/none", str(tmp_path / "none.eml")) == 2
    assert capsys.readouterr().err.count("milter check: ") == 3


@pytest.mark.parametrize(
    "wrong",
    [
        ["--client", "client.example"],
        ["--timeout", "0"],
        ["--timeout", "x"],
        ["--macro", "auth_authen"],
        ["--macro", "nowhere:i=1"],
        ["--mail-param", "SIZE=1 2"],
        ["--rcpt-param", "=NEVER"],
        ["--repeat", "0"],
        ["--connections", "x"],
        ["--offer", "v3"],
        ["--json", "--brief"],
    ],
)
def test_a_bad_argument_is_refused_before_anything_is_sent(wrong: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        command("unix:/none", *wrong)
    assert caught.value.code == 2
