# SPDX-License-Identifier: GPL-3.0-or-later
"""Refusals under both servers: what the client hears, and what the access log says of it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from milter.libmilter import libmilter
from tests.filter_process import FilterProcess, RunFilter

from .postfix import Postfix
from .server import REFUSED, MailServer
from .smtp import SmtpClient

REFUSING = Path(__file__).parent / "filters" / "refusing.py"
MESSAGE = "From: <ann@client.test>\nSubject: hello\n\nHi\n"
BOB = "bob@sink.test"

needs_redirection = pytest.mark.skipif(not libmilter.redirected, reason="libmilter does it, and knows no better")


@pytest.fixture(params=["postfix", "sendmail"])
def server(request: pytest.FixtureRequest) -> MailServer:
    found: MailServer = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def running(run_filter: RunFilter, socket_dir: Path) -> FilterProcess:
    return run_filter(REFUSING, f"unix:{socket_dir}/filter")


@contextmanager
def session(server: MailServer, running: FilterProcess, **settings: str) -> Iterator[SmtpClient]:
    with SmtpClient(server.milter_service(running.socket, **settings)) as client:
        client.ehlo()
        yield client


def records(running: FilterProcess) -> list[dict[str, Any]]:
    """Of messages, once the filter has heard of the end of all."""
    running.stop()
    return [found for line in running.stdout.lines if isinstance(found := json.loads(line), dict)]


# ---- What a text may quote

# Alone and in a row: what ASCII, Latin-1 and stray bytes have of control characters, and letters, signs and emoji whose
# UTF-8 has a byte that is one of those but for the eighth bit.
CONTROLS = [*range(0x20), *range(0x7F, 0xA0), *range(0xDC80, 0xDCA0)]
LETTERS = [0xC0, 0xCA, 0xCD, 0x10A, 0x10D, 0x440, 0x44A, 0x44D, 0x5D0, 0x2028, 0x2029, 0x4E0A, 0x5D8D, 0xFB00, 0x1F40A]
ROWS = [(number,) for number in (*CONTROLS, *LETTERS)] + [(0x8D, 0x8A), (0xDC8D, 0xDC8A), (0xD, 0xA), (0x10D, 0x10A)]


def test_a_client_hears_one_line_whatever_the_text_quotes(server: MailServer, running: FilterProcess) -> None:
    with session(server, running) as client:
        client.mail("ann@client.test")
        for row in ROWS:
            local = "u" + "-".join(f"{number:x}" for number in row)
            answer = client.rcpt(f"{local}@sink.test")
            assert answer.code == 551, row  # and not the rest of the reply before
            (line,) = answer.lines
            assert line.startswith("5.7.1 A"), row
            assert line.endswith("250 2.1.5 fine"), row
        assert client.command("HELP").code in (214, 500, 502)


# ---- What the log says

ENDS = ("QUIT", "RSET", "EHLO again", "hang up", "DATA")

# The recipients of messages that do not get to their content, and what is said of such a message.
NOT_SENT: list[tuple[list[str], tuple[str, str, str | None]]] = [
    (["no"], ("reject", "rcpt", "not for you")),
    (["no", "no"], ("reject", "rcpt", "not for you")),
    (["later"], ("tempfail", "rcpt", "not yet")),
    (["later", "no"], ("tempfail", "rcpt", "not yet")),
    (["bob", "no"], ("abort", "abort", None)),
    (["bob"], ("abort", "abort", None)),
    ([], ("abort", "abort", None)),
]


def test_a_message_all_of_whose_recipients_were_refused_is_refused(server: MailServer, running: FilterProcess) -> None:
    port = server.milter_service(running.socket)
    due = {}
    for number, (end, (recipients, decision)) in enumerate(product(ENDS, NOT_SENT)):
        sender = f"{number}@client.test"
        if end != "DATA" or "bob" not in recipients:
            give_up(SmtpClient(port), sender, recipients, end)
            due[sender] = (*decision, [f"{name}@sink.test" for name in recipients if name != "bob"])
    said = {
        record["sender"]: (
            *(record[name] for name in ("verdict", "stage", "text")),
            [entry["recipient"] for entry in record["refused"]],
        )
        for record in records(running)
    }
    assert said == due


def give_up(client: SmtpClient, sender: str, recipients: list[str], end: str) -> None:
    client.ehlo()
    client.mail(sender)
    for recipient in recipients:
        client.rcpt(f"{recipient}@sink.test")
    match end:
        case "RSET":
            client.command("RSET")
        case "EHLO again":
            client.ehlo()
        case "DATA":
            assert client.command("DATA").code in (503, 554)
    if end != "hang up":
        client.command("QUIT")
    client.drop()


def test_each_message_of_a_connection_is_refused_where_it_was(server: MailServer, running: FilterProcess) -> None:
    stages = ("mail", "data", "header", "eoh", "body", "eom")
    with session(server, running) as client:
        for stage in stages:
            for sender in (stage, "ann"):
                client.mail(f"{sender}@client.test")
                client.rcpt(BOB)
                client.rcpt("no@sink.test")
                client.data(MESSAGE)
                client.command("RSET")
    server.deliveries()
    answered_at = {"header": "eoh"}  # all fields together
    assert [(record["verdict"], record["stage"], record["text"]) for record in records(running)] == [
        expected
        for stage in stages
        for expected in [("reject", answered_at.get(stage, stage), f"no {stage}"), ("accept", "eom", None)]
    ]


def test_what_the_server_refuses_by_itself_is_no_refusal_of_the_filter(
    postfix: Postfix, running: FilterProcess
) -> None:
    restrictions = f"check_recipient_access inline:{{ {{{REFUSED}=REJECT}} }}"
    with session(postfix, running, smtpd_recipient_restrictions=restrictions) as client:
        client.mail("ann@client.test")
        assert client.rcpt(REFUSED).code == 554
    (record,) = records(running)
    assert (record["verdict"], record["recipients"], record["refused"]) == ("abort", [], [])


# ---- A client that goes on after the server has refused its message at the end


@needs_redirection
def test_a_client_that_goes_on_without_mail_is_to_try_again_and_the_next_message_is_judged(
    postfix: Postfix, running: FilterProcess
) -> None:
    """Postfix 3.7 keeps the envelope then, and tells the filter nothing but RCPT and DATA."""
    restrictions = "check_sender_access inline:{ {ann@client.test=REJECT} }"
    with session(
        postfix, running, smtpd_end_of_data_restrictions=restrictions, milter_default_action="accept"
    ) as client:
        for _ in range(2):
            assert client.send("ann@client.test", BOB, MESSAGE).code == 554
            later = "4.7.1 Service unavailable - try again later"
            assert [client.rcpt("carl@sink.test").text, client.command("DATA").text] == [later] * 2
            client.command("RSET")
            assert client.send("eom@client.test", BOB, MESSAGE).text == "5.7.1 no eom"
    assert [(record["sender"], record["verdict"]) for record in records(running)] == [
        ("ann@client.test", "abort"),
        ("eom@client.test", "reject"),
    ] * 2


def test_after_a_message_that_was_accepted_at_mail_and_refused_by_the_server_the_next_one_is_judged(
    postfix: Postfix, running: FilterProcess
) -> None:
    restrictions = "check_sender_access inline:{ {accept@client.test=REJECT} }"
    with session(postfix, running, smtpd_end_of_data_restrictions=restrictions) as client:
        for _ in range(2):
            assert client.send("accept@client.test", BOB, MESSAGE).code == 554
            client.rcpt(BOB)  # of the same sender, for Postfix: the filter is not asked
            client.command("FOO")
            assert client.data(MESSAGE).code == 554
            client.command("RSET")
            assert client.send("eom@client.test", BOB, MESSAGE).text == "5.7.1 no eom"
    assert [(record["sender"], record["verdict"]) for record in records(running)] == [
        ("accept@client.test", "accept"),
        ("eom@client.test", "reject"),
    ] * 2


# ---- A client of which the server knows no address


@needs_redirection
@pytest.mark.parametrize(
    ("told", "shown"),
    [
        ("[UNAVAILABLE]", ["connect", "unknown", None]),
        ("192.0.2.7", ["connect", "[192.0.2.7]", "192.0.2.7"]),
        ("IPV6:2001:db8::7", ["connect", "[2001:db8::7]", "2001:db8::7"]),
    ],
)
def test_mail_of_a_client_whose_address_a_proxy_does_not_know_is_judged_as_other_mail(
    postfix: Postfix, running: FilterProcess, told: str, shown: list[str | None]
) -> None:
    with session(postfix, running) as client:
        assert client.xclient(ADDR=told, NAME="[UNAVAILABLE]").code == 220
        client.ehlo()
        assert client.send("ann@client.test", "no@sink.test", MESSAGE).text == "5.7.1 not for you"
        client.command("RSET")
        assert client.send("ann@client.test", BOB, MESSAGE).code == 250
    postfix.deliveries()
    running.stop()
    connections = [found for line in running.stdout.lines if isinstance(found := json.loads(line), list)]
    assert connections[-1] == shown


# ---- Content that goes another way


def test_with_a_proxy_filter_recipients_can_be_refused_and_no_content_is_seen(
    postfix: Postfix, running: FilterProcess
) -> None:
    proxy = f"inet:127.0.0.1:{postfix.sink.port}"
    with session(postfix, running, smtpd_proxy_filter=proxy) as client:
        for sender in ("ann", "data", "eom"):
            client.mail(f"{sender}@client.test")
            assert client.rcpt("no@sink.test").text == "5.7.1 not for you"
            client.rcpt(BOB)
            client.data(MESSAGE)
            client.command("RSET")
    assert [delivery.sender for delivery in postfix.deliveries()] == ["ann@client.test", "eom@client.test"]
    assert [(record["sender"], record["verdict"], record["stage"]) for record in records(running)] == [
        ("ann@client.test", "abort", "abort"),
        ("data@client.test", "reject", "data"),
        ("eom@client.test", "abort", "abort"),
    ]
