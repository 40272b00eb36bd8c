# SPDX-License-Identifier: GPL-3.0-or-later
"""Text from strangers, made safe for a terminal and a log."""


def printable(text: str) -> str:
    r"""`text` on one line that no terminal takes for a command: what is not printable is escaped.

    A byte that is no UTF-8 (a lone surrogate here, by ``surrogateescape``) is shown as the byte.

    >>> printable("tab\there, \x1b[1mbold, caf\u00e9, \udcff")
    'tab\\there, \\x1b[1mbold, café, \\xff'
    """
    return "".join(character if character.isprintable() else _escaped(character) for character in text)


def _escaped(character: str) -> str:
    if "\udc80" <= character <= "\udcff":
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")
