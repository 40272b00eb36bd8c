# SPDX-License-Identifier: GPL-3.0-or-later
"""The programs in examples/, run as a user runs them."""

import importlib
from collections.abc import Iterator

import pytest

from milter.testing import AddHeader, Client
from tests.conftest import send_content
from tests.filter_process import REPOSITORY, FilterProcess, RunFilter, running_filters


@pytest.fixture
def run_filter() -> Iterator[RunFilter]:
    with running_filters() as run:
        yield run


def connected(process: FilterProcess) -> Client:
    client = Client.connect(process.socket)
    client.negotiate()
    client.connect_info("client.example", "192.0.2.1")
    client.helo("client.example")
    return client


def test_client_addresses_prints_each_client(run_filter: RunFilter) -> None:
    example = run_filter("examples/client_addresses.py", "inet:0@127.0.0.1")
    connected(example).close()
    assert example.stdout.wait_for("connect") == "connect from 192.0.2.1:0"


def test_recipient_counter_counts_for_each_message_anew(run_filter: RunFilter) -> None:
    example = run_filter("examples/recipient_counter.py", "inet:0@127.0.0.1")
    client = connected(example)
    for count in (1, 3):
        client.mail("<ann@client.example>")
        for number in range(count):
            client.rcpt(f"<bob{number}@mta.example>")
        client.data()
        assert send_content(client).changes == (AddHeader("X-Recipient-Count", str(count)),)
    client.quit()
    client.wait_for_close()
    example.stop()
    assert example.stdout.lines == [
        "message 1 of client.example: 1 recipients",
        "message 2 of client.example: 3 recipients",
    ]


def test_show_stages_prints_the_conversation(run_filter: RunFilter) -> None:
    example = run_filter("examples/show_stages.py", "inet:0@127.0.0.1")
    client = connected(example)
    client.unknown("FOO")
    client.mail("<ann@client.example>")
    client.abort()
    client.mail("<ann@client.example>")
    client.rcpt("<bob@mta.example>")
    client.data()
    send_content(client)
    client.quit()
    client.wait_for_close()
    example.stop()
    stages = " ".join(line.split()[1] for line in example.stdout.lines)
    assert stages == "NEGOTIATE CONNECT HELO UNKNOWN MAIL ABORT MAIL RCPT DATA HEADER EOH BODY EOM CLOSE"


@pytest.mark.parametrize("example", sorted(path.stem for path in (REPOSITORY / "examples").glob("*.py")))
def test_an_example_can_be_imported_without_running(example: str) -> None:
    assert importlib.import_module(f"examples.{example}").app.name == example


@pytest.mark.parametrize("example", ["footer", "attachments", "clamav"])
def test_an_example_with_settings_runs_as_a_program(run_filter: RunFilter, example: str) -> None:
    client = connected(run_filter(f"examples/{example}.py", "inet:0@127.0.0.1"))
    client.quit()
    client.wait_for_close()
