# SPDX-License-Identifier: GPL-3.0-or-later
"""Filters inside a real Postfix: each one a process that is run as its user would run it."""

import json
import re
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from tests.filter_process import FilterProcess, RunFilter

from .postfix import Postfix
from .sink import Delivery, Sink
from .smtp import Answer, SmtpClient

GUARD = "examples/guard.py"
COUNTER = "examples/recipient_counter.py"
INSPECT = ("-m", "milter", "inspect", "--json")
FILTERS = Path(__file__).parent / "filters"

ANN = "ann@client.test"
BOB = "bob@sink.test"
CARL = "carl@sink.test"
MESSAGE = "From: <ann@client.test>\nSubject: hello\n\nHi\n"
TEMPFAIL = "451 4.7.1 Service unavailable - try again later"

Event: TypeAlias = dict[str, Any]
Obey: TypeAlias = Callable[..., Delivery]


def events(inspector: FilterProcess, stage: str = "") -> list[Event]:
    """What `milter inspect --json` has printed, of one stage or of all."""
    inspector.stop()
    found: list[Event] = [json.loads(line) for line in inspector.stdout.lines]
    return [event for event in found if stage in ("", event["stage"])]


@contextmanager
def session(port: int) -> Iterator[SmtpClient]:
    """An SMTP session that has begun with EHLO."""
    with SmtpClient(port) as client:
        assert client.ehlo().code == 250
        yield client


def send(port: int, content: str | bytes = MESSAGE, *params: str, recipients: tuple[str, ...] = (BOB,)) -> Answer:
    """A message on a connection of its own; the answer for the first refused command or the final dot."""
    with session(port) as client:
        return client.send(ANN, recipients, content, *params)


def own_fields(delivery: Delivery) -> list[tuple[str, str]]:
    """The header without Postfix's Received."""
    return [(name, value) for name, value in delivery.fields if name != "Received"]


class TestPassing:
    def test_a_message_gets_the_filters_field_and_is_else_unchanged(
        self, postfix: Postfix, sink: Sink, run_filter: RunFilter, socket_spec: str
    ) -> None:
        guard = run_filter(GUARD, socket_spec)

        answer = send(postfix.milter_service(guard.socket))

        assert answer.code == 250
        delivery = sink.next()
        assert own_fields(delivery) == [("From", " <ann@client.test>"), ("Subject", " hello"), ("X-Guard", " passed")]
        assert (delivery.sender, delivery.recipients, delivery.body) == (ANN, (BOB,), b"Hi\r\n")

    def test_the_recipients_of_each_message_are_counted_anew(
        self, postfix: Postfix, run_filter: RunFilter, socket_spec: str
    ) -> None:
        counter = run_filter(COUNTER, socket_spec)

        with session(postfix.milter_service(counter.socket)) as client:
            client.send("one@client.test", [BOB], MESSAGE)
            client.send("three@client.test", [BOB, CARL, "dora@sink.test"], MESSAGE)
            client.mail("none@client.test")
            client.rcpt(BOB)
            client.command("RSET")
            client.send("two@client.test", [BOB, CARL], MESSAGE)

        counts = {delivery.sender: delivery.values("X-Recipient-Count") for delivery in postfix.deliveries()}
        assert counts == {"one@client.test": ["1"], "three@client.test": ["3"], "two@client.test": ["2"]}
        counter.stop()
        assert counter.stdout.lines == [
            "message 1 of [127.0.0.1]: 1 recipients",
            "message 2 of [127.0.0.1]: 3 recipients",
            "message 3 of [127.0.0.1]: 2 recipients",
        ]

    def test_headers_in_utf8_and_other_bytes_are_seen_and_delivered_byte_for_byte(
        self, postfix: Postfix, sink: Sink, run_filter: RunFilter, socket_spec: str
    ) -> None:
        content = (
            b"From: <ann@client.test>\r\n"
            b"Subject: gr\xc3\xbc\xc3\x9fe \xf0\x9f\x93\xac\r\n"
            b"X-Latin: caf\xe9 \xff\xfe\r\n"
            b"X-Folded: one\r\n two \xe9\r\n\tthree\r\n"
            b"X-Spaces:   three before, two after  \r\n"
            b"X-Empty:\r\n"
            b"X-Long: " + b"\xc3\xa4" * 2000 + b"\r\n"
            b"\r\n"
            b"text\r\n"
        )
        inspector = run_filter(*INSPECT, socket_spec)

        assert send(postfix.milter_service(inspector.socket), content, "BODY=8BITMIME").code == 250

        assert sink.next().content.endswith(content)
        headers = [(event["name"], event["value"]) for event in events(inspector, "header")]
        assert headers == [
            ("From", "<ann@client.test>"),
            ("Subject", "grüße 📬"),
            ("X-Latin", "caf\udce9 \udcff\udcfe"),
            ("X-Folded", "one\n two \udce9\n\tthree"),
            ("X-Spaces", "  three before, two after  "),
            ("X-Empty", ""),
            ("X-Long", "ä" * 2000),
        ]

    def test_a_message_without_any_header_passes(
        self, postfix: Postfix, sink: Sink, run_filter: RunFilter, socket_spec: str
    ) -> None:
        guard = run_filter(GUARD, socket_spec)

        assert send(postfix.milter_service(guard.socket), b"\r\nonly text\r\n").code == 250

        delivery = sink.next()
        assert (own_fields(delivery), delivery.body) == ([("X-Guard", " passed")], b"only text\r\n")

    def test_a_message_of_nothing_passes(
        self, postfix: Postfix, sink: Sink, run_filter: RunFilter, socket_spec: str
    ) -> None:
        guard = run_filter(GUARD, socket_spec)

        assert send(postfix.milter_service(guard.socket), b"").code == 250

        delivery = sink.next()
        assert (own_fields(delivery), delivery.body) == ([("X-Guard", " passed")], b"")

    def test_two_filters_see_the_message_one_after_the_other(
        self, postfix: Postfix, sink: Sink, run_filter: RunFilter, socket_spec: str
    ) -> None:
        counter = run_filter(COUNTER, "inet:0@127.0.0.1")
        inspector = run_filter(*INSPECT, socket_spec)

        assert send(postfix.milter_service([counter.socket, inspector.socket])).code == 250

        assert sink.next().values("X-Recipient-Count") == ["1"]
        assert [event["name"] for event in events(inspector, "header")] == ["From", "Subject", "X-Recipient-Count"]


class TestRefusing:
    def test_a_refused_recipient_gets_the_reply_with_its_percent_sign_and_the_others_get_the_message(
        self, postfix: Postfix, run_filter: RunFilter, socket_spec: str
    ) -> None:
        guard = run_filter(GUARD, socket_spec)

        with session(postfix.milter_service(guard.socket)) as client:
            client.mail(ANN)
            before = client.rcpt(BOB)
            refused = client.rcpt("staff@internal.example")
            after = client.rcpt(CARL)
            accepted = client.data(MESSAGE)

        assert str(refused) == "550 5.7.1 internal addresses are not for you, we are 100% sure"
        assert [before.code, after.code, accepted.code] == [250, 250, 250]
        (delivery,) = postfix.deliveries()
        assert sorted(delivery.recipients) == [BOB, CARL]

    def test_without_any_recipient_left_there_is_no_message(
        self, postfix: Postfix, run_filter: RunFilter, socket_spec: str
    ) -> None:
        guard = run_filter(GUARD, socket_spec)

        with session(postfix.milter_service(guard.socket)) as client:
            client.mail(ANN)
            client.rcpt("staff@internal.example")
            answer = client.data(MESSAGE)

        assert str(answer) == "554 5.5.1 Error: no valid recipients"
        assert postfix.deliveries() == []

    def test_a_refused_message_gets_the_reply_of_two_lines_and_is_not_delivered(
        self, postfix: Postfix, run_filter: RunFilter, socket_spec: str
    ) -> None:
        guard = run_filter(GUARD, socket_spec)

        answer = send(postfix.milter_service(guard.socket), "Subject: forbidden\n\ntext\n")

        assert answer == Answer(554, ("5.7.1 this subject is forbidden", "5.7.1 choose another one"))
        assert postfix.deliveries() == []


class TestSeveralMessages:
    def test_a_refusal_leaves_nothing_behind_for_the_next_message_of_the_connection(
        self, postfix: Postfix, run_filter: RunFilter, socket_spec: str
    ) -> None:
        guard = run_filter(GUARD, socket_spec)

        with session(postfix.milter_service(guard.socket)) as client:
            refused = client.send("one@client.test", BOB, "Subject: forbidden\n\nping\n")
            client.mail("two@client.test")
            refused_recipient = client.rcpt("staff@internal.example")
            client.command("RSET")
            unknown = client.command("FOO")
            accepted = client.send("three@client.test", CARL, "Subject: fine\n\nping\n")
            again = client.send("four@client.test", BOB, "Subject: fine too\n\nmore than ping\n")

        codes = [answer.code for answer in (refused, refused_recipient, unknown, accepted, again)]
        assert codes == [554, 550, 500, 250, 250]
        assert unknown.text == "5.5.2 Error: command not recognized"
        delivered = {delivery.sender: (delivery.recipients, delivery.body) for delivery in postfix.deliveries()}
        assert delivered == {
            "three@client.test": ((CARL,), b"pong\r\n"),
            "four@client.test": ((BOB,), b"more than ping\r\n"),
        }

    def test_envelope_and_content_of_each_message_are_its_own(
        self, postfix: Postfix, run_filter: RunFilter, socket_spec: str
    ) -> None:
        inspector = run_filter(*INSPECT, socket_spec)

        with session(postfix.milter_service(inspector.socket)) as client:
            for number in range(3):
                client.send(f"ann{number}@client.test", [BOB, f"to{number}@sink.test"], f"X-Number: {number}\n\nHi\n")

        assert len(postfix.deliveries()) == 3
        seen = events(inspector)
        assert len({event["connection"] for event in seen}) == 1
        ends = [(event["sender"], event["recipients"]) for event in seen if event["stage"] == "eom"]
        assert ends == [(f"ann{number}@client.test", [BOB, f"to{number}@sink.test"]) for number in range(3)]
        headers = [(event["name"], event["value"]) for event in seen if event["stage"] == "header"]
        assert headers == [("X-Number", str(number)) for number in range(3)]

    def test_a_reset_in_the_middle_aborts_once_and_the_next_message_begins_afresh(
        self, postfix: Postfix, run_filter: RunFilter, socket_spec: str
    ) -> None:
        inspector = run_filter(*INSPECT, socket_spec)

        with session(postfix.milter_service(inspector.socket)) as client:
            client.mail("given-up@client.test")
            client.rcpt(BOB)
            assert client.command("RSET").code == 250
            client.send(ANN, CARL, MESSAGE)

        (delivery,) = postfix.deliveries()
        assert (delivery.sender, delivery.recipients) == (ANN, (CARL,))
        seen = events(inspector)
        assert Counter(event["stage"] for event in seen)["abort"] == 1
        stages = [event["stage"] for event in seen]
        assert stages[3:8] == ["mail", "rcpt", "abort", "mail", "rcpt"]
        (end,) = [event for event in seen if event["stage"] == "eom"]
        assert (end["sender"], end["recipients"]) == (ANN, [CARL])

    def test_connections_side_by_side_do_not_mix(
        self, postfix: Postfix, run_filter: RunFilter, socket_spec: str
    ) -> None:
        counter = run_filter(COUNTER, socket_spec)
        port = postfix.milter_service(counter.socket)

        with session(port) as first, session(port) as second:
            first.mail("one@client.test")
            second.mail("two@client.test")
            first.rcpt(BOB)
            second.rcpt(BOB)
            second.rcpt(CARL)
            assert [first.data(MESSAGE).code, second.data(MESSAGE).code] == [250, 250]

        counts = {delivery.sender: delivery.values("X-Recipient-Count") for delivery in postfix.deliveries()}
        assert counts == {"one@client.test": ["1"], "two@client.test": ["2"]}


@pytest.fixture
def obey(postfix: Postfix, sink: Sink, run_filter: RunFilter, socket_spec: str, tmp_path: Path) -> Obey:
    """Have a filter make changes, pairs of a method of EomContext and its arguments; the message as delivered."""

    def send_through(content: str | bytes, *changes: tuple[Any, ...], recipients: tuple[str, ...] = (BOB,)) -> Delivery:
        script = tmp_path / "changes"
        script.write_text(ascii(list(changes)))
        obedient = run_filter(FILTERS / "obedient.py", socket_spec, script)
        answer = send(postfix.milter_service(obedient.socket), content, "BODY=8BITMIME", recipients=recipients)
        assert answer.code == 250, f"{answer}: {obedient}"
        return sink.next()

    return send_through


class TestNewBody:
    def test_a_ping_is_answered(self, postfix: Postfix, sink: Sink, run_filter: RunFilter, socket_spec: str) -> None:
        guard = run_filter(GUARD, socket_spec)

        assert send(postfix.milter_service(guard.socket), "Subject: hello\n\nping\n").code == 250

        delivery = sink.next()
        assert (delivery.values("X-Guard"), delivery.body) == (["passed"], b"pong\r\n")


CONTENT = "From: <ann@client.test>\nX-Twin: 1\nSubject: hello\nX-Twin: 2\n\nHi\n"


class TestChanges:
    def test_all_kinds_of_changes_go_together(self, obey: Obey) -> None:
        delivery = obey(
            CONTENT,
            ("replace_sender", "new@client.test"),
            ("replace_header", "Subject", 1, "changed"),
            ("replace_body", b"changed\r\n" * 10_000),
            ("add_header", "X-New", "field"),
            ("add_recipient", CARL),
        )

        assert delivery.sender == "new@client.test"
        assert set(delivery.recipients) == {BOB, CARL}
        assert (delivery.values("Subject"), delivery.values("X-New")) == (["changed"], ["field"])
        assert delivery.body == b"changed\r\n" * 10_000


class TestMacros:
    def test_a_client_that_has_logged_in_is_known_by_its_macro(
        self, postfix: Postfix, run_filter: RunFilter, socket_spec: str
    ) -> None:
        guard = run_filter(GUARD, socket_spec)
        port = postfix.milter_service(guard.socket, smtpd_sasl_auth_enable="yes")

        with session(port) as client:
            assert client.xclient(LOGIN="ann").code == 220
            client.ehlo()
            known = client.send(ANN, "staff@internal.example", MESSAGE)
            assert client.xclient(LOGIN="[UNAVAILABLE]").code == 220
            client.ehlo()
            stranger = client.send(ANN, "staff@internal.example", MESSAGE)

        assert (known.code, stranger.code) == (250, 550)
        (delivery,) = postfix.deliveries()
        assert delivery.recipients == ("staff@internal.example",)

    def test_the_queue_id_is_that_of_the_reply(self, postfix: Postfix, run_filter: RunFilter, socket_spec: str) -> None:
        inspector = run_filter(*INSPECT, socket_spec)

        with session(postfix.milter_service(inspector.socket)) as client:
            answers = [client.send(ANN, BOB, MESSAGE) for _ in range(2)]

        queue_ids = [event["macros"]["i"] for event in events(inspector, "eom")]
        assert [answer.text for answer in answers] == [f"2.0.0 Ok: queued as {queue_id}" for queue_id in queue_ids]
        assert len(set(queue_ids)) == 2

    def test_a_requested_list_always_brings_the_servers_name_so_that_nothing_older_remains(
        self, postfix: Postfix, run_filter: RunFilter, socket_spec: str
    ) -> None:
        running = run_filter(*INSPECT, socket_spec)
        port = postfix.milter_service(running.socket, debug_peer_list="127.0.0.1")
        before = len(postfix.log())

        assert send(port).code == 250

        sent = dict(re.findall(r"event: SMFIC_([A-Z]+); macros: (.*)", postfix.log()[before:]))
        named = {stage for stage, macros in sent.items() if "j=mta.test" in macros.split()}
        assert named >= {"CONNECT", "HELO", "MAIL", "RCPT", "DATA"}

    def test_a_requested_list_loses_nothing_of_what_is_sent_by_default(
        self, postfix: Postfix, run_filter: RunFilter, socket_spec: str
    ) -> None:
        inspector = run_filter(*INSPECT, socket_spec)

        with session(postfix.milter_service(inspector.socket)) as client:
            client.send(ANN, [BOB, CARL], MESSAGE)

        seen = events(inspector)
        connect, mail, first, second = (seen[position]["macros"] for position in (1, 3, 4, 5))
        assert {"j", "v", "_", "{daemon_name}", "{daemon_addr}"} <= connect.keys()
        assert (mail["{mail_addr}"], first["{rcpt_addr}"], second["{rcpt_addr}"]) == (ANN, BOB, CARL)
        assert "i" not in first
        assert "i" in second


class TestUnknownCommands:
    def test_an_unknown_command_gets_the_filters_reply(
        self, postfix: Postfix, run_filter: RunFilter, socket_spec: str
    ) -> None:
        unknown_commands = run_filter(FILTERS / "unknown_commands.py", socket_spec)

        with session(postfix.milter_service(unknown_commands.socket)) as client:
            answers = [client.command("FOO bar"), client.command("XYZZY")]
            known = client.command("NOOP")

        assert [str(answer) for answer in answers] == [
            "450 4.5.1 FOO is 100% unknown",
            "450 4.5.1 XYZZY is 100% unknown",
        ]
        assert known.code == 250

    @pytest.mark.parametrize(
        ("program", "reply", "output"),
        [
            ((FILTERS / "unknown_commands.py",), "450 4.5.1 FOO is 100% unknown", ["From", "Subject"]),
            ((FILTERS / "some_stages.py", "header"), "500 5.5.2 Error: command not recognized", ["header", "header"]),
        ],
        ids=["handled", "not-handled"],
    )
    def test_an_unknown_command_before_the_content_does_no_harm(
        self,
        postfix: Postfix,
        sink: Sink,
        run_filter: RunFilter,
        socket_spec: str,
        program: tuple[Path, *tuple[str, ...]],
        reply: str,
        output: list[str],
    ) -> None:
        script, *stages = program
        running = run_filter(script, socket_spec, *stages)

        with session(postfix.milter_service(running.socket)) as client:
            client.mail(ANN)
            client.rcpt(BOB)
            unknown = client.command("FOO")
            accepted = client.data(MESSAGE)

        assert str(unknown) == reply
        assert accepted.code == 250
        assert sink.next().body == b"Hi\r\n"
        running.stop()
        assert running.stdout.lines == output

    def test_unknown_commands_everywhere_do_no_harm(
        self, postfix: Postfix, sink: Sink, run_filter: RunFilter, socket_spec: str
    ) -> None:
        inspector = run_filter(*INSPECT, socket_spec)

        with SmtpClient(postfix.milter_service(inspector.socket)) as client:
            client.command("FOO")
            client.ehlo()
            client.command("FOO")
            client.mail(ANN)
            client.command("FOO")
            client.rcpt(BOB)
            client.command("FOO")
            assert client.data(MESSAGE).code == 250
            client.command("FOO")

        assert sink.next().body == b"Hi\r\n"
        assert [event["command"] for event in events(inspector, "unknown")] == ["FOO"] * 5


class TestSomeStages:
    """Postfix leaves out the stages that a filter does not handle; it must never wait for an answer there."""

    @pytest.mark.parametrize(
        "stages",
        [
            ("data",),
            ("header",),
            ("eoh",),
            ("body",),
            ("unknown",),
            ("data", "header"),
            ("data", "body"),
            ("data", "header", "body"),
            ("data", "eoh", "unknown"),
            ("header", "unknown"),
            ("body", "unknown"),
            ("eom", "unknown"),
        ],
        ids="-".join,
    )
    def test_messages_pass_with_and_without_header_and_unknown_command(
        self, postfix: Postfix, run_filter: RunFilter, socket_dir: Path, stages: tuple[str, ...]
    ) -> None:
        running = run_filter(FILTERS / "some_stages.py", f"unix:{socket_dir}/filter", *stages)
        happened = []

        with session(postfix.milter_service(running.socket)) as client:
            for unknown, headers in product((0, 1), (0, 1)):
                client.mail(ANN)
                client.rcpt(BOB)
                assert all(client.command("FOO").code == 500 for _ in range(unknown))
                assert client.data("Subject: hello\n" * headers + "\nHi\n").code == 250
                happened += ["unknown"] * unknown + ["data"] + ["header"] * headers + ["eoh", "body", "eom"]

        assert [delivery.body for delivery in postfix.deliveries()] == [b"Hi\r\n"] * 4
        running.stop()
        assert running.stdout.lines == [stage for stage in happened if stage in stages]


class TestFailingHandlers:
    @pytest.mark.parametrize("kind", ["judge", "observe"])
    @pytest.mark.parametrize("stage", ["mail", "rcpt", "data", "header", "eoh", "body", "eom"])
    def test_the_message_is_to_be_tried_again_and_the_next_one_passes(
        self, postfix: Postfix, run_filter: RunFilter, socket_spec: str, stage: str, kind: str
    ) -> None:
        failing = run_filter(FILTERS / "failing.py", socket_spec, stage, kind)
        port = postfix.milter_service(failing.socket)

        with session(port) as client:
            failed = client.send("poison@client.test", BOB, MESSAGE)
        next_one = send(port)

        assert str(failed) == TEMPFAIL
        assert next_one.code == 250
        (delivery,) = postfix.deliveries()
        assert delivery.sender == ANN
        failing.stop()
        assert "RuntimeError: poisoned" in failing.stderr.lines
        report = failing.stderr.wait_for(f"{kind} failed in on_{stage} ")
        assert "client '[127.0.0.1]' [127.0.0.1:" in report

    @pytest.mark.parametrize("kind", ["judge", "observe"])
    @pytest.mark.parametrize("stage", ["connect", "helo"])
    def test_the_connection_is_to_be_tried_again_and_the_next_one_passes(
        self, postfix: Postfix, run_filter: RunFilter, socket_spec: str, stage: str, kind: str
    ) -> None:
        failing = run_filter(FILTERS / "failing.py", socket_spec, stage, kind)
        port = postfix.milter_service(failing.socket)

        with session(port) as client:
            client.xclient(NAME="poison.test")
            client.ehlo("poison.test")
            failed = [client.send(ANN, BOB, MESSAGE) for _ in range(2)]
        next_one = send(port)

        assert [str(answer) for answer in failed] == [TEMPFAIL] * 2
        assert next_one.code == 250
        assert len(postfix.deliveries()) == 1

    @pytest.mark.parametrize("stage", ["abort", "close"])
    def test_where_no_reply_is_possible_a_failure_does_no_harm(
        self, postfix: Postfix, run_filter: RunFilter, socket_spec: str, stage: str
    ) -> None:
        failing = run_filter(FILTERS / "failing.py", socket_spec, stage, "observe")

        with session(postfix.milter_service(failing.socket)) as client:
            client.xclient(NAME="poison.test")
            client.ehlo()
            client.mail("poison@client.test")
            client.command("RSET")
            answer = client.send(ANN, BOB, MESSAGE)

        assert answer.code == 250
        assert len(postfix.deliveries()) == 1
        failing.stop()
        assert failing.stderr.lines.count("RuntimeError: poisoned") == 1

    def test_a_failure_can_stop_the_filter(self, postfix: Postfix, run_filter: RunFilter, socket_spec: str) -> None:
        failing = run_filter(FILTERS / "failing.py", socket_spec, "eoh", "judge", "shutdown")
        port = postfix.milter_service(failing.socket)

        with session(port) as client:
            fine = client.send(ANN, BOB, MESSAGE)
            failed = client.send("poison@client.test", BOB, MESSAGE)
        code = failing.wait()
        later = send(port)

        assert (fine.code, str(failed), str(later)) == (250, TEMPFAIL, TEMPFAIL)
        (delivery,) = postfix.deliveries()
        assert delivery.sender == ANN
        assert code == 1
        assert "RuntimeError: poisoned" in failing.stderr.lines
        last = failing.stderr.lines[-1]
        assert last == "milter.errors.HandlerError: judge failed in on_eoh: RuntimeError('poisoned')"


class TestStopping:
    def test_an_idle_filter_ends_well(
        self, postfix: Postfix, run_filter: RunFilter, socket_spec: str, socket_dir: Path
    ) -> None:
        guard = run_filter(GUARD, socket_spec)

        guard.stop()

        assert (guard.stdout.lines, guard.stderr.lines) == ([], [])
        assert list(socket_dir.iterdir()) == []

    def test_a_filter_that_has_just_begun_to_listen_ends_well(self, run_filter: RunFilter, socket_spec: str) -> None:
        # Once in many times a signal arrives while libmilter's own threads are being started.
        for _ in range(30):
            run_filter(GUARD, socket_spec).stop()

    def test_a_filter_that_has_served_ends_well(
        self, postfix: Postfix, sink: Sink, run_filter: RunFilter, socket_spec: str, socket_dir: Path
    ) -> None:
        guard = run_filter(GUARD, socket_spec)
        port = postfix.milter_service(guard.socket)
        assert [send(port).code for _ in range(3)] == [250] * 3

        guard.stop()

        assert (guard.stdout.lines, guard.stderr.lines) == ([], [])
        assert list(socket_dir.iterdir()) == []
        assert str(send(port)) == TEMPFAIL

    @pytest.mark.parametrize(
        ("content", "code", "delivered"), [(MESSAGE, 250, 1), ("Subject: forbidden\n\ntext\n", 554, 0)]
    )
    def test_a_message_under_way_is_finished_as_judged(
        self,
        postfix: Postfix,
        run_filter: RunFilter,
        socket_spec: str,
        content: str,
        code: int,
        delivered: int,
    ) -> None:
        guard = run_filter(GUARD, socket_spec)
        port = postfix.milter_service(guard.socket)

        with session(port) as client:
            client.mail(ANN)
            client.rcpt(BOB)
            guard.signal(signal.SIGTERM)
            guard.log.wait_for("end of open connections: 1")
            refused = client.rcpt("staff@internal.example")
            answer = client.data(content)
        exit_code = guard.wait()

        assert (refused.code, answer.code, exit_code) == (550, code, 0)
        assert [delivery.values("X-Guard") for delivery in postfix.deliveries()] == [["passed"]] * delivered

    @pytest.mark.parametrize(
        ("order", "reply", "delivered"), [("accept", "250 2.0.0 Ok", 1), ("reject", "554 5.7.1 nobody wanted it", 0)]
    )
    def test_a_handler_at_work_is_waited_for(
        self, postfix: Postfix, run_filter: RunFilter, socket_spec: str, order: str, reply: str, delivered: int
    ) -> None:
        patient = run_filter(FILTERS / "patient.py", socket_spec)

        with session(postfix.milter_service(patient.socket)) as client, ThreadPoolExecutor() as pool:
            answer = pool.submit(client.send, ANN, BOB, MESSAGE)
            patient.stdout.wait_for("what now?")
            patient.signal(signal.SIGTERM)
            patient.log.wait_for("end of open connections: 1")
            patient.say(order)
            said = str(answer.result())
        exit_code = patient.wait()

        assert said.startswith(reply)
        assert exit_code == 0
        assert [delivery.values("X-Patient") for delivery in postfix.deliveries()] == [["wanted"]] * delivered

    def test_a_signal_that_reaches_another_thread_than_the_main_one_stops_the_filter(
        self, postfix: Postfix, sink: Sink, run_filter: RunFilter, socket_spec: str
    ) -> None:
        self_stopping = run_filter(FILTERS / "self_stopping.py", socket_spec)

        assert send(postfix.milter_service(self_stopping.socket)).code == 250

        assert self_stopping.wait() == 0
        assert sink.next().values("X-Stopped") == ["yes"]

    def test_new_connections_are_not_taken_while_the_last_message_is_finished(
        self, postfix: Postfix, run_filter: RunFilter, socket_spec: str
    ) -> None:
        guard = run_filter(GUARD, socket_spec)
        port = postfix.milter_service(guard.socket)

        with session(port) as client:
            client.mail(ANN)
            guard.signal(signal.SIGTERM)
            guard.log.wait_for("end of open connections: 1")
            late = send(port)
            client.rcpt(BOB)
            answer = client.data(MESSAGE)
        exit_code = guard.wait()

        assert (str(late), answer.code, exit_code) == (TEMPFAIL, 250, 0)
        assert len(postfix.deliveries()) == 1


class TestInspector:
    def test_it_shows_every_stage(self, postfix: Postfix, sink: Sink, run_filter: RunFilter, socket_spec: str) -> None:
        inspector = run_filter(*INSPECT, socket_spec)

        with session(postfix.milter_service(inspector.socket)) as client:
            client.mail(ANN, "SIZE=40", "BODY=8BITMIME")
            client.rcpt(BOB, "NOTIFY=NEVER")
            client.rcpt(CARL)
            client.command("FOO")
            client.data(b"Subject: hello\r\n\r\nHi \xff\r\n")
            client.mail(ANN)
            client.command("RSET")

        assert sink.next().body == b"Hi \xff\r\n"
        seen = events(inspector)
        shown = [
            {name: value for name, value in event.items() if name not in ("connection", "macros")} for event in seen
        ]
        address = shown[1].pop("address")
        offered = shown.pop(0)
        assert shown == [
            {"stage": "connect", "hostname": "[127.0.0.1]"},
            {"stage": "helo", "name": "client.test"},
            {"stage": "mail", "sender": f"<{ANN}>", "params": ["SIZE=40", "BODY=8BITMIME"]},
            {"stage": "rcpt", "recipient": f"<{BOB}>", "params": ["NOTIFY=NEVER"]},
            {"stage": "rcpt", "recipient": f"<{CARL}>", "params": []},
            {"stage": "unknown", "command": "FOO"},
            {"stage": "data"},
            {"stage": "header", "name": "Subject", "value": "hello"},
            {"stage": "eoh"},
            {"stage": "body", "size": 6, "chunk": "Hi \udcff\r\n"},
            {"stage": "eom", "sender": ANN, "recipients": [BOB, CARL]},
            {"stage": "mail", "sender": f"<{ANN}>", "params": []},
            {"stage": "abort"},
            {"stage": "close"},
        ]
        assert address.startswith("127.0.0.1")
        assert offered["stage"] == "negotiate"
        assert "REPLACE_BODY" in offered["actions"]
        macros = seen[1]["macros"]
        assert (macros["j"], macros["{client_addr}"]) == ("mta.test", "127.0.0.1")

    def test_a_client_that_leaves_is_shown(self, postfix: Postfix, run_filter: RunFilter, socket_spec: str) -> None:
        inspector = run_filter(*INSPECT, socket_spec)

        client = SmtpClient(postfix.milter_service(inspector.socket))
        client.ehlo()
        client.mail(ANN)
        client.drop()
        inspector.stdout.wait_for('"close"')

        assert [event["stage"] for event in events(inspector)] == [
            "negotiate",
            "connect",
            "helo",
            "mail",
            "abort",
            "close",
        ]
