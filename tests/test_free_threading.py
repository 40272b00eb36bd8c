# SPDX-License-Identifier: GPL-3.0-or-later
"""Free threading: the library leaves the GIL off, and lets each thread run Python by itself.

What it does for many connections at once is told by test_threads.py, on any Python.
"""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from milter._shim import ffi, lib
from milter.gil import gil_is_on, python_version

free_threaded = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))

# Everything that a filter may need, before and after a message.
PROGRAM = """
import sys
from milter import EomContext, Message, Milter, Status
from milter.testing import Client

assert not sys._is_gil_enabled(), "to import the library"
app = Milter("free")

@app.on_rcpt
async def check(ctx, recipient, params) -> Status:
    return Status.CONTINUE

@app.on_message
def mark(ctx: EomContext, message: Message) -> None:
    message.headers["X-Size"] = str(message.size)

with app.start(f"unix:{sys.argv[1]}", metrics="0", access_log=True) as server, Client.connect(server.socket) as client:
    client.negotiate()
    client.connect_info()
    client.helo()
    client.mail("<ann@client.example>")
    client.rcpt("<bob@mta.example>")
    client.data()
    client.header("Subject", " test")
    client.eoh()
    client.body(b"text\\r\\n")
    assert client.end_of_message().changes
assert not sys._is_gil_enabled(), "to filter a message"
"""


@pytest.mark.skipif(not free_threaded, reason="this Python always has a GIL")
def test_neither_the_library_nor_a_message_switches_the_gil_on(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-c", PROGRAM, str(tmp_path / "socket")]
    # What a variable says would win over what a module says.
    variables = {name: value for name, value in os.environ.items() if name != "PYTHON_GIL"}
    subprocess.run(command, env=variables, check=True)


@pytest.mark.skipif(not free_threaded, reason="this Python always has a GIL")
@pytest.mark.parametrize(("option", "state"), [("gil=0", "off"), ("gil=1", "on")])
def test_the_version_tells_whether_the_gil_is_on(option: str, state: str) -> None:
    command = [sys.executable, "-X", option, "-m", "milter", "version"]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert f"free-threaded, the GIL is {state}" in told.splitlines()[-1]


@pytest.mark.skipif(free_threaded, reason="the GIL may be off here")
def test_a_python_without_free_threading_has_its_gil_on() -> None:
    assert gil_is_on()
    assert python_version() == "Python " + ".".join(map(str, sys.version_info[:3]))


def test_what_comes_for_no_run_is_a_failure_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    """So the ways in can be gone once, before there is a filter; 0 is what the shim takes for a failure."""
    assert lib.milter_python_enter(ffi.new("struct milter_event *")) == 0
    assert lib.milter_python_negotiate(ffi.NULL, 0, 0, 0, 0, 0, ffi.NULL, ffi.NULL) == 0
    assert caplog.records == []
