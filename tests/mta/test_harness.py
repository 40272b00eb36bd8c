# SPDX-License-Identifier: GPL-3.0-or-later
"""The harness itself: what is sent arrives unchanged, what is refused is seen, nothing is left running."""

import os
import socket
import socketserver
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from . import conftest
from .postfix import MAIL_OWNER, Postfix, missing, open_directory, postfix_address
from .sendmail import Sendmail, sendmail_address
from .sendmail import missing as missing_sendmail
from .server import REFUSED, Queued
from .sink import PATIENCE, Sink
from .smtp import SmtpClient

MESSAGE = "From: <ann@client.test>\nSubject: hello\n\nHi\n"

AWKWARD = (
    b"From: <ann@client.test>\r\n"
    b"Subject: gr\xc3\xbc\xc3\x9fe, \xe4 and\r\n"
    b"\tfolded \r\n"
    b"X-Long: " + b"x" * 5000 + b"\r\n"
    b"\r\n"
    b".\r\n..\r\n.dot\r\n" + b"\x01\xff " * 3000 + b"\r\n\r\n"
)


class TestPostfix:
    def test_delivers_what_was_sent_byte_for_byte_below_its_own_trace(self, postfix: Postfix) -> None:
        with SmtpClient(postfix.service()) as client:
            assert client.ehlo().code == 250
            assert client.send("ann@client.test", "bob@sink.test", AWKWARD, "BODY=8BITMIME").code == 250
        delivery = postfix.sink.next()
        assert delivery.content.endswith(AWKWARD)
        assert [name for name, _ in delivery.fields] == ["Received", "From", "Subject", "X-Long"]
        assert delivery.values("subject") == ["grüße, \udce4 and\r\n\tfolded"]
        assert delivery.body == AWKWARD.partition(b"\r\n\r\n")[2]

    def test_passes_the_envelope_on_with_its_arguments(self, postfix: Postfix) -> None:
        with SmtpClient(postfix.service()) as client:
            client.ehlo()
            client.mail("änn@client.test", "SMTPUTF8", "RET=HDRS", "ENVID=q1")
            client.rcpt("bob@sink.test", "NOTIFY=FAILURE", "ORCPT=rfc822;bob@old.test")
            client.rcpt('"a>b"@sink.test')
            assert client.data(MESSAGE).code == 250
        delivery = postfix.sink.next()
        assert delivery.sender == "änn@client.test"
        assert delivery.mail_params == {"SMTPUTF8", "RET=HDRS", "ENVID=q1"}
        params = dict(zip(delivery.recipients, delivery.rcpt_params, strict=True))
        assert params.keys() == {"bob@sink.test", '"a>b"@sink.test'}
        assert params["bob@sink.test"] == {"NOTIFY=FAILURE", "ORCPT=rfc822;bob@old.test"}

    def test_takes_several_messages_on_one_connection(self, postfix: Postfix) -> None:
        with SmtpClient(postfix.service()) as client:
            client.ehlo()
            for number in range(3):
                assert client.send(f"ann{number}@client.test", "bob@sink.test", MESSAGE).code == 250
        senders = {delivery.sender for delivery in postfix.deliveries()}
        assert senders == {"ann0@client.test", "ann1@client.test", "ann2@client.test"}

    def test_says_so_when_nothing_was_delivered(self, postfix: Postfix) -> None:
        with SmtpClient(postfix.service()) as client:
            client.ehlo()
            client.mail("ann@client.test")
            client.command("RSET")
        assert postfix.deliveries() == []

    def test_shows_what_is_on_hold(self, postfix: Postfix) -> None:
        with SmtpClient(postfix.service(smtpd_data_restrictions="check_client_access static:hold")) as client:
            client.ehlo()
            assert client.send("ann@client.test", "bob@sink.test", MESSAGE).code == 250
        assert postfix.deliveries() == []
        (held,) = postfix.queue()
        assert (held.state, held.sender, held.recipients) == ("hold", "ann@client.test", ("bob@sink.test",))

    def test_starts_every_test_with_an_empty_queue(self, postfix: Postfix) -> None:
        postfix.service()
        assert postfix.queue() == []

    def test_restarts_only_for_other_parameters_and_keeps_its_port(self, postfix: Postfix) -> None:
        port = postfix.service()
        master = postfix.master_pid
        assert (postfix.service(), postfix.master_pid) == (port, master)
        assert postfix.service(smtpd_banner="other ESMTP") == port
        assert postfix.master_pid != master
        with SmtpClient(port) as client:
            assert str(client.greeting) == "220 other ESMTP"

    def test_survives_many_restarts_with_clients_connected(self, postfix: Postfix) -> None:
        for number in range(5):
            client = SmtpClient(postfix.service(smtpd_banner=f"number{number} ESMTP"))
            assert client.greeting.text == f"number{number} ESMTP"
        assert postfix.deliveries() == []

    def test_believes_a_client_that_it_is_somebody_else(self, postfix: Postfix) -> None:
        with SmtpClient(postfix.service()) as client:
            client.ehlo()
            assert client.xclient(NAME="mx.example.net", ADDR="192.0.2.8").code == 220
            client.ehlo("mx.example.net")
            client.send("ann@client.test", "bob@sink.test", MESSAGE)
        assert "(mx.example.net [192.0.2.8])" in postfix.sink.next().values("Received")[0]

    def test_leaves_nothing_behind(self) -> None:
        conftest.require_postfix()
        with open_directory() as directory, Sink() as sink:
            with Postfix(directory, sink) as postfix:
                port = postfix.service()
                master = postfix.master_pid
                with SmtpClient(port) as client:
                    client.send("ann@client.test", "bob@sink.test", MESSAGE)
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", port))
        assert not directory.exists()
        wait_until_ended(master)


class TestSendmail:
    def test_delivers_what_was_sent_byte_for_byte_below_its_own_trace(self, sendmail: Sendmail) -> None:
        content = AWKWARD.replace(b"x" * 5000, b"x" * 900).replace(b"\x01\xff " * 3000, b"\x01\xff ")
        with SmtpClient(sendmail.service()) as client:
            assert client.ehlo().code == 250
            assert client.send("ann@client.test", "bob@sink.test", content, "BODY=8BITMIME").code == 250
        (delivery,) = sendmail.deliveries()
        assert delivery.content.endswith(content)
        assert [name for name, _ in delivery.fields] == ["Received", "From", "Subject", "X-Long"]

    def test_passes_the_envelope_on_with_its_arguments(self, sendmail: Sendmail) -> None:
        with SmtpClient(sendmail.service()) as client:
            client.ehlo()
            client.mail("ann@client.test", "RET=HDRS", "ENVID=q1")
            client.rcpt("bob@sink.test", "NOTIFY=FAILURE", "ORCPT=rfc822;bob@old.test")
            client.rcpt("carl@sink.test", "NOTIFY=NEVER")
            assert client.data(MESSAGE).code == 250
        (delivery,) = sendmail.deliveries()
        assert (delivery.sender, delivery.mail_params >= {"RET=HDRS", "ENVID=q1"}) == ("ann@client.test", True)
        params = dict(zip(delivery.recipients, delivery.rcpt_params, strict=True))
        assert params["bob@sink.test"] == {"NOTIFY=FAILURE", "ORCPT=rfc822;bob@old.test"}
        assert params["carl@sink.test"] == {"NOTIFY=NEVER"}

    def test_has_delivered_before_the_next_command_is_answered(self, sendmail: Sendmail) -> None:
        with SmtpClient(sendmail.service()) as client:
            client.ehlo()
            for number in range(3):
                assert client.send(f"ann{number}@client.test", "bob@sink.test", MESSAGE).code == 250
        senders = [delivery.sender for delivery in sendmail.deliveries()]
        assert senders == ["ann0@client.test", "ann1@client.test", "ann2@client.test"]

    def test_refuses_a_recipient_by_itself(self, sendmail: Sendmail) -> None:
        with SmtpClient(sendmail.service()) as client:
            client.ehlo()
            client.mail("ann@client.test")
            assert client.rcpt(REFUSED).code == 550
            assert client.rcpt("bob@sink.test").code == 250

    def test_restarts_only_for_other_settings_and_keeps_its_port(self, sendmail: Sendmail) -> None:
        port = sendmail.service()
        daemon = sendmail.daemon_pid
        assert (sendmail.service(), sendmail.daemon_pid) == (port, daemon)
        assert sendmail.service(confMAX_HEADERS_LENGTH="1000") == port
        assert sendmail.daemon_pid != daemon

    def test_shows_what_could_not_be_delivered(self, sendmail: Sendmail) -> None:
        with SmtpClient(sendmail.service(confDELIVERY_MODE="queue")) as client:
            client.ehlo()
            client.send("ann@client.test", ["bob@sink.test", "carl@sink.test"], MESSAGE)
        assert sendmail.deliveries() == []
        (queued,) = sendmail.queue()
        expected = Queued("deferred", queued.queue_id, "ann@client.test", ("bob@sink.test", "carl@sink.test"))
        assert queued == expected
        sendmail.discard_queue()
        assert sendmail.queue() == []

    def test_takes_what_a_program_hands_in(self, sendmail: Sendmail) -> None:
        sendmail.service()
        sendmail.submit("ann@client.test", ["bob@sink.test"], MESSAGE.encode())
        (delivery,) = sendmail.deliveries()
        assert (delivery.sender, delivery.recipients) == ("ann@client.test", ("bob@sink.test",))

    def test_defers_when_no_filter_listens(self, sendmail: Sendmail, socket_dir: Path) -> None:
        with SmtpClient(sendmail.milter_service(f"{socket_dir}/nobody")) as client:
            assert client.ehlo().code == 250
            assert client.mail("ann@client.test").code == 451

    def test_heeds_the_flag_of_a_filter(self, sendmail: Sendmail, socket_dir: Path) -> None:
        with SmtpClient(sendmail.milter_service(f"{socket_dir}/nobody", F="")) as client:
            client.ehlo()
            assert client.send("ann@client.test", "bob@sink.test", MESSAGE).code == 250
        assert len(sendmail.deliveries()) == 1

    @pytest.mark.parametrize(("verdict", "code", "delivered"), [(b"a", 250, 1), (b"r", 554, 0), (b"d", 250, 0)])
    def test_asks_the_filter(
        self, sendmail: Sendmail, socket_dir: Path, verdict: bytes, code: int, delivered: int
    ) -> None:
        path = socket_dir / "filter"
        with scripted_filter(path, verdict):
            with SmtpClient(sendmail.milter_service(str(path))) as client:
                client.ehlo()
                assert client.send("ann@client.test", "bob@sink.test", MESSAGE).code == code
            assert len(sendmail.deliveries()) == delivered

    def test_leaves_nothing_behind(self) -> None:
        conftest.require_sendmail()
        with open_directory() as directory, Sink() as sink:
            with Sendmail(directory, sink) as sendmail:
                port = sendmail.service()
                group = sendmail.daemon_pid
                client = SmtpClient(port)
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", port))
            client.drop()
        assert not directory.exists()
        wait_until_ended(group)

    @pytest.mark.parametrize(
        ("given", "expected"),
        [
            ("inet:3000@localhost", "inet:3000@localhost"),
            ("unix:/run/filter", "unix:/run/filter"),
            ("/run/a:b", "unix:/run/a:b"),
        ],
    )
    def test_understands_addresses_of_libmilter(self, given: str, expected: str) -> None:
        assert sendmail_address(given) == expected

    def test_fails_where_it_cannot_run_under_continuous_integration(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "geteuid", lambda: 1000)
        monkeypatch.setenv("CI", "true")
        assert missing_sendmail() == "Sendmail can only be started by root"
        with pytest.raises(pytest.fail.Exception, match="CI is set"):
            conftest.require_sendmail()


class TestMilterService:
    def test_defers_when_nobody_listens(self, postfix: Postfix, socket_dir: Path) -> None:
        with SmtpClient(postfix.milter_service(f"unix:{socket_dir}/nobody")) as client:
            assert client.ehlo().code == 250
            assert client.mail("ann@client.test").code == 451
        assert postfix.deliveries() == []

    def test_heeds_the_other_milter_parameters(self, postfix: Postfix, socket_dir: Path) -> None:
        port = postfix.milter_service(f"{socket_dir}/nobody", milter_default_action="accept")
        with SmtpClient(port) as client:
            client.ehlo()
            assert client.send("ann@client.test", "bob@sink.test", MESSAGE).code == 250
        assert postfix.sink.next().sender == "ann@client.test"

    @pytest.mark.parametrize(("verdict", "code", "delivered"), [(b"a", 250, 1), (b"r", 550, 0), (b"d", 250, 0)])
    def test_asks_the_filter(
        self, postfix: Postfix, socket_dir: Path, verdict: bytes, code: int, delivered: int
    ) -> None:
        path = socket_dir / "filter"
        with scripted_filter(path, verdict), SmtpClient(postfix.milter_service(str(path))) as client:
            client.ehlo()
            assert client.send("ann@client.test", "bob@sink.test", MESSAGE).code == code
            assert len(postfix.deliveries()) == delivered

    @pytest.mark.parametrize(
        ("given", "expected"),
        [
            ("inet:3000@localhost", "inet:localhost:3000"),
            ("inet6:3000@::1", "inet:[::1]:3000"),
            ("inet:localhost:3000", "inet:localhost:3000"),
            ("local:/run/filter", "unix:/run/filter"),
            ("/run/filter", "unix:/run/filter"),
            ("/run/a:b", "unix:/run/a:b"),
        ],
    )
    def test_understands_addresses_of_libmilter(self, given: str, expected: str) -> None:
        assert postfix_address(given) == expected


class TestRequirements:
    def test_socket_dir_is_open_to_postfix(self, socket_dir: Path) -> None:
        conftest.require_postfix()
        assert len(str(socket_dir)) < 60
        subprocess.run(["ls", socket_dir], check=True, user=MAIL_OWNER, capture_output=True)

    def test_skips_where_postfix_cannot_run(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "geteuid", lambda: 1000)
        monkeypatch.delenv("CI", raising=False)
        assert missing() == "Postfix can only be started by root"
        with pytest.raises(pytest.skip.Exception, match="only be started by root"):
            conftest.require_postfix()

    def test_fails_there_under_continuous_integration(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "geteuid", lambda: 1000)
        monkeypatch.setenv("CI", "true")
        with pytest.raises(pytest.fail.Exception, match="CI is set"):
            conftest.require_postfix()


class TestSink:
    def test_takes_any_argument_and_undoubles_dots_exactly(self) -> None:
        content = b".x\r\n..\r\nbare\n.\r\n" + b"l" * 100_000 + b"\r\nno\x00end\xff"
        with Sink() as sink:
            with SmtpClient(sink.port) as client:
                client.ehlo()
                client.mail("ann@client.test", "SIZE=1", "X-ODD=(any thing)")
                client.rcpt("bob@sink.test", "NOTIFY=MAYBE")
                assert client.data(content).code == 250
            delivery = sink.next()
        assert delivery.content == content + b"\r\n"
        assert delivery.mail == "<ann@client.test> SIZE=1 X-ODD=(any thing)"
        assert delivery.rcpts == ("<bob@sink.test> NOTIFY=MAYBE",)

    def test_forgets_what_was_not_finished(self) -> None:
        with Sink() as sink:
            client = SmtpClient(sink.port)
            client.pipeline("MAIL FROM:<ann@client.test>", "RCPT TO:<bob@sink.test>", "DATA")
            client.write(b"half a line")
            client.drop()
            with SmtpClient(sink.port) as other:
                other.send("", "bob@sink.test", "\n")
            assert [sink.next().sender, *sink.drain()] == [""]

    def test_waiting_ends_in_a_failure(self) -> None:
        with Sink() as sink, pytest.raises(AssertionError, match="no message"):
            sink.next(patience=0)


def wait_until_ended(group: int) -> None:
    """Wait until no process of the group runs; zombies do not."""
    deadline = time.monotonic() + PATIENCE
    while running := [stat for stat in Path("/proc").glob("[0-9]*/stat") if runs_in(group, stat)]:
        assert time.monotonic() < deadline, f"still running: {running}"
        time.sleep(0.002)


def runs_in(group: int, stat: Path) -> bool:
    try:
        state, _parent, process_group = stat.read_text().rpartition(")")[2].split()[:3]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return int(process_group) == group and state not in "ZX"


@contextmanager
def scripted_filter(path: Path, verdict: bytes) -> Iterator[None]:
    """A filter of a few lines: it wants to see no stage, and gives its verdict at the end of each message."""

    class Session(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            while size := self.rfile.read(4):
                packet = self.rfile.read(int.from_bytes(size))
                if packet.startswith(b"O"):
                    _version, _actions, steps = struct.unpack(">3I", packet[1:])
                    no_stages = steps & 0x37F
                    self.wfile.write(struct.pack(">Ic3I", 13, b"O", 6, 0, no_stages))
                elif packet.startswith(b"E"):
                    self.wfile.write(struct.pack(">Ic", 1, verdict))

    with socketserver.ThreadingUnixStreamServer(str(path), Session) as server:
        server.daemon_threads = True
        path.chmod(0o666)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield
        server.shutdown()
        thread.join()
