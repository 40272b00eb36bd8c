# SPDX-License-Identifier: GPL-3.0-or-later
r"""Bytes as readable text, the way scenarios write them, and back.

UTF-8 stands for itself. ``\r \n \t \\`` and ``\xNN`` are as in Python; ``\(TEXT*N)`` is TEXT N times.

>>> unescape(r"caf\xe9 \(ab*3)")
b'caf\xe9 ababab'
>>> escape(b"caf\xe9\t" + b"x" * 100)
'caf\\xe9\\t\\(x*100)'
"""

import re

# Shorter runs of a character are written as they are.
_RUN = 60

_ESCAPE = re.compile(r"\\(?:x([0-9a-f]{2})|\(((?:[^()\\]|\\[^(])*)\*([0-9]+)\)|([rnt\\])|)", re.DOTALL)
_LETTERS = {"r": b"\r", "n": b"\n", "t": b"\t", "\\": b"\\"}
_SHOWN = {"\r": "\\r", "\n": "\\n", "\t": "\\t", "\\": "\\\\"}


def unescape(text: str) -> bytes:
    """The bytes that are meant. Raises `ValueError` for a backslash with something unknown behind it."""
    parts: list[bytes] = []
    position = 0
    for match in _ESCAPE.finditer(text):
        parts += [text[position : match.start()].encode(), _meant(match, text)]
        position = match.end()
    return b"".join([*parts, text[position:].encode()])


def _meant(match: re.Match[str], text: str) -> bytes:
    byte, repeated, times, letter = match.groups()
    if byte:
        return bytes([int(byte, 16)])
    if times:
        return unescape(repeated) * int(times)
    if letter:
        return _LETTERS[letter]
    raise ValueError(f"a backslash that means nothing: {text[match.start() : match.start() + 10]!r}")


def escape(raw: bytes) -> str:
    """The bytes as `unescape` reads them."""
    text = raw.decode("utf-8", "surrogateescape")
    pieces = [match[0] for match in re.finditer(r"(.)\1*", text, re.DOTALL)]
    return "".join(_run(piece) if len(piece) > _RUN else "".join(map(_shown, piece)) for piece in pieces)


def _run(piece: str) -> str:
    return f"\\({_shown(piece[0])}*{len(piece)})"


def _shown(character: str) -> str:
    if "\udc80" <= character <= "\udcff":
        return f"\\x{ord(character) - 0xDC00:02x}"
    if character in _SHOWN:
        return _SHOWN[character]
    if character.isprintable():
        return character
    return "".join(f"\\x{byte:02x}" for byte in character.encode())
