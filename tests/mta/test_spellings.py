# SPDX-License-Identifier: GPL-3.0-or-later
"""The lists of ``tests/spellings.py`` are true: Postfix and Sendmail are asked, and a filter in the middle.

What the servers deliver goes to the sink, which sees the address as the server understood it. Sendmail keeps quotes
and the case of letters; the next server would read them as it does itself.
"""

from collections.abc import Iterator, Sequence

import pytest

from milter import Address, Context, Milter, Params
from tests import spellings
from tests.spellings import DELIVERED, LOOKALIKES, MAILBOX, NEIGHBOURS, NULL, QUOTED_AS_A_WHOLE, REWRITTEN

from .postfix import Postfix, open_directory
from .sendmail import Sendmail
from .server import MailServer
from .smtp import SmtpClient

DOMAIN = MAILBOX.partition("@")[2]


class Tried:
    """Spellings that were tried with a server. `accepted`: what it delivered each to, in its own words."""

    def __init__(self, server: MailServer, command: str, listed: Sequence[str], filter: str, **settings: str) -> None:
        self._number = {f"{number}": spelling for number, spelling in enumerate(listed)}
        with SmtpClient(server.milter_service(filter, **settings)) as client:
            client.ehlo()
            for number, spelling in self._number.items():
                self._send(client, command.format(spelling), number)
        self.senders: dict[str, str] = {}
        self.recipients: dict[str, str] = {}
        for delivery in server.deliveries():
            spelling = self._number[delivery.values("Subject")[0]]
            self.senders[spelling] = _plain(delivery.sender)
            self.recipients[spelling] = _plain(*delivery.recipients)

    def _send(self, client: SmtpClient, command: str, number: str) -> None:
        unicode = "" if command.isascii() else " SMTPUTF8"
        commands = [f"MAIL FROM:<ann@client.test>{unicode}", "RCPT TO:<bob@sink.test>"]
        commands[command.startswith("RCPT")] = command
        if all(client.command(line).code == 250 for line in ("RSET", *commands)):
            client.data(f"From: <ann@client.test>\nSubject: {number}\n\n")


def _plain(address: str) -> str:
    return address.lower().replace('"', "")


class Recorder:
    """A filter that keeps what it is told, in the order of the commands."""

    def __init__(self) -> None:
        self.senders: list[Address] = []
        self.recipients: list[Address] = []
        self.rewritten: list[Address] = []
        self.socket = ""
        self.app = Milter("recorder")

        @self.app.on_mail
        def mail(ctx: Context, sender: Address, params: Params) -> None:
            self.senders.append(sender)

        @self.app.on_rcpt
        def rcpt(ctx: Context, recipient: Address, params: Params) -> None:
            self.recipients.append(recipient)
            self.rewritten.append(Address(ctx.macros["{rcpt_addr}"]))


@pytest.fixture(scope="module")
def recorder_of_module() -> Iterator[Recorder]:
    """One for all, so that the servers need no other configuration for each test; use `recorder`."""
    recorder = Recorder()
    # At a Unix socket, as all else in this process: a shared libmilter serves one kind of socket in a process.
    with open_directory() as directory, recorder.app.start(f"unix:{directory}/s", mode=0o666) as serving:
        recorder.socket = serving.socket
        yield recorder


@pytest.fixture
def recorder(recorder_of_module: Recorder) -> Recorder:
    recorder_of_module.senders.clear()
    recorder_of_module.recipients.clear()
    recorder_of_module.rewritten.clear()
    return recorder_of_module


@pytest.fixture(params=["postfix", "sendmail"])
def server(request: pytest.FixtureRequest) -> MailServer:
    named: MailServer = request.getfixturevalue(request.param)
    return named


RCPT, MAIL = "RCPT TO:{}", "MAIL FROM:{}"


def test_there_are_enough_of_them() -> None:
    assert len(set(DELIVERED)) == len(DELIVERED) >= 80
    assert len(set(LOOKALIKES)) == len(LOOKALIKES) >= 60


def test_recipients_are_delivered_to_the_mailbox(server: MailServer, recorder: Recorder) -> None:
    listed = [*DELIVERED, *QUOTED_AS_A_WHOLE, *REWRITTEN]
    tried = Tried(server, RCPT, listed, recorder.socket)
    assert tried.recipients == dict.fromkeys(listed, MAILBOX)
    assert [seen.raw for seen in recorder.recipients] == listed
    assert [seen.raw for seen in recorder.recipients if not seen.matches(MAILBOX)] == []
    assert [seen.raw for seen in recorder.rewritten if not seen.matches(MAILBOX)] == []


def test_senders_are_taken_for_the_mailbox(server: MailServer, recorder: Recorder) -> None:
    tried = Tried(server, MAIL, DELIVERED, recorder.socket)
    assert tried.senders == dict.fromkeys(DELIVERED, MAILBOX)
    assert [seen.raw for seen in recorder.senders if not seen.matches(MAILBOX)] == []


def test_null_senders_are_taken_for_that(server: MailServer, recorder: Recorder) -> None:
    tried = Tried(server, MAIL, NULL, recorder.socket)
    assert tried.senders == dict.fromkeys(NULL, "")
    assert [seen.raw for seen in recorder.senders if seen] == []


def test_lookalikes_go_elsewhere(server: MailServer, recorder: Recorder) -> None:
    tried = Tried(server, RCPT, LOOKALIKES, recorder.socket)
    assert len(tried.recipients) > len(LOOKALIKES) / 2
    assert {name: to for name, to in tried.recipients.items() if to.rpartition("@")[2] == DOMAIN} == {}
    assert [seen.raw for seen in recorder.recipients if seen.matches(DOMAIN)] == []


def test_neighbours_are_somebody_else_at_the_domain(server: MailServer, recorder: Recorder) -> None:
    tried = Tried(server, RCPT, NEIGHBOURS, recorder.socket)
    assert set(tried.recipients) == set(NEIGHBOURS)
    assert {to.rpartition("@")[2] for to in tried.recipients.values()} == {DOMAIN}
    assert MAILBOX not in tried.recipients.values()
    assert all(seen.matches(DOMAIN) and not seen.matches(MAILBOX) for seen in recorder.recipients)


def test_postfix_delivers_some_more(postfix: Postfix, recorder: Recorder) -> None:
    listed = [*spellings.DELIVERED_BY_POSTFIX, *spellings.REWRITTEN_BY_POSTFIX]
    assert Tried(postfix, RCPT, listed, recorder.socket).recipients == dict.fromkeys(listed, MAILBOX)


def test_sendmail_delivers_some_more(sendmail: Sendmail, recorder: Recorder) -> None:
    listed = spellings.DELIVERED_BY_SENDMAIL
    assert Tried(sendmail, RCPT, listed, recorder.socket).recipients == dict.fromkeys(listed, MAILBOX)


def test_postfix_takes_more_letters_for_the_same(postfix: Postfix, recorder: Recorder) -> None:
    alias = f"inline:{{{MAILBOX}=alias@sink.test}}"
    tried = Tried(postfix, RCPT, spellings.FOLDED, recorder.socket, virtual_alias_maps=alias)
    assert tried.recipients == dict.fromkeys(spellings.FOLDED, "alias@sink.test")


def test_postfix_takes_domains_in_unicode(postfix: Postfix, recorder: Recorder) -> None:
    tried = Tried(postfix, RCPT, spellings.MAPPED, recorder.socket)
    assert set(tried.recipients) == set(spellings.MAPPED)
