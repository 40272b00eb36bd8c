# SPDX-License-Identifier: GPL-3.0-or-later
"""The milter protocol on the wire: packets, negotiation, answers and changes, good and bad."""

import pytest

from milter import protocol
from milter.testing.wire import (
    MACRO_STAGES,
    Actions,
    AddHeader,
    AddRecipient,
    Answer,
    Command,
    Decoder,
    InsertHeader,
    Packet,
    Progress,
    Quarantine,
    RemoveRecipient,
    ReplaceBody,
    ReplaceHeader,
    ReplaceSender,
    Response,
    Steps,
    Verdict,
    WireError,
    command_name,
    decode_text,
    encode_text,
    join_strings,
    pack_offer,
    read_answer,
    read_event,
    read_negotiated,
    response_name,
    split_strings,
)


def test_a_packet_is_its_length_its_letter_and_its_data() -> None:
    assert Packet(Command.BODY, b"abc").encode() == b"\0\0\0\4Babc"


@pytest.mark.parametrize("letter", [b"", b"AB"])
def test_a_packet_without_a_letter_of_one_byte_is_refused(letter: bytes) -> None:
    with pytest.raises(WireError, match="one byte"):
        Packet(letter).encode()


def test_packets_are_the_same_however_the_stream_is_cut() -> None:
    stream = Packet(b"c").encode() + Packet(b"q", b"why\0").encode() + Packet(b"b", bytes(range(256))).encode()
    for size in (1, 3, 7, len(stream)):
        decoder = Decoder()
        packets = []
        for start in range(0, len(stream), size):
            decoder.feed(stream[start : start + size])
            while (packet := decoder.next()) is not None:
                packets.append(packet)
        assert packets == [Packet(b"c"), Packet(b"q", b"why\0"), Packet(b"b", bytes(range(256)))]
        assert decoder.pending == 0


@pytest.mark.parametrize("length", [b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\0\0\0\x65"])
def test_a_length_that_cannot_be_is_refused_before_the_packet_is_read(length: bytes) -> None:
    decoder = Decoder(limit=100)
    decoder.feed(length)
    with pytest.raises(WireError, match="1 to 100"):
        decoder.next()


def test_a_packet_as_long_as_the_limit_is_taken() -> None:
    decoder = Decoder(limit=100)
    decoder.feed(Packet(b"b", b"x" * 99).encode())
    assert decoder.next() == Packet(b"b", b"x" * 99)


def test_letters_are_found_by_plain_bytes() -> None:
    assert Command(b"E") is Command.END_OF_MESSAGE
    by_letter: dict[bytes, str] = {Response.REPLY: "reply"}
    assert by_letter[b"y"] == "reply"
    assert (command_name(b"T"), response_name(b"t"), command_name(b"?")) == ("DATA", "TEMPFAIL", "'?'")


def test_this_side_and_the_library_mean_the_same_bits() -> None:
    library_actions = {action.name: action.value for action in protocol.Actions}
    library_options = {option.name: option.value for option in protocol.ProtocolOptions}
    assert {action.name: action.value for action in Actions} == library_actions
    assert {step.name: step.value for step in Steps} == library_options


def test_this_side_and_the_library_number_the_lists_of_macros_alike() -> None:
    names = {"END_OF_MESSAGE": "EOM"}
    ours = {names.get(stage.name, stage.name): number for number, stage in MACRO_STAGES.items()}
    assert ours == {macro_list.name: macro_list.value for macro_list in protocol.MacroList}


def test_no_byte_of_a_text_is_lost() -> None:
    every_byte = bytes(range(256)) + "ä€".encode()
    assert encode_text(decode_text(every_byte)) == every_byte


def test_a_surrogate_that_stands_for_no_byte_is_refused() -> None:
    with pytest.raises(WireError, match="UTF-8"):
        encode_text("\ud800")


def test_strings_are_joined_and_split_by_nul() -> None:
    assert join_strings("<ann@client.example>", "SIZE=1", "") == b"<ann@client.example>\0SIZE=1\0\0"
    assert split_strings(b"a\0\0b\0") == ["a", "", "b"]
    assert split_strings(b"") == []


def test_a_string_with_a_nul_is_refused_instead_of_cut() -> None:
    with pytest.raises(WireError, match="NUL"):
        join_strings("a\0b")


def test_a_string_without_its_nul_is_refused() -> None:
    with pytest.raises(WireError, match="final NUL"):
        split_strings(b"a\0b")


# ---- negotiation


def test_an_offer_is_three_numbers() -> None:
    assert pack_offer(6, 0x1FF, 0x1FFFFF) == b"\0\0\0\6\0\0\1\xff\0\x1f\xff\xff"
    with pytest.raises(WireError, match="version -1"):
        pack_offer(-1, 0, 0)


def test_a_negotiation_tells_version_actions_steps_and_macros() -> None:
    data = pack_offer(6, 0x11, 0x80) + b"\0\0\0\2" + b"i {auth_authen}\0" + b"\0\0\0\5" + b"\0"
    negotiated = read_negotiated(Packet(Response.NEGOTIATE, data))
    assert negotiated.version == 6
    assert negotiated.actions == Actions.ADD_HEADER | Actions.REPLACE_HEADER
    assert negotiated.steps == Steps.NOREPLY_HEADER
    assert negotiated.macros == {2: "i {auth_authen}", 5: ""}


@pytest.mark.parametrize(
    ("packet", "complaint"),
    [
        (Packet(b"c"), "CONTINUE to the negotiation"),
        (Packet(b"O", b"\0" * 8), "12 bytes"),
        (Packet(b"O", b"\0" * 14), "four bytes"),
        (Packet(b"O", b"\0" * 16 + b"i"), "no final NUL"),
    ],
)
def test_a_malformed_negotiation_is_refused(packet: Packet, complaint: str) -> None:
    with pytest.raises(WireError, match=complaint):
        read_negotiated(packet)


@pytest.mark.parametrize(
    ("version", "declined"),
    [
        (2, {Command.DATA, Command.UNKNOWN}),
        (3, {Command.DATA}),
        (4, set()),
        (6, set()),
    ],
)
def test_older_versions_lack_data_and_unknown(version: int, declined: set[Command]) -> None:
    negotiated = read_negotiated(Packet(b"O", pack_offer(version, 0, 0)))
    assert {stage for stage in Command if negotiated.declines(stage)} == declined


@pytest.mark.parametrize(
    ("bit", "stage"),
    [
        (0x1, Command.CONNECT),
        (0x2, Command.HELO),
        (0x4, Command.MAIL),
        (0x8, Command.RCPT),
        (0x10, Command.BODY),
        (0x20, Command.HEADER),
        (0x40, Command.EOH),
        (0x100, Command.UNKNOWN),
        (0x200, Command.DATA),
    ],
)
def test_each_no_step_declines_its_stage(bit: int, stage: Command) -> None:
    negotiated = read_negotiated(Packet(b"O", pack_offer(6, 0, bit)))
    assert [each for each in Command if negotiated.declines(each)] == [stage]
    assert not any(negotiated.silences(each) for each in Command)


@pytest.mark.parametrize(
    ("bit", "stage"),
    [
        (0x1000, Command.CONNECT),
        (0x2000, Command.HELO),
        (0x4000, Command.MAIL),
        (0x8000, Command.RCPT),
        (0x10000, Command.DATA),
        (0x20000, Command.UNKNOWN),
        (0x40000, Command.EOH),
        (0x80000, Command.BODY),
        (0x80, Command.HEADER),
    ],
)
def test_each_noreply_step_silences_its_stage(bit: int, stage: Command) -> None:
    negotiated = read_negotiated(Packet(b"O", pack_offer(6, 0, bit)))
    assert [each for each in Command if negotiated.silences(each)] == [stage]
    assert not any(negotiated.declines(each) for each in Command)


# ---- answers


@pytest.mark.parametrize(
    ("letter", "verdict"),
    [
        (b"c", Verdict.CONTINUE),
        (b"a", Verdict.ACCEPT),
        (b"r", Verdict.REJECT),
        (b"t", Verdict.TEMPFAIL),
        (b"d", Verdict.DISCARD),
        (b"s", Verdict.SKIP),
    ],
)
def test_each_plain_answer_is_its_verdict(letter: bytes, verdict: Verdict) -> None:
    assert read_answer(Packet(letter)) == Answer(verdict)


def test_a_plain_answer_with_data_is_refused() -> None:
    with pytest.raises(WireError, match="plain reject"):
        read_answer(Packet(b"r", b"no"))


@pytest.mark.parametrize("letter", [b"4", b"f", b"Z", b"h", b"p", b"O"])
def test_a_packet_that_is_no_answer_is_not_taken_for_one(letter: bytes) -> None:
    with pytest.raises(WireError, match="where an answer was due"):
        read_answer(Packet(letter))


def test_a_reply_is_read_into_code_enhanced_code_and_text() -> None:
    answer = read_answer(Packet(b"y", b"550 5.7.1 not 100%% sure\0"))
    assert answer == Answer(Verdict.REPLY, 550, "5.7.1", ("not 100%% sure",), raw="550 5.7.1 not 100%% sure")
    assert answer.rejects
    assert not answer.tempfails


def test_a_reply_of_several_lines_is_read_line_by_line() -> None:
    answer = read_answer(Packet(b"y", b"451-4.7.1 one\r\n451-4.7.1 \r\n451 4.7.1 three\0"))
    assert (answer.code, answer.enhanced, answer.lines) == (451, "4.7.1", ("one", "", "three"))
    assert answer.tempfails
    assert not answer.rejects
    assert str(answer) == "451-4.7.1 one / 451-4.7.1  / 451 4.7.1 three"
    assert str(Answer(Verdict.TEMPFAIL)) == "tempfail"


@pytest.mark.parametrize(
    ("reply", "lines"),
    [(b"550 plain\0", ("plain",)), (b"550 \0", ("",)), (b"550 5.7 too short\0", ("5.7 too short",))],
)
def test_a_reply_needs_no_enhanced_code(reply: bytes, lines: tuple[str, ...]) -> None:
    answer = read_answer(Packet(b"y", reply))
    assert (answer.enhanced, answer.lines) == ("", lines)


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"550 5.7.1 no", "final NUL"),
        (b"", "one string"),
        (b"550 a\0b\0", "one string"),
        (b"550\0", "4xx or 5xx"),
        (b"250 2.0.0 fine\0", "4xx or 5xx"),
        (b"abc\0", "4xx or 5xx"),
        (b"550-5.0.0\0", "but the last"),
        (b"550 one\r\n550 two\0", "but the last"),
    ],
)
def test_a_malformed_reply_is_refused(data: bytes, complaint: str) -> None:
    with pytest.raises(WireError, match=complaint):
        read_answer(Packet(b"y", data))


# ---- changes


@pytest.mark.parametrize(
    ("packet", "event"),
    [
        (Packet(b"h", b"X-New\0one\n two\0"), AddHeader("X-New", "one\n two")),
        (Packet(b"i", b"\0\0\0\2X-New\0v\0"), InsertHeader(2, "X-New", "v")),
        (Packet(b"m", b"\0\0\0\1Subject\0\0"), ReplaceHeader(1, "Subject", "")),
        (Packet(b"m", b"\xff\xff\xff\xffSubject\0v\0"), ReplaceHeader(0xFFFFFFFF, "Subject", "v")),
        (Packet(b"e", b"<new@client.example>\0"), ReplaceSender("<new@client.example>", None)),
        (Packet(b"e", b"<>\0RET=HDRS\0"), ReplaceSender("<>", "RET=HDRS")),
        (Packet(b"+", b"<bob@mta.example>\0"), AddRecipient("<bob@mta.example>", None)),
        (
            Packet(b"2", b"<bob@mta.example>\0NOTIFY=NEVER\0"),
            AddRecipient("<bob@mta.example>", "NOTIFY=NEVER"),
        ),
        (Packet(b"2", b"<bob@mta.example>\0\0"), AddRecipient("<bob@mta.example>", "")),
        (Packet(b"-", b"bob@mta.example\0"), RemoveRecipient("bob@mta.example")),
        (Packet(b"b", b"\0raw\xff"), ReplaceBody(b"\0raw\xff")),
        (Packet(b"b", b""), ReplaceBody(b"")),
        (Packet(b"q", b"why\0"), Quarantine("why")),
        (Packet(b"p"), Progress()),
    ],
)
def test_each_change_is_read(packet: Packet, event: object) -> None:
    assert read_event(packet) == event


@pytest.mark.parametrize(
    "packet",
    [
        Packet(b"h", b"X-New\0"),
        Packet(b"h", b"X-New\0a\0b\0"),
        Packet(b"h", b"X-New\0v"),
        Packet(b"i", b"\0\0"),
        Packet(b"i", b"\0\0\0\1X-New\0a\0b\0"),
        Packet(b"m", b"\0\0\0\1Subject\0"),
        Packet(b"m", b"\0\0\0\1Subject\0a\0b\0"),
        Packet(b"e", b""),
        Packet(b"e", b"a\0b\0c\0"),
        Packet(b"+", b"a\0b\0"),
        Packet(b"2", b"a\0b\0c\0"),
        Packet(b"-", b"a\0b\0"),
        Packet(b"q", b"why"),
        Packet(b"q", b"a\0b\0"),
        Packet(b"p", b"x"),
    ],
)
def test_a_malformed_change_is_refused_by_name(packet: Packet) -> None:
    with pytest.raises(WireError, match=f"malformed {response_name(packet.letter)}"):
        read_event(packet)


def test_an_answer_is_no_change() -> None:
    assert read_event(Packet(b"c")) is None
    assert read_event(Packet(b"Z")) is None


def test_a_packet_has_one_letter() -> None:
    with pytest.raises(WireError, match="a letter of one byte, not b'AB'"):
        Packet(b"AB").encode()
