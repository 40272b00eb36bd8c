# SPDX-License-Identifier: GPL-3.0-or-later
"""Random addresses, hard to read: does one raise, change when it is read again, or take more than linear work?

    python -m benchmarks.fuzz_addresses [inputs] [seed]

Each input is put together from what addresses are made of, in any order. It is read, compared, checked as a recipient,
and read again. Of some inputs the pieces are repeated, and the calls of functions counted, in Python and in C: an
address that has more of the same may not take more for each of its characters. The first failure ends the run, and
tells the number that makes it again.
"""

import cProfile
import random
import re
import sys

from milter import Address, checks

PIECES = [
    *'<>()@.,:;"\\[] \t%!',
    *("ann", "Ann", "example.org", "EXAMPLE.org.", "@example.org", "ann@example.org", "<ann@example.org>", "(c)"),
    *('"a b"', '"a@b"', r"\"", "@a.test:", "[192.0.2.1]", "[IPv6:2001:DB8::1]", "[ipv6:x]", "group:", "postmaster"),
    *(
        "ä",
        "ß",
        "ﬀ",
        "ſ",
        "bücher",
        "xn--bcher-kva",
        "xn--",
        "。",
        "\u200d",
        "\u00ad",
        "\u0430",
        "\U0001f600",
        "\u0661",
    ),
    *("\udcff", "\0", "\r\n", "\x7f", "\u2028", "x" * 70),
]
PATTERNS = ("ann@example.org", "example.org", ".example.org", "xn--bcher-kva.example")
SANE = re.compile(r"[a-z0-9-]+(?:\.[a-z0-9-]+)*")


def pieces(number: int) -> list[str]:
    rnd = random.Random(number)
    found = rnd.choices(PIECES, k=rnd.randint(0, 12))
    return ["<", *found, ">"] if rnd.random() < 0.5 else found


def read(raw: str) -> Address:
    """In all ways."""
    address = Address(raw)
    assert address.raw == raw
    _ = (address.local, address.domain, address.canonical, address.complete, address.matches(*PATTERNS))
    try:
        sent = checks.recipient(str(address)).decode("utf-8", "surrogateescape")
    except ValueError:
        return address
    assert Address(sent).canonical == address.canonical, f"{sent!r} is somebody else than {address!r}"
    return address


def check(number: int) -> None:
    parts = pieces(number)
    address = read("".join(parts))
    if address.local and address.complete and SANE.fullmatch(address.domain):
        again = Address(f"<{address}>")
        assert (again.local, again.domain) == (address.local, address.domain), f"{address!r} is read as {again!r}"
    if number % 1000 == 0:
        few, many = (calls_per_character("".join(parts * times) + "x") for times in (16, 128))
        assert many < 2 * few + 5, f"{few:.1f} calls per character, and {many:.1f} of an address with more of the same"


def calls_per_character(raw: str) -> float:
    profile = cProfile.Profile()
    profile.enable()
    read(raw)
    profile.disable()
    return sum(entry.callcount for entry in profile.getstats()) / len(raw)


def main(inputs: int = 100_000, seed: int = 0) -> None:
    for number in range(seed, seed + inputs):
        try:
            check(number)
        except BaseException:
            print(f"number {number}: {''.join(pieces(number))!r}", flush=True)
            print(f"python -m benchmarks.fuzz_addresses 1 {number}", flush=True)
            raise
        if (number + 1 - seed) % 1_000_000 == 0:
            print(number + 1 - seed, "inputs", flush=True)
    print(inputs, "inputs, no failure")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
