# SPDX-License-Identifier: GPL-3.0-or-later
"""Conversations that Hypothesis makes: any order of commands, any strings, cut and glued, given up anywhere.

Two connections go on side by side. What the filter must answer, the model tells. A failure is shrunk to the shortest
conversation that shows it; ``--hypothesis-seed`` (or ``MILTER_FUZZ_SEED``) repeats a run.
"""

import os

from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from milter.testing.wire import Steps
from tests.fuzz.link import Line, compare
from tests.fuzz.model import LIMIT, Model
from tests.fuzz.mutation import STAGES, VERDICTS, encoded
from tests.fuzz.target import Target

EXAMPLES = int(os.environ.get("MILTER_FUZZ_EXAMPLES", "40"))
"""Conversations for each kind of filter."""
SEED = int(os.environ.get("MILTER_FUZZ_SEED", "1"))

# ---- What is said

HOSTILE = st.one_of(
    st.just(b""),
    st.sampled_from(
        [b"<>", b"<ann@client.example>", b"Subject", b"X-Remove", b" folded\n\tvalue", b"a\r\nB: c", b"%s%n"]
    ),
    st.binary(max_size=40).map(lambda text: text.replace(b"\0", b"?")),
    st.sampled_from([250, 4000, LIMIT - 300]).map(lambda size: b"x" * size),
)
ADDRESSES = st.sampled_from(
    [b"4\0\x19192.0.2.1\0", b"6\0\x192001:db8::5\0", b"L\0\0/run/client\0", b"U", b"4\0\0\0", b"Z"]
)


def text_for(letter: bytes) -> st.SearchStrategy[bytes]:
    """What such a packet may hold: every second one orders something at one of its stages."""
    orders = st.builds(
        lambda stage, verdict: f"={stage}.{verdict}=".encode(),
        st.sampled_from(STAGES[letter]),
        st.sampled_from(VERDICTS),
    )
    return st.one_of(HOSTILE, orders, st.builds(lambda before, order: before + order, HOSTILE, orders))


def strings_of(letter: bytes) -> st.SearchStrategy[tuple[bytes, bytes]]:
    texts = st.lists(text_for(letter), min_size=1, max_size=3)
    return texts.map(lambda found: (letter, b"".join(text + b"\0" for text in found)[-LIMIT:]))


CONNECT = st.builds(lambda name, address: (b"C", name + b"\0" + address), text_for(b"C"), ADDRESSES)
HELO, MAIL, RCPT, UNKNOWN = map(strings_of, (b"H", b"M", b"R", b"U"))
HEADER = st.builds(lambda name, value: (b"L", (name + b"\0" + value)[: LIMIT - 1] + b"\0"), HOSTILE, text_for(b"L"))
BODY = st.one_of(
    st.binary(min_size=1, max_size=60),
    text_for(b"B").filter(bool),
    st.sampled_from([1, 16384, LIMIT]).map(lambda size: b"line\r\n" * (size // 6) + b"x" * (size % 6)),
).map(lambda data: (b"B", data))
MACROS = st.builds(
    lambda stage, strings: (b"D", bytes([stage]) + strings[1][:1000]), st.sampled_from(b"CHMRTNELZ"), strings_of(b"M")
)
BARE = st.sampled_from([(b"T", b""), (b"N", b""), (b"E", b""), (b"A", b""), (b"K", b"")])
PACKET = st.one_of(CONNECT, HELO, MAIL, RCPT, RCPT, UNKNOWN, HEADER, BODY, MACROS, BARE)
BROKEN = st.one_of(
    st.tuples(
        st.sampled_from(b"ABCDEHKLMNOQRTUz\0\x07\xff").map(lambda letter: bytes([letter])), st.binary(max_size=30)
    ),
    st.one_of(CONNECT, HELO, MAIL, RCPT, UNKNOWN, HEADER).map(lambda packet: (packet[0], packet[1][:-1])),
    BODY.map(lambda packet: (b"E", packet[1])),
    st.just((b"B", b"x" * (LIMIT + 1))),
)
NUMBERS = st.one_of(st.sampled_from([0, 0x3F, 0x7F, 0x1FF, 0x1FFFFF, 0xFFFFFFFF]), st.integers(0, 0xFFFFFFFF))
VERSIONS = st.one_of(st.just(6), st.integers(2, 6), st.sampled_from([0, 1, 7, 0x80000000, 0xFFFFFFFF]))
CUTS = st.lists(st.integers(0, 400), max_size=5)
WELL_KNOWN = (6, 0x1FF, 0x1FFFFF)


def offer(version: int, actions: int, steps: int) -> tuple[bytes, bytes]:
    # Else the library declines unknown commands, which changes libmilter's table for the other connection, too.
    if not steps & Steps.NO_DATA:
        steps &= ~Steps.NO_UNKNOWN
    return b"O", b"".join(number.to_bytes(4, "big") for number in (version, actions, steps))


# ---- The machine


class Conversation:
    """One connection: what was said, what is to be said, and what must come back."""

    def __init__(self, target: Target) -> None:
        self.line = Line(target.where)
        self.model = Model(target.model, target.kind)
        self.unsent = b""
        self.greeted = False
        """Something was said."""

    def say(self, *packets: tuple[bytes, bytes]) -> None:
        self.greeted = True
        self.unsent += encoded(list(packets))
        for letter, data in packets:
            if not self.model.over:
                self._predict(letter, data)

    def _predict(self, letter: bytes, data: bytes) -> None:
        if len(data) > LIMIT or (not data and not b" " <= letter < b"\x80"):
            self.model.packet("", b"")
        else:
            self.model.packet(letter.decode("latin-1"), data)

    def deliver(self, cuts: list[int]) -> None:
        prediction = self.model.prediction
        due = 0 if prediction.loose else 1 << 30 if prediction.closes else len(prediction.answers)
        stream, self.unsent = self.unsent, b""
        self.line.send(stream, cuts, due)

    def finish(self) -> None:
        try:
            self.deliver([])
            if not self.model.over:
                self.model.packet("", b"")
            compare(self.line.finish(), self.model.prediction)
        finally:
            self.line.close()


class Machine(RuleBasedStateMachine):
    """Two connections of a broken MTA."""

    target: Target

    def __init__(self) -> None:
        super().__init__()
        self.talks: list[Conversation | None] = [None, None]

    which = st.integers(0, 1)

    def talk(self, which: int) -> Conversation:
        found = self.talks[which]
        if found is None:
            found = self.talks[which] = Conversation(self.target)
        return found

    @rule(which=which, version=VERSIONS, actions=NUMBERS, steps=NUMBERS)
    def negotiate(self, which: int, version: int, actions: int, steps: int) -> None:
        self.talk(which).say(offer(version, actions, steps))

    @rule(which=which, connect=CONNECT, helo=HELO)
    def greet(self, which: int, connect: tuple[bytes, bytes], helo: tuple[bytes, bytes]) -> None:
        self.talk(which).say(offer(*WELL_KNOWN), connect, helo)

    @rule(which=which, packets=st.lists(PACKET, min_size=1, max_size=4))
    def say(self, which: int, packets: list[tuple[bytes, bytes]]) -> None:
        self.talk(which).say(*packets)

    @rule(
        which=which,
        mail=MAIL,
        rcpts=st.lists(RCPT, min_size=1, max_size=3),
        header=st.lists(HEADER, max_size=3),
        body=st.lists(BODY, max_size=3),
    )
    def send_message(
        self,
        which: int,
        mail: tuple[bytes, bytes],
        rcpts: list[tuple[bytes, bytes]],
        header: list[tuple[bytes, bytes]],
        body: list[tuple[bytes, bytes]],
    ) -> None:
        """To the filter of a greeted connection; its verdicts do not stop this MTA."""
        talk = self.talk(which)
        if not talk.greeted:
            talk.say(offer(*WELL_KNOWN), (b"C", b"client.example\0U"), (b"H", b"client.example\0"))
        talk.say(mail, *rcpts, (b"T", b""), *header, (b"N", b""), *body, (b"E", b""))

    @rule(which=which, packet=BROKEN)
    def break_something(self, which: int, packet: tuple[bytes, bytes]) -> None:
        self.talk(which).say(packet)

    @rule(which=which, cuts=CUTS)
    def deliver(self, which: int, cuts: list[int]) -> None:
        self.talk(which).deliver(cuts)

    @precondition(lambda self: any(self.talks))
    @rule(which=which, cuts=CUTS)
    def finish(self, which: int, cuts: list[int]) -> None:
        self.talk(which).deliver(cuts)
        self.talk(which).finish()
        self.talks[which] = None

    @precondition(lambda self: any(self.talks))
    @rule(which=which, at=st.integers(0, 2000))
    def drop(self, which: int, at: int) -> None:
        talk = self.talk(which)
        talk.line.drop(talk.unsent[:at], [])
        self.talks[which] = None

    def teardown(self) -> None:
        for talk in self.talks:
            if talk is not None:
                talk.finish()
        self.target.check()


def test_any_conversation_is_answered_as_predicted(target: Target) -> None:
    class Machinery(Machine):
        pass

    Machinery.target = target
    configuration = settings(
        max_examples=EXAMPLES,
        stateful_step_count=25,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.generate, Phase.target, Phase.shrink],
    )
    run_state_machine_as_test(seed(SEED)(Machinery), settings=configuration)
