# SPDX-License-Identifier: GPL-3.0-or-later
"""The documentation as its tests see it: the blocks of its pages, each with its options."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from tests.filter_process import REPOSITORY

DOCS = REPOSITORY / "docs"

_FENCE = re.compile(r"^(?P<indent> *)```(?P<head>[^\n`]*)\n(?P<content>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL)
_OPTION = re.compile(r":(?P<name>[a-z]+): *(?P<value>.*)\n")


@dataclass(frozen=True)
class Block:
    """What stands between two fences. ``language``: of a code-block the one it names."""

    language: str
    source: str
    options: dict[str, str] = field(default_factory=dict)
    line: int = 0

    @property
    def caption(self) -> str:
        """The name of the file that it is, or nothing."""
        return self.options.get("caption", "")


def blocks(page: Path) -> list[Block]:
    """All blocks of a page, in order."""
    text = page.read_text("utf-8")
    return [_block(match, text.count("\n", 0, match.start()) + 1) for match in _FENCE.finditer(text)]


def _block(match: "re.Match[str]", line: int) -> Block:
    indent, content = match["indent"], match["content"]
    if indent:
        content = re.sub(rf"^{indent}", "", content, flags=re.MULTILINE)
    options = {}
    while option := _OPTION.match(content):
        options[option["name"]] = option["value"]
        content = content[option.end() :]
    directive = re.fullmatch(r"\{code-block\} *(.*)", match["head"].strip())
    return Block(directive[1] if directive else match["head"].strip(), content.removeprefix("\n"), options, line)


def programs(page: Path) -> list[Block]:
    """The blocks of Python for this library: not those of pymilter, and no transcripts of an interpreter."""
    return [
        block
        for block in blocks(page)
        if block.language == "python" and "class" not in block.options and ">>>" not in block.source
    ]
