# SPDX-License-Identifier: GPL-3.0-or-later
"""Random messages, made to be hard to read: does a method raise what it should not, or take more than linear work?

    python -m benchmarks.fuzz_messages [inputs] [seed]

Each input is a message with fields, parts and content put together from what confuses parsers, and then damaged. It is
parsed, read in all ways, written again, and edited at random, beside a plain list with which its header fields must
agree. Of some inputs what they are made of is repeated, and the calls of functions counted, in Python and in C: a
message that has more of the same may not take more for each of its bytes. The first failure ends the run, and tells the
number that makes it again.
"""

import cProfile
import random
import sys

from benchmarks.linear import message, read_all
from milter import Message
from milter.edits import Numbering, changes

NAMES = [
    *(b"From", b"To", b"Subject", b"Date", b"Message-ID", b"References", b"MIME-Version", b"Received", b"X-A", b"x-a"),
    *(b"Content-Type", b"Content-Type", b"Content-Disposition", b"Content-Transfer-Encoding", b"Sender", b"Content-ID"),
]
VALUES = [
    *(b"multipart/mixed", b"multipart/alternative", b"multipart/related", b"multipart/digest", b"message/rfc822"),
    *(
        b"message/delivery-status",
        b"message/partial",
        b"text/plain",
        b"text/html",
        b"image/png",
        b"attachment",
        b"inline",
    ),
    *(b"; boundary=a", b'; boundary="b"', b"; boundary=", b"; charset=utf-8", b"; charset=none", b"; charset=idna"),
    *(
        b"; charset=utf-16",
        b"; charset=punycode",
        b"; charset=undefined",
        b"; charset*=x'y'z",
        b"; charset=\0",
        b"; start=a",
    ),
    *(
        b"; name=x",
        b"; filename*0*=utf-8''%e4",
        b"; filename*1=a",
        b"; filename*=x'y'%",
        b"; a",
        b"; =",
        b"; name*=''",
        b"; filename*=idna''%e4",
        b"; name*=undefined''a",
        b"; filename*0=b",
    ),
    *(b"base64", b"quoted-printable", b"uuencode", b"7bit", b"8bit", b"Mon, 1 Jan 2024 12:00:00 +0000", b"1.0", b"a@b"),
    *(
        b"=?utf-8?q?=C3=A4?=",
        b"=?utf-8?b?4A==?=",
        b"=?x?q?a?=",
        b"=?utf-8?q?",
        b"?=",
        b"=?utf-8?q?=0A?=",
        b"=?punycode?q?a-?=",
    ),
    *(
        b"(",
        b")",
        b"<",
        b">",
        b"@",
        b",",
        b";",
        b":",
        b'"',
        b"\\",
        b"[",
        b"]",
        b".",
        b" ",
        b"\t",
        b"=",
        b"'",
        b"%",
        b"*",
    ),
    *(
        b"\n ",
        b"\r\n\t",
        b"\x0b",
        b"\x85",
        b"\xff",
        b"\xc3\xa4",
        b"a",
        b"1",
        b"-",
        b"/",
        b"group:",
        b"\r",
        b"\x1c",
        b"\xe2\x80\xa8",
    ),
]
LINES = [
    *(
        b"--a",
        b"--a--",
        b"--b",
        b"--b--",
        b"--",
        b"----",
        b"",
        b"",
        b"",
        b" ",
        b"text",
        b"\xff\xfe",
        b"From x",
        b"A: b",
        b"A",
        b":",
    ),
    *(b"=C3=A4=", b"w6Q=", b"=", b"begin 644 a", b"#0V%T", b"end", b"\r", b"begin x", b"w6Q", b"\t", b"\x0c"),
]
ENDS = [b"\r\n", b"\r\n", b"\r\n", b"\n", b"\r", b""]
EDIT_NAMES = ["X-A", "x-a", "Subject", "From", "X-New"]


class Maker:
    """One input, the same for the same number."""

    def __init__(self, number: int) -> None:
        self.random = random.Random(number)
        self.times = 1

    def value(self) -> bytes:
        value = b"".join(self.random.choices(VALUES, k=self.random.randrange(6))) * self.times
        return value.replace(b"\0", b"").strip(b"\r\n")

    def line(self) -> bytes:
        kind = self.random.randrange(4)
        line = self.random.choice(NAMES) + b": " + self.value() if kind == 0 else self.random.choice(LINES)
        return line + self.random.choice(ENDS)

    def damaged(self, data: bytes) -> bytes:
        if data and self.random.randrange(3) == 0:
            place = self.random.randrange(len(data))
            return (
                data[:place]
                + self.random.randbytes(self.random.randrange(3))
                + data[place + self.random.randrange(4) :]
            )
        return data

    def message(self, times: int = 1) -> Message:
        self.times = times
        fields = [(self.random.choice(NAMES), self.value()) for _ in range(self.random.randrange(6))]
        body = b"".join(self.line() for _ in range(self.random.randrange(15))) * times
        return message(fields, self.damaged(body))


def edit(received: Message, rnd: random.Random) -> None:
    """Random edits; what is there after each of them is known from a plain list."""
    headers = received.headers
    known = [[name, value] for name, value in headers.items()]
    for number in range(rnd.randrange(6)):
        name, value, index = rnd.choice(EDIT_NAMES), rnd.choice(["", str(number), "a\n b"]), rnd.randrange(1, 9)
        same = [place for place, (other, _) in enumerate(known) if other.lower() == name.lower()]
        try:
            match rnd.randrange(5):
                case 0:
                    headers.insert(index, name, value)
                    known.insert(index, [name, value])
                case 1:
                    headers[name] = value
                    if same:
                        known[same[0]][1] = value
                        known = [field for place, field in enumerate(known) if place not in same[1:]]
                    else:
                        known.append([name, value])
                case 2:
                    headers.replace(name, value, index)
                    known[same[index - 1]][1] = value
                case 3:
                    headers.replace(name, None, index)
                    del known[same[index - 1]]
                case 4:
                    del headers[name]
                    known = [field for place, field in enumerate(known) if place not in same]
        except KeyError:
            assert len(same) < index or not same
        assert headers.items() == [(name, value) for name, value in known]
        assert len(headers) == len(known)
        assert headers.get_all(name) == [value for other, value in known if other.lower() == name.lower()]
    for numbering in Numbering:
        changes(received, lambda numbering=numbering: numbering)  # type: ignore[misc]


def check(number: int) -> None:
    received = Maker(number).message()
    read_all(received)
    edit(received, random.Random(number))
    if number % 100 == 0:
        few, many = (calls_per_byte(Maker(number).message(times)) for times in (16, 128))
        # A comma in an address field costs about 50, where a short message costs a few.
        assert many < max(60, 2 * few), (
            f"{few:.1f} calls per byte, and {many:.1f} of a message that has more of the same"
        )


def calls_per_byte(received: Message) -> float:
    profile = cProfile.Profile()
    profile.enable()
    read_all(received)
    profile.disable()
    return sum(entry.callcount for entry in profile.getstats()) / (received.size + 200)


def main(inputs: int = 10_000, seed: int = 0) -> None:
    for number in range(seed, seed + inputs):
        try:
            check(number)
        except BaseException:
            print(f"number {number}: python -m benchmarks.fuzz_messages 1 {number}", flush=True)
            raise
        if (number + 1 - seed) % 10_000 == 0:
            print(number + 1 - seed, "inputs", flush=True)
    print(inputs, "inputs, no failure")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
