# SPDX-License-Identifier: GPL-3.0-or-later
"""examples/spf_check.py, with a small name server of the tests' own on the loopback interface."""

import socketserver
import threading
from collections.abc import Iterator

import dns.message
import dns.rcode
import dns.rdatatype
import dns.resolver
import dns.rrset
import pytest

from examples.spf_check import Settings, filter_with
from milter.testing import Envelope, Outcome, Transcript
from tests.conftest import Serve
from tests.example_filters import delivered, field, from_address, refusal, send

# Of the library, about its own call of dnspython.
pytestmark = pytest.mark.filterwarnings("ignore:please use dns.resolver.resolve:DeprecationWarning")

TXT = {
    "client.example.": "v=spf1 ip4:192.0.2.0/28 a:extern.client.example include:friend.example -all",
    "friend.example.": "v=spf1 ip6:2001:db8::/64 -all",
    "soft.example.": "v=spf1 ~all",
    "why.example.": "v=spf1 exp=because.why.example -all",
    "because.why.example.": "not from %{i}, s\\195\\182rry",
    "broken.example.": "v=spf1 ip4:192.0.2 -all",
    "helo.example.": "v=spf1 ip4:192.0.2.1 -all",
}
A = {"extern.client.example.": "198.51.100.7"}


class NameServer(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        data, socket = self.request
        query = dns.message.from_wire(data)
        question = query.question[0]
        name = question.name.to_text().lower()
        response = dns.message.make_response(query)
        if name == "away.example.":
            response.set_rcode(dns.rcode.SERVFAIL)
        elif question.rdtype == dns.rdatatype.TXT and name in TXT:
            response.answer.append(dns.rrset.from_text(question.name, 60, "IN", "TXT", f'"{TXT[name]}"'))
        elif question.rdtype == dns.rdatatype.A and name in A:
            response.answer.append(dns.rrset.from_text(question.name, 60, "IN", "A", A[name]))
        elif name not in TXT and name not in A:
            response.set_rcode(dns.rcode.NXDOMAIN)
        socket.sendto(response.to_wire(), self.client_address)


@pytest.fixture
def nameserver(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(dns.resolver, "default_resolver", None)
    with socketserver.ThreadingUDPServer(("127.0.0.1", 0), NameServer) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def ask(
    serve: Serve,
    settings: Settings,
    address: str = "192.0.2.1",
    sender: str = "ann@client.example",
    helo: str = "nobody.example",
    **macros: str,
) -> Transcript:
    session = from_address(address, helo, j="mx.mta.example", **macros)
    return send(serve(filter_with(settings)), b"Subject: x\n\nHi.\n", Envelope.of(sender, "bob@mta.example"), session)


RESULTS = {
    ("192.0.2.1", "ann@client.example"): "Pass",
    ("198.51.100.7", "ann@client.example"): "Pass",
    ("2001:db8::7", "ann@client.example"): "Pass",
    ("192.0.2.1", "ann@soft.example"): "SoftFail",
    ("192.0.2.1", "ann@nobody.example"): "None",
    ("192.0.2.1", "ann@broken.example"): "PermError",
    ("192.0.2.1", "ann@away.example"): "TempError",
}


@pytest.mark.parametrize(("who", "result"), RESULTS.items())
def test_what_passes_gets_the_result_above_all_fields(
    serve: Serve, nameserver: str, who: tuple[str, str], result: str
) -> None:
    message = delivered(ask(serve, Settings(nameserver), *who))
    assert message.headers[0].name == "Received-SPF"
    assert message.headers[0].value.startswith(f"{result} (mx.mta.example: ")
    assert f"client-ip={who[0]};" in message.headers[0].value


def test_mail_that_the_domain_disowns_is_refused(serve: Serve, nameserver: str) -> None:
    transcript = ask(serve, Settings(nameserver), "203.0.113.1")
    assert transcript.outcome is Outcome.REJECTED
    assert refusal(transcript).startswith("550 SPF: ")


@pytest.mark.parametrize(
    "sender",
    [
        "ann@CLIENT.example.",
        '"ann@friend.example"@client.example',
        "@soft.example:ann@client.example",
        "ann@client.example(@soft.example)",
        " ann @ client.example ",
    ],
)
def test_the_domain_is_asked_however_the_sender_is_written(serve: Serve, nameserver: str, sender: str) -> None:
    assert refusal(ask(serve, Settings(nameserver), "203.0.113.1", sender)).startswith("550 SPF: ")


def test_the_refusal_gives_the_explanation_of_the_domain_in_ascii(serve: Serve, nameserver: str) -> None:
    transcript = ask(serve, Settings(nameserver), sender="ann@why.example")
    assert refusal(transcript).startswith("550 SPF: ")
    assert refusal(transcript).isascii()


def test_it_can_be_marked_instead(serve: Serve, nameserver: str) -> None:
    message = delivered(ask(serve, Settings(nameserver, reject_on_fail=False), "203.0.113.1"))
    assert (field(message, "Received-SPF") or "").startswith("Fail (")


def test_a_bounce_is_checked_by_the_name_in_helo(serve: Serve, nameserver: str) -> None:
    message = delivered(ask(serve, Settings(nameserver), sender="", helo="helo.example"))
    assert (field(message, "Received-SPF") or "").startswith("Pass (")
    assert "identity=helo" in (field(message, "Received-SPF") or "")


def test_while_dns_does_not_answer_the_client_may_have_to_wait(serve: Serve, nameserver: str) -> None:
    transcript = ask(serve, Settings(nameserver, pass_on_error=False), sender="ann@away.example")
    assert refusal(transcript) == "451 SPF: DNS does not answer, try again later"


@pytest.mark.parametrize(
    "sender", [f"ann@{'x' * 64}.example", "ann@a..b.example", "ann@\udcff.example", "@", '"a b"@c']
)
def test_an_odd_address_is_no_trouble(serve: Serve, nameserver: str, sender: str) -> None:
    transcript = ask(serve, Settings(nameserver), sender=sender)
    assert transcript.outcome is Outcome.ACCEPTED
    told = field(delivered(transcript), "Received-SPF")
    assert told
    assert told.isascii()


@pytest.mark.parametrize("address", ["127.0.0.1", "10.0.0.1", "fd00::1"])
def test_private_addresses_are_not_checked(serve: Serve, nameserver: str, address: str) -> None:
    assert field(delivered(ask(serve, Settings(nameserver), address)), "Received-SPF") is None


def test_who_is_authenticated_is_not_checked(serve: Serve, nameserver: str) -> None:
    message = delivered(ask(serve, Settings(nameserver), "203.0.113.1", auth_type="PLAIN"))
    assert field(message, "Received-SPF") is None


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"NAMESERVER": "127.0.0.1:53", "TIMEOUT": "1", "ON_FAIL": "mark", "ON_ERROR": "tempfail"}
    for name, value in values.items():
        monkeypatch.setenv(f"SPF_{name}", value)
    assert Settings.from_environment() == Settings("127.0.0.1:53", 1.0, reject_on_fail=False, pass_on_error=False)
