# SPDX-License-Identifier: GPL-3.0-or-later
"""The MTA's side of a connection, played against a milter that follows a script."""

import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Self

import pytest

from milter.testing import client as client_module
from milter.testing.client import (
    Client,
    ClientAddress,
    EndOfMessage,
    Outcome,
    PeerClosed,
    PeerTimeout,
    Session,
    Transcript,
)
from milter.testing.delivery import Envelope, Mailbox, Message, Postfix
from milter.testing.wire import (
    SILENCE,
    AddHeader,
    Answer,
    Command,
    Decoder,
    Family,
    Packet,
    Progress,
    ReplaceBody,
    Response,
    Steps,
    Verdict,
    WireError,
    pack_offer,
)

CONTINUE = Packet(Response.CONTINUE)
ACCEPT = Packet(Response.ACCEPT)
REJECT = Packet(Response.REJECT)
TEMPFAIL = Packet(Response.TEMPFAIL)
DISCARD = Packet(Response.DISCARD)
SKIP = Packet(Response.SKIP)
PROGRESS = Packet(Response.PROGRESS)

ENVELOPE = Envelope.of("ann@client.example", "bob@mta.example", "eve@mta.example")
MESSAGE = Message.parse(b"Subject: hello\nX-Two:  words\n\tfolded\nMessage-ID: <1@x>\n\nHello.\n")


class ScriptedMilter:
    """Answers each command with what the script has for it, one entry after the other, then CONTINUE.

    ``script`` maps letters to entries, each a list of packets, or bytes to be sent as they are and
    followed by the end of the connection.
    """

    UNANSWERED = (Command.MACRO, Command.ABORT, Command.QUIT_NC)

    def __init__(
        self,
        script: Mapping[bytes, list[list[Packet] | bytes]],
        steps: int,
        macros: bytes,
        version: int,
    ) -> None:
        self.seen: list[Packet] = []
        self._script = {letter: list(entries) for letter, entries in script.items()}
        self._silent = {stage for stage, step in SILENCE.items() if steps & step}
        self._script.setdefault(
            Command.NEGOTIATE, [[Packet(Response.NEGOTIATE, pack_offer(version, 0x1FF, steps) + macros)]]
        )
        self.mta_end, self._socket = socket.socketpair()
        self._socket.settimeout(10)
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.mta_end.close()
        self.join()

    def join(self) -> None:
        """Wait until the MTA has closed, so that all it sent has been seen."""
        self._thread.join(10)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        decoder = Decoder()
        with self._socket:
            while data := self._socket.recv(65536):
                decoder.feed(data)
                while (packet := decoder.next()) is not None:
                    self.seen.append(packet)
                    if not self._answer(packet):
                        return

    def _answer(self, packet: Packet) -> bool:
        if packet.letter == Command.QUIT:
            return False
        entries = self._script.get(packet.letter, [])
        usual = [] if packet.letter in self._silent or packet.letter in self.UNANSWERED else [CONTINUE]
        entry = entries.pop(0) if entries else usual
        if isinstance(entry, bytes):
            self._socket.sendall(entry)
            return False
        if entry:
            self._socket.sendall(b"".join(answer.encode() for answer in entry))
        return True

    @property
    def letters(self) -> str:
        """The commands that came, without macros."""
        return "".join(p.letter.decode() for p in self.seen if p.letter != Command.MACRO)

    def macros(self, stage: bytes) -> list[dict[str, str]]:
        """The macros of each packet for a stage."""
        texts = [p.data[1:].decode().split("\0") for p in self.seen if p.letter == b"D" and p.data[:1] == stage]
        return [dict(zip(strings[::2], strings[1::2], strict=False)) for strings in texts]

    def data(self, letter: bytes) -> list[bytes]:
        """The data of each packet with this letter."""
        return [packet.data for packet in self.seen if packet.letter == letter]


Play = Callable[..., tuple[Client, ScriptedMilter]]


@pytest.fixture
def play() -> Iterator[Play]:
    """Start a milter with a script, and a client that talks to it."""
    milters: list[ScriptedMilter] = []

    def start(
        script: Mapping[bytes, list[list[Packet] | bytes]] | None = None,
        steps: int = 0,
        macros: bytes = b"",
        version: int = 6,
        timeout: float = 10.0,
    ) -> tuple[Client, ScriptedMilter]:
        milter = ScriptedMilter(script or {}, steps, macros, version)
        milters.append(milter.__enter__())
        return Client(milter.mta_end, timeout), milter

    yield start
    for milter in milters:
        milter.__exit__(None, None, None)


def sent(client: Client, milter: ScriptedMilter) -> ScriptedMilter:
    """The milter, once everything has arrived."""
    client.close()
    milter.join()
    return milter


def answers(transcript: Transcript, stage: Command) -> list[Verdict | None]:
    return [entry.answer.verdict if entry.answer else None for entry in transcript.of(stage)]


# ---- single stages


def test_negotiating_offers_everything_and_tells_what_the_milter_wants(play: Play) -> None:
    client, milter = play(steps=Steps.NO_HELO, macros=b"\0\0\0\0j\0")
    negotiated = client.negotiate()
    assert negotiated.steps == Steps.NO_HELO
    assert negotiated.macros == {0: "j"}
    assert sent(client, milter).data(b"O") == [pack_offer(6, 0x1FF, 0x1FFFFF)]


@pytest.mark.parametrize(
    ("offer", "complaint"),
    [((5, 0x1FF, 0x1FFFFF), "version 6"), ((6, 0x3F, 0x1FFFFF), "actions"), ((6, 0x1FF, 0x7F), "steps")],
)
def test_a_milter_that_wants_more_than_was_offered_is_refused(
    play: Play, offer: tuple[int, int, int], complaint: str
) -> None:
    client, _ = play(steps=Steps.SKIP)
    with pytest.raises(WireError, match=f"the milter wants {complaint}"):
        client.negotiate(*offer)


@pytest.mark.parametrize(
    ("address", "data"),
    [
        ("192.0.2.1", b"4\0\x00192.0.2.1\0"),
        ("2001:db8::5", b"6\0\x002001:db8::5\0"),
        ("/run/smtp.sock", b"L\0\0/run/smtp.sock\0"),
        (None, b"U"),
        (ClientAddress(Family.INET, "192.0.2.1", 49153), b"4\xc0\x01192.0.2.1\0"),
    ],
)
def test_each_kind_of_client_address_is_sent(play: Play, address: ClientAddress | str | None, data: bytes) -> None:
    client, milter = play()
    client.connect_info("client.example", address)
    assert sent(client, milter).data(b"C") == [b"client.example\0" + data]


def test_what_is_no_address_is_refused() -> None:
    with pytest.raises(ValueError, match="client"):
        ClientAddress.of("client.example")
    with pytest.raises(WireError, match="port 65536"):
        ClientAddress(Family.INET, "192.0.2.1", 65536).encode()


def test_each_stage_sends_its_packet_and_returns_the_answer(play: Play) -> None:
    client, milter = play({b"U": [[REJECT]], b"B": [[ACCEPT]]})
    assert client.helo("client.example") == Answer(Verdict.CONTINUE)
    client.mail("<ann@client.example>", "SIZE=1", "BODY=8BITMIME")
    client.rcpt("<bob@mta.example>")
    client.data()
    client.header("Subj\udce9ct", "ä")
    client.eoh()
    assert client.body(b"\0\xff") == Answer(Verdict.ACCEPT)
    client.end_of_message()
    client.abort()
    assert client.unknown("FOO bar") == Answer(Verdict.REJECT)
    client.quit_nc()
    client.quit()
    client.wait_for_close()
    assert [packet.letter + packet.data for packet in sent(client, milter).seen] == [
        b"Hclient.example\0",
        b"M<ann@client.example>\0SIZE=1\0BODY=8BITMIME\0",
        b"R<bob@mta.example>\0",
        b"T",
        b"LSubj\xe9ct\0\xc3\xa4\0",
        b"N",
        b"B\0\xff",
        b"E",
        b"A",
        b"UFOO bar\0",
        b"K",
        b"Q",
    ]


def test_macros_are_sent_with_braces_around_long_names(play: Play) -> None:
    client, milter = play()
    client.macros(Command.MAIL, {"i": "1", "auth_authen": "ann", "{mail_host}": ""})
    client.macros(Command.HELO, {})
    assert sent(client, milter).data(b"D") == [b"Mi\x001\0{auth_authen}\0ann\0{mail_host}\0\0", b"H"]


def test_a_declined_stage_is_not_sent(play: Play) -> None:
    declined = Steps(0x37F)
    client, milter = play(steps=declined)
    client.negotiate()
    stages = [
        client.connect_info(),
        client.helo(),
        client.mail("<>"),
        client.rcpt("<>"),
        client.data(),
        client.header("A", "1"),
        client.eoh(),
        client.body(b"x"),
        client.unknown("FOO"),
    ]
    client.end_of_message()
    assert stages == [None] * 9
    assert sent(client, milter).letters == "OE"


def test_a_silenced_stage_is_sent_and_not_waited_for(play: Play) -> None:
    silenced = Steps(0xFF080)
    client, milter = play(steps=silenced)
    client.negotiate()
    stages = [
        client.connect_info(),
        client.helo(),
        client.mail("<>"),
        client.rcpt("<>"),
        client.data(),
        client.header("A", "1"),
        client.eoh(),
        client.body(b"x"),
        client.unknown("FOO"),
    ]
    client.end_of_message()
    assert stages == [None] * 9
    assert sent(client, milter).letters == "OCHMRTLNBUE"


def test_no_body_is_sent_after_skip_until_the_next_message(play: Play) -> None:
    client, milter = play({b"B": [[SKIP], [SKIP], [SKIP]]})
    for end_the_message in (client.end_of_message, client.abort, lambda: client.mail("<>")):
        assert client.body(b"1") == Answer(Verdict.SKIP)
        assert client.body(b"2") is None
        end_the_message()
    assert sent(client, milter).data(b"B") == [b"1"] * 3


def test_an_empty_piece_of_body_is_refused(play: Play) -> None:
    client, _ = play()
    with pytest.raises(ValueError, match="a byte at least"):
        client.body(b"")


def test_the_end_of_a_message_collects_changes_in_order_and_counts_progress(play: Play) -> None:
    packets = [PROGRESS, Packet(b"h", b"A\x001\0"), PROGRESS, Packet(b"b", b"x"), Packet(b"b"), ACCEPT]
    client, _ = play({b"E": [packets]})
    end = client.end_of_message()
    assert end == EndOfMessage(
        (Progress(), AddHeader("A", "1"), Progress(), ReplaceBody(b"x"), ReplaceBody(b"")),
        Answer(Verdict.ACCEPT),
    )
    assert end.changes == (AddHeader("A", "1"), ReplaceBody(b"x"), ReplaceBody(b""))
    assert end.progress == 2


def test_progress_is_taken_at_any_stage(play: Play) -> None:
    client, _ = play({b"R": [[PROGRESS, PROGRESS, REJECT]]})
    assert client.rcpt("<bob@mta.example>") == Answer(Verdict.REJECT)


def test_unknown_packets_can_be_sent_and_received(play: Play) -> None:
    client, _ = play({b"Z": [[Packet(b"?", b"what")]]})
    client.send(b"Z", b"data")
    assert client.receive() == Packet(b"?", b"what")


# ---- what goes wrong


def test_a_change_before_the_end_of_a_message_is_an_error(play: Play) -> None:
    client, _ = play({b"R": [[Packet(b"h", b"A\x001\0")]]})
    with pytest.raises(WireError, match="ADD_HEADER where an answer was due"):
        client.rcpt("<bob@mta.example>")


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [(b"", "closed the connection after MAIL$"), (b"\0\0\0\5y", r"in the middle of a packet \(5 bytes\)")],
)
def test_a_milter_that_hangs_up_is_an_error_that_says_when(play: Play, answer: bytes, complaint: str) -> None:
    client, _ = play({b"M": [answer]})
    with pytest.raises(PeerClosed, match=complaint):
        client.mail("<>")


def test_a_milter_that_does_not_answer_is_an_error_in_time(play: Play) -> None:
    client, _ = play({b"M": [[]]}, timeout=0.05)
    with pytest.raises(PeerTimeout, match="did not answer MAIL in time"):
        client.mail("<>")


def test_a_milter_that_does_not_read_is_an_error_in_time() -> None:
    here, there = socket.socketpair()
    with there, Client(here, 0.05) as client, pytest.raises(PeerTimeout, match="did not read BODY"):
        client.send(Command.BODY, bytes(64 * 1024 * 1024))


def test_sending_to_a_milter_that_is_gone_is_an_error() -> None:
    here, there = socket.socketpair()
    there.close()
    with Client(here) as client, pytest.raises(PeerClosed, match="HELO could not be sent"):
        client.helo()


def test_progress_for_ever_ends_with_the_patience(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "PATIENCE", 0.05)
    client, _ = play({b"E": [[PROGRESS] * 100]})
    with pytest.raises(PeerTimeout, match="did not answer END_OF_MESSAGE"):
        client.end_of_message()


def test_changes_without_end_are_an_error(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "MAX_CHANGES", 100)
    client, _ = play({b"E": [[PROGRESS] * 100]})
    with pytest.raises(WireError, match="more than 100 bytes"):
        client.end_of_message()
    client, _ = play({b"M": [[PROGRESS] * 100]})
    with pytest.raises(WireError, match="answered MAIL with nothing but progress"):
        client.mail("<>")


def test_waiting_for_the_close_takes_nothing_else(play: Play) -> None:
    client, _ = play({b"Z": [[CONTINUE]], b"M": [[]]}, timeout=0.05)
    client.send(b"Z")
    with pytest.raises(WireError, match="the milter sent something after 'Z'"):
        client.wait_for_close()
    client.send(Command.MAIL)
    with pytest.raises(PeerTimeout):
        client.wait_for_close()


# ---- whole messages


def test_a_message_is_sent_as_postfix_does(play: Play) -> None:
    client, milter = play()
    transcript = client.send_message(ENVELOPE, MESSAGE)
    client.finish()
    assert sent(client, milter).letters == "OCHMRRTLLLNBEAAQ"
    assert milter.data(b"L") == [b"Subject\0hello\0", b"X-Two\0 words\n\tfolded\0", b"Message-ID\0<1@x>\0"]
    assert milter.data(b"B") == [b"Hello.\r\n"]
    assert transcript.outcome is Outcome.ACCEPTED
    assert transcript.decision is None
    assert answers(transcript, Command.RCPT) == [Verdict.CONTINUE] * 2
    assert answers(transcript, Command.END_OF_MESSAGE) == [Verdict.CONTINUE]
    with pytest.raises(PeerClosed):
        client.helo()


def test_values_keep_their_space_if_that_was_negotiated(play: Play) -> None:
    client, milter = play(steps=Steps.LEADING_SPACE)
    client.send_message(ENVELOPE, MESSAGE)
    assert sent(client, milter).data(b"L")[:2] == [b"Subject\0 hello\0", b"X-Two\0  words\n\tfolded\0"]


def test_a_body_goes_in_pieces_of_65535_bytes_and_an_empty_one_not_at_all(play: Play) -> None:
    client, milter = play()
    client.send_message(ENVELOPE, Message((), b"x" * 131071))
    client.send_message(ENVELOPE, Message(()))
    assert [len(piece) for piece in sent(client, milter).data(b"B")] == [65535, 65535, 1]


def test_a_second_message_goes_into_the_same_session(play: Play) -> None:
    client, milter = play({b"M": [[CONTINUE], [REJECT]]})
    first = client.send_message(ENVELOPE, MESSAGE)
    second = client.send_message(ENVELOPE, MESSAGE)
    client.finish()
    assert sent(client, milter).letters == "OCHMRRTLLLNBEAMAAQ"
    assert (first.outcome, second.outcome) == (Outcome.ACCEPTED, Outcome.REJECTED)


def test_each_message_has_a_queue_id_of_its_own_from_its_second_recipient_on(play: Play) -> None:
    client, milter = play()
    for _ in range(2):
        client.send_message(ENVELOPE, MESSAGE)
    of_recipients = [macros.get("i") for macros in sent(client, milter).macros(b"R")]
    first, second = (macros["i"] for macros in milter.macros(b"E"))
    assert of_recipients == [None, first, None, second]
    assert first != second


def test_a_client_without_a_name_is_unknown_in_the_macros(play: Play) -> None:
    client, milter = play()
    session = Session("[2001:db8::5]", ClientAddress.of("2001:db8::5"))
    client.send_message(ENVELOPE, MESSAGE, session)
    assert sent(client, milter).macros(b"C")[0]["_"] == "unknown [2001:db8::5]"


def test_macros_go_before_each_stage(play: Play) -> None:
    client, milter = play()
    client.send_message(ENVELOPE, MESSAGE)
    sent(client, milter)
    assert [p.data[:1] + p.letter for p in milter.seen if p.letter == b"D"] == [
        letter + b"D" for letter in (b"C", b"H", b"M", b"R", b"R", b"T", b"L", b"L", b"L", b"N", b"B", b"E")
    ]
    assert set(milter.macros(b"C")[0]) == {"j", "{daemon_name}", "{daemon_addr}", "v", "_"}
    assert milter.macros(b"H") == [{}]
    assert set(milter.macros(b"M")[0]) == {"{mail_addr}", "{mail_host}", "{mail_mailer}"}
    first, second = milter.macros(b"R")
    assert first["{rcpt_addr}"] == "bob@mta.example"
    assert "i" not in first
    assert second["i"] == milter.macros(b"E")[0]["i"]


def test_a_milters_list_of_macros_replaces_the_usual_one_unless_it_is_empty(play: Play) -> None:
    lists = b"\0\0\0\0{client_addr} {unknown}\0\0\0\0\2\0\0\0\0\5{nrcpts} {msg_id} {auth_authen}\0"
    client, milter = play({b"R": [[CONTINUE], [REJECT]]}, macros=lists)
    client.send_message(ENVELOPE, MESSAGE, Session(macros={"{auth_authen}": "ann"}))
    sent(client, milter)
    assert milter.macros(b"C") == [{"{client_addr}": "192.0.2.1"}]
    assert milter.macros(b"M")[0]["{auth_authen}"] == "ann"
    assert milter.macros(b"E") == [{"{nrcpts}": "1", "{msg_id}": "<1@x>", "{auth_authen}": "ann"}]


def test_a_stage_without_macros_of_its_own_has_no_packet_for_them(play: Play) -> None:
    client, milter = play()
    session = Session(unasked={Command.MAIL: "i"}, stage_macros={Command.DATA: {"{late}": "1"}})
    client.send_message(ENVELOPE, MESSAGE, session)
    assert milter.macros(b"C") == []
    assert sent(client, milter).macros(b"T") == [{"{late}": "1"}]


def test_macros_are_sent_for_declined_stages_except_those_of_the_content(play: Play) -> None:
    client, milter = play(steps=0x37F)
    client.send_message(ENVELOPE, MESSAGE)
    sent(client, milter)
    assert b"".join(p.data[:1] for p in milter.seen if p.letter == b"D") == b"CHMRRTE"
    assert milter.letters == "OEA"


def test_version_2_gets_no_data(play: Play) -> None:
    client, milter = play(version=2)
    client.send_message(ENVELOPE, MESSAGE)
    assert sent(client, milter).letters == "OCHMRRLLLNBEA"


def test_refused_recipients_are_left_out_and_the_others_go_on(play: Play) -> None:
    client, milter = play({b"R": [[REJECT], [CONTINUE]]})
    transcript = client.send_message(ENVELOPE, MESSAGE)
    assert transcript.outcome is Outcome.ACCEPTED
    assert transcript.recipients == [Mailbox("eve@mta.example")]
    assert transcript.delivery(Postfix()).envelope.recipients == (Mailbox("eve@mta.example"),)
    assert sent(client, milter).letters == "OCHMRRTLLLNBEA"


@pytest.mark.parametrize(
    ("refusals", "outcome"),
    [((REJECT, REJECT), Outcome.REJECTED), ((REJECT, TEMPFAIL), Outcome.TEMPFAILED)],
)
def test_a_message_without_recipients_left_ends(play: Play, refusals: tuple[Packet, Packet], outcome: Outcome) -> None:
    client, milter = play({b"R": [[packet] for packet in refusals]})
    transcript = client.send_message(ENVELOPE, MESSAGE)
    assert transcript.outcome is outcome
    assert transcript.decision is None
    assert sent(client, milter).letters == "OCHMRRA"


@pytest.mark.parametrize(
    ("stage", "letters"),
    [
        (Command.MAIL, "OCHMA"),
        (Command.DATA, "OCHMRRTA"),
        (Command.HEADER, "OCHMRRTLA"),
        (Command.EOH, "OCHMRRTLLLNA"),
        (Command.BODY, "OCHMRRTLLLNBA"),
        (Command.END_OF_MESSAGE, "OCHMRRTLLLNBEA"),
    ],
)
@pytest.mark.parametrize(
    ("packet", "outcome"),
    [
        (REJECT, Outcome.REJECTED),
        (TEMPFAIL, Outcome.TEMPFAILED),
        (ACCEPT, Outcome.ACCEPTED),
        (DISCARD, Outcome.DISCARDED),
        (Packet(b"y", b"550 5.7.1 no\0"), Outcome.REJECTED),
        (Packet(b"y", b"451 4.7.1 later\0"), Outcome.TEMPFAILED),
    ],
)
def test_a_decision_ends_the_message(
    play: Play, stage: Command, letters: str, packet: Packet, outcome: Outcome
) -> None:
    client, milter = play({stage: [[packet]]})
    transcript = client.send_message(ENVELOPE, MESSAGE)
    assert transcript.outcome is outcome
    assert transcript.decision is not None
    assert transcript.decision.stage is stage
    assert sent(client, milter).letters == letters


@pytest.mark.parametrize(("packet", "outcome"), [(ACCEPT, Outcome.ACCEPTED), (DISCARD, Outcome.DISCARDED)])
def test_accept_and_discard_of_a_recipient_decide_on_the_message(play: Play, packet: Packet, outcome: Outcome) -> None:
    client, milter = play({b"R": [[packet]]})
    transcript = client.send_message(ENVELOPE, MESSAGE)
    assert transcript.outcome is outcome
    assert transcript.recipients == list(ENVELOPE.recipients)
    assert sent(client, milter).letters == "OCHMRA"


@pytest.mark.parametrize(
    ("stage", "letters"),
    [
        (Command.RCPT, "OCHMRTLLLNBBEA"),
        (Command.HEADER, "OCHMRRTLNBBEA"),
        (Command.BODY, "OCHMRRTLLLNBEA"),
        (Command.END_OF_MESSAGE, "OCHMRRTLLLNBBEA"),
    ],
)
def test_skip_leaves_out_what_is_left_of_a_stage(play: Play, stage: Command, letters: str) -> None:
    client, milter = play({stage: [[SKIP]]})
    transcript = client.send_message(ENVELOPE, Message(MESSAGE.headers, b"x" * 65536))
    assert transcript.outcome is Outcome.ACCEPTED
    assert sent(client, milter).letters == letters


@pytest.mark.parametrize(("stage", "letters"), [(Command.CONNECT, "OC"), (Command.HELO, "OCH")])
@pytest.mark.parametrize(
    ("packet", "outcome"),
    [(ACCEPT, Outcome.ACCEPTED), (REJECT, Outcome.REJECTED), (TEMPFAIL, Outcome.TEMPFAILED)],
)
def test_a_decision_on_the_session_counts_for_all_messages_and_closes_without_a_word(
    play: Play, stage: Command, letters: str, packet: Packet, outcome: Outcome
) -> None:
    client, milter = play({stage: [[packet]]})
    transcripts = [client.send_message(ENVELOPE, MESSAGE) for _ in range(2)]
    client.finish()
    assert [transcript.outcome for transcript in transcripts] == [outcome] * 2
    assert transcripts[1].decision == transcripts[0].decision
    assert sent(client, milter).letters == letters


def test_discard_at_connect_and_helo_is_ignored(play: Play) -> None:
    client, milter = play({b"C": [[DISCARD]], b"H": [[DISCARD]]})
    transcript = client.send_message(ENVELOPE, MESSAGE)
    assert transcript.outcome is Outcome.ACCEPTED
    assert sent(client, milter).letters == "OCHMRRTLLLNBEA"


@pytest.mark.parametrize(("stage", "letters"), [(Command.RCPT, "OCHMRAQ"), (Command.EOH, "OCHMRRTLLLNAQ")])
def test_a_reply_of_421_ends_the_session(play: Play, stage: Command, letters: str) -> None:
    client, milter = play({stage: [[Packet(b"y", b"421 4.7.0 bye\0")]]})
    transcripts = [client.send_message(ENVELOPE, MESSAGE) for _ in range(2)]
    assert [transcript.outcome for transcript in transcripts] == [Outcome.TEMPFAILED] * 2
    assert sent(client, milter).letters == letters


def test_what_postfix_hides_or_cuts_is_not_shown(play: Play) -> None:
    message = Message.parse(b"Bcc: x\nReturn-Path: <x>\nA: one\0two\n three\nB: " + b"x" * 70000 + b"\n\n")
    client, milter = play()
    transcript = client.send_message(ENVELOPE, message)
    shown = sent(client, milter).data(b"L")
    assert shown[0] == b"A\0one\0"
    assert len(shown[1]) == 60000
    assert [header.name for header in transcript.delivery(Postfix()).without_trace().headers] == ["A", "B"]


def test_an_accepted_message_is_delivered_with_its_changes(play: Play) -> None:
    client, _ = play({b"E": [[Packet(b"h", b"X-New\0v\0"), CONTINUE]]})
    transcript = client.send_message(ENVELOPE, MESSAGE)
    delivered = transcript.delivery(Postfix()).without_trace()
    assert delivered.headers[:-1] == MESSAGE.headers
    assert delivered.headers[-1].raw == "X-New: v"


def test_nothing_is_delivered_of_what_was_not_accepted(play: Play) -> None:
    client, _ = play({b"E": [[Packet(b"h", b"X-New\0v\0"), DISCARD]]})
    transcript = client.send_message(ENVELOPE, MESSAGE)
    with pytest.raises(ValueError, match="not accepted"):
        transcript.delivery(Postfix())


def test_an_envelope_without_recipients_is_refused(play: Play) -> None:
    client, _ = play()
    with pytest.raises(ValueError, match="needs a recipient"):
        client.send_message(Envelope.of("ann@client.example"), MESSAGE)


def test_a_failure_leaves_the_answers_up_to_it(play: Play) -> None:
    client, _ = play({b"R": [[CONTINUE], b""]})
    with pytest.raises(PeerClosed, match="after RCPT"):
        client.send_message(ENVELOPE, MESSAGE)
    assert client.transcript is not None
    assert client.transcript.outcome is None
    assert [entry.stage for entry in client.transcript.stages][-2:] == [Command.MAIL, Command.RCPT]
    client.finish()


def test_finishing_never_fails_even_if_the_milter_went_first(play: Play) -> None:
    client, milter = play({b"E": [ACCEPT.encode()]})
    transcript = client.send_message(ENVELOPE, MESSAGE)
    milter.join()
    client.finish()
    assert transcript.outcome is Outcome.ACCEPTED


def test_a_connection_on_which_nothing_was_said_can_be_finished(play: Play) -> None:
    client, milter = play()
    client.negotiate()
    client.finish()
    assert sent(client, milter).letters == "OQ"
