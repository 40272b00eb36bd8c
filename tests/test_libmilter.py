# SPDX-License-Identifier: GPL-3.0-or-later
"""What is said of libmilter itself, and how its sockets are found where the system tells little."""

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from milter import descriptors
from milter._shim import lib
from milter.errors import MilterError
from milter.libmilter import Libmilter, libmilter
from milter.standins import Placeholder
from tests.conftest import has_ipv6

BUILD = "static" if lib.MILTER_STATIC else "shared"

needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")


def run(code: str) -> str:
    """What a process of its own prints, libmilter not having been started in it; standard error with it."""
    command = [sys.executable, "-I", "-c", code]
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True).stdout


@pytest.mark.parametrize(
    ("redirected", "link", "where"),
    [
        (("accept", "close"), f"{BUILD}, I/O wrapped: accept close", "the logger milter.libmilter"),
        ((), "shared", "the system's log (facility mail)"),
    ],
)
def test_the_way_of_linking_decides_where_libmilter_logs(
    monkeypatch: pytest.MonkeyPatch, redirected: tuple[str, ...], link: str, where: str
) -> None:
    monkeypatch.setattr(Libmilter, "redirected", redirected)
    monkeypatch.setattr(Libmilter, "lacks_ipv6", False)
    assert (libmilter.link, libmilter.where_it_logs) == (link, where)


def test_descriptors_are_found_without_proc_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: str) -> list[str]:
        raise FileNotFoundError(path)

    with socket.socket() as known:
        monkeypatch.setattr(os, "listdir", refused)
        assert known.fileno() in [descriptor for descriptor, _ in descriptors.sockets()]


def test_a_long_directory_for_temporary_files_is_too_long_for_a_socket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with Placeholder(socket.AF_UNIX) as placeholder:
        next(placeholder.specifications())
    assert list(long.iterdir()) == []


def test_a_socket_that_libmilter_did_not_open_is_not_found() -> None:
    with Placeholder(socket.AF_INET) as placeholder:
        next(placeholder.specifications())
        with pytest.raises(MilterError, match="listening socket was not found"):
            placeholder.find()


def test_placeholders_of_several_families_are_tried_in_turn_until_libmilter_opens_one() -> None:
    with Placeholder(socket.AF_INET, socket.AF_INET6) as placeholder:
        families = [(each.split(":")[0], placeholder.family) for each in placeholder.specifications()]
    assert families == [("inet", socket.AF_INET), ("inet6", socket.AF_INET6)] * (len(families) // 2)
    assert len(families) > 20


# ---- Without IPv6 ----------------------------------------------------------------------------

TRY_IPV6 = """
from milter._shim import lib
lib.milter_register(b"test")
lib.smfi_setconn(b"inet6:0@::1")
print(bool(lib.milter_lacks_ipv6()), lib.smfi_opensocket(False) != 0)
"""

SERVE = """
import logging, sys
logging.basicConfig(format="%(levelname)s %(message)s", stream=sys.stdout)
from milter import Milter
from milter.errors import MilterError
from milter.libmilter import Libmilter, libmilter
from milter.server import Server
from milter.testing import Client
BEFORE
try:
    with Server(Milter("test"), "SOCKET").start() as server, Client.connect(server.socket) as client:
        client.negotiate()
        print("served, described as", libmilter.link)
except MilterError as failure:
    print(failure)
"""


def serve(where: str, before: str = "") -> list[str]:
    return run(SERVE.replace("SOCKET", where).replace("BEFORE", before)).splitlines()


@needs_ipv6
def test_it_is_known_of_libmilter_if_it_was_built_without_ipv6() -> None:
    lacks, refuses = run(TRY_IPV6).splitlines()[-1].split()
    assert lacks == refuses


@needs_ipv6
@pytest.mark.skipif(libmilter.lacks_ipv6, reason="this libmilter has no IPv6")
def test_an_ipv6_listener_is_served_by_the_static_libmilter_whatever_it_was_built_with() -> None:
    assert serve("inet6:0@::1") == [f"served, described as {libmilter.link}"]


WITHOUT = "Libmilter.redirected, Libmilter.lacks_ipv6 = (), True"


def test_a_shared_libmilter_without_ipv6_is_told_of_at_the_start() -> None:
    lines = serve("inet:0@127.0.0.1", WITHOUT)
    assert len(lines) == 2
    assert lines[0].startswith("WARNING this libmilter (the shared library) was built without IPv6: it closes the")
    assert lines[1] == "served, described as shared, without IPv6"


@needs_ipv6
def test_a_shared_libmilter_without_ipv6_refuses_an_ipv6_listener_in_plain_words() -> None:
    [line] = serve("inet6:0@::1", WITHOUT)
    assert line.startswith("this libmilter (the shared library) was built without IPv6, and cannot listen on inet6:.")
    assert "MILTER_LINK=static" in line


# ---- A shared libmilter ----------------------------------------------------------------------

SERVE_A_MESSAGE = """
from milter import EomContext, Message, Milter
from milter.libmilter import libmilter
from milter.server import Server
from milter.testing import Client

app = Milter("test")

@app.on_message
def read(ctx: EomContext, message: Message) -> None:
    message.headers["X-Size"] = str(len(message.body))

with Server(app, "inet:0@127.0.0.1").start() as server, Client.connect(server.socket) as client:
    client.negotiate()
    client.connect_info()
    client.helo()
    for size in (1, 200_000):
        client.mail("<ann@client.example>")
        client.rcpt("<bob@mta.example>")
        client.data()
        client.header("Subject", "test")
        client.eoh()
        for start in range(0, size, 65_535):
            client.body(b"x" * min(65_535, size - start))
        end = client.end_of_message()
        print(end.answer.verdict.name, *(event.value.strip() for event in end.events))
print(libmilter.link)
"""
SERVED = ["CONTINUE 1", "CONTINUE 200000"]

needs_shared = pytest.mark.skipif(
    bool(lib.MILTER_STATIC) or not hasattr(os, "RTLD_DEEPBIND"), reason="a shared libmilter, and glibc"
)


@needs_shared
def test_the_calls_of_a_shared_libmilter_arrive() -> None:
    *served, link = run(SERVE_A_MESSAGE).splitlines()
    assert served == SERVED
    assert link.startswith("shared, I/O wrapped: accept close ")


@needs_shared
@pytest.mark.parametrize(
    "before",
    ["import os; del os.RTLD_DEEPBIND", "import ctypes; ctypes.CDLL('libmilter.so.1.0.1')"],
    ids=["another C library", "loaded before"],
)
def test_where_the_calls_do_not_arrive_libmilter_serves_by_itself(before: str) -> None:
    assert run(f"{before}\n{SERVE_A_MESSAGE}").splitlines() == [*SERVED, "shared"]


def test_loading_the_extension_leaves_the_flags_as_they_were() -> None:
    look = "import sys; before = sys.getdlopenflags(); import milter; print(sys.getdlopenflags() == before)"
    assert run(look) == "True\n"
