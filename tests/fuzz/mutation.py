# SPDX-License-Identifier: GPL-3.0-or-later
"""Recorded conversations, and random changes of them that know where a packet begins and what a string is.

All of it follows from a seed: the same seed, the same bytes.
"""

from collections.abc import Callable
from random import Random

from tests.fuzz.model import LIMIT

Packets = list[tuple[bytes, bytes]]

_ALL = b"\0\0\0\6" + b"\0\0\1\xff" + b"\0\x1f\xff\xff"
_VERSION_2 = b"\0\0\0\2" + b"\0\0\0\x3f" + b"\0\0\0\x7f"

_GREETING: Packets = [
    (b"D", b"Cj\0mta.example\0{daemon_name}\0smtpd\0v\0Postfix 3.7.11\0"),
    (b"C", b"client.example\x004\x00\x19192.0.2.1\0"),
    (b"D", b"H{tls_version}\0TLSv1.3\0"),
    (b"H", b"client.example\0"),
]
_ENVELOPE: Packets = [
    (b"D", b"Mi\0QID\0{auth_authen}\0ann\0"),
    (b"M", b"<ann@client.example>\0SIZE=100\0BODY=8BITMIME\0"),
    (b"D", b"R{rcpt_addr}\0bob@mta.example\0"),
    (b"R", b"<bob@mta.example>\0NOTIFY=NEVER\0"),
    (b"R", b"<carl@mta.example>\0"),
]
_CONTENT: Packets = [
    (b"D", b"Ti\0QID\0"),
    (b"T", b""),
    (b"L", b"From\0 ann@client.example\0"),
    (b"L", b"Subject\0 caf\xc3\xa9, folded\n\tand \xff\0"),
    (b"L", b"X-Remove\0\0"),
    (b"N", b""),
    (b"B", b"Hello,\r\n\r\n.\r\n\0\xff\r\n" * 40),
    (b"B", b"the rest\r\n"),
    (b"D", b"Ei\0QID\0"),
    (b"E", b""),
]
# What can be ordered, and where the filter looks for it.
VERDICTS = (
    *("continue", "accept", "reject", "tempfail", "discard", "skip", "reply4", "reply5", "raise"),
    *("act", "edit", "half", "progress"),
)
STAGES = {
    b"C": ("connect",),
    b"H": ("helo",),
    b"M": ("mail", "data", "eoh", "eom"),
    b"R": ("rcpt",),
    b"L": ("header", "eom"),
    b"B": ("body", "eom"),
    b"U": ("unknown",),
}


def conversation(random: Random) -> Packets:
    """One that an MTA might have, more or less."""
    offer = _ALL if random.random() < 0.6 else _VERSION_2 if random.random() < 0.4 else _any_offer(random)
    packets: Packets = [(b"O", offer), *_GREETING]
    for _ in range(random.randrange(1, 4)):
        packets += [*_ENVELOPE, *_CONTENT]
        packets += random.choice([[], [], [(b"A", b"")], [(b"A", b""), (b"A", b"")], [(b"K", b""), *_GREETING]])
    if random.random() < 0.2:
        packets.insert(random.randrange(len(packets)), (b"U", b"FOO bar\0"))
    return [*packets, (b"Q", b"")] if random.random() < 0.8 else packets


def _any_offer(random: Random) -> bytes:
    version = random.choice([0, 1, 2, 3, 4, 5, 6, 7, 100, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
    return version.to_bytes(4, "big") + random.randbytes(4) + random.randbytes(4)


# ---- Changes of packets


def _give_order(packets: Packets, random: Random) -> None:
    """In the first string of a packet, where the filter reads it."""
    place = random.randrange(len(packets))
    letter, data = packets[place]
    if letter in STAGES:
        order = f"={random.choice(STAGES[letter])}.{random.choice(VERDICTS)}=".encode()
        head, nul, rest = data.partition(b"\0") if letter != b"B" else (data, b"", b"")
        packets[place] = (letter, head + order + nul + rest)


def _repeat(packets: Packets, random: Random) -> None:
    packets.insert(random.randrange(len(packets) + 1), random.choice(packets))


def _drop(packets: Packets, random: Random) -> None:
    if len(packets) > 1:
        del packets[random.randrange(len(packets))]


def _swap(packets: Packets, random: Random) -> None:
    one, other = random.randrange(len(packets)), random.randrange(len(packets))
    packets[one], packets[other] = packets[other], packets[one]


def _relabel(packets: Packets, random: Random) -> None:
    place = random.randrange(len(packets))
    packets[place] = (bytes([random.choice(b"ABCDEHKLMNOQRTUUUz\0\7\xff")]), packets[place][1])


def _splice(packets: Packets, random: Random) -> None:
    other = conversation(random)
    packets[random.randrange(len(packets)) :] = other[random.randrange(len(other)) :]


def _spoil(packets: Packets, random: Random) -> None:
    """The data of a packet."""
    place = random.randrange(len(packets))
    letter, data = packets[place]
    packets[place] = (letter, random.choice(_SPOILERS)(data, random))


_SPOILERS: tuple[Callable[[bytes, Random], bytes], ...] = (
    lambda data, random: data[: random.randrange(len(data) + 1)],
    lambda data, random: data.replace(b"\0", b""),
    lambda data, random: data[:-1],
    lambda data, random: b"\0" + data,
    lambda data, random: data + b"\0",
    lambda data, random: data + random.randbytes(random.randrange(1, 20)),
    lambda data, random: random.randbytes(random.randrange(1, 80)),
    lambda data, random: b"\0" * random.randrange(1, 40),
    lambda data, random: _flip(data, random),
    lambda data, random: data.ljust(random.choice([255, 256, 4096, LIMIT - 1, LIMIT, LIMIT + 1]), b"x"),
    lambda data, random: data[:1] + b"x" * random.choice([250, 5000, LIMIT - 200]) + data[1:],
)


def _flip(data: bytes, random: Random) -> bytes:
    flipped = bytearray(data or b"\0")
    for _ in range(random.randrange(1, 4)):
        flipped[random.randrange(len(flipped))] ^= 1 << random.randrange(8)
    return bytes(flipped)


_CHANGES = (
    _give_order,
    _give_order,
    _give_order,
    _give_order,
    _repeat,
    _drop,
    _swap,
    _relabel,
    _splice,
    _spoil,
    _spoil,
)


def mutated(random: Random) -> Packets:
    packets = conversation(random)
    for _ in range(random.choice([0, 1, 1, 2, 3, 5, 8, 13])):
        random.choice(_CHANGES)(packets, random)
    return packets


# ---- Bytes


def encoded(packets: Packets) -> bytes:
    return b"".join((len(data) + 1).to_bytes(4, "big") + letter + data for letter, data in packets)


def stream_of(random: Random) -> bytes:
    """A conversation as bytes, now and then with a length that lies, or with garbage."""
    stream = bytearray(encoded(mutated(random)))
    if random.random() < 0.1:
        place = random.randrange(len(stream))
        lies = [b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x80\0\0\0", b"\x7f\xff\xff\xff", b"\0\1\0\0", b"\0\1\0\1"]
        stream[place : place + 4] = random.choice([*lies, random.randbytes(4)])
    return bytes(stream)


def cuts_of(stream: bytes, random: Random) -> list[int]:
    """Where it is cut on its way: not at all, here and there, or into very small pieces at one place."""
    if random.random() < 0.4:
        return []
    start = random.randrange(len(stream) + 1)
    few = [random.randrange(len(stream) + 1) for _ in range(random.randrange(6))]
    return [*few, *range(start, min(start + random.choice([0, 0, 30]), len(stream)))]
