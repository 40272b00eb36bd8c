# SPDX-License-Identifier: GPL-3.0-or-later
"""The filters that are compared: a list. All of them add X-Sum, the size of all header values and of the body."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.workshop import HERE, Workshop

BASELINE = "c-nr"


@dataclass(frozen=True)
class Program:
    """How to start a filter; the socket follows as last argument."""

    command: list[str]
    variables: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Contender:
    name: str
    label: str
    prepare: Callable[[Workshop], Program]
    optional: bool = False
    """It is not ours: where it cannot be had, the benchmark goes on without it."""
    tcp_only: bool = False
    single_message: str = ""
    """Why it is left out where a connection has more than one message."""


def _script(name: str) -> str:
    return str(HERE / "filters" / f"{name}.py")


def _c(mode: str) -> Callable[[Workshop], Program]:
    return lambda workshop: Program([str(workshop.c_filter()), mode])


def _milter(script: str, *arguments: str, link: str = "static") -> Callable[[Workshop], Program]:
    def prepare(workshop: Workshop) -> Program:
        return Program([sys.executable, _script(script), *arguments], {"PYTHONPATH": str(workshop.milter(link))})

    return prepare


def _package(requirement: str, script: str, *arguments: str) -> Callable[[Workshop], Program]:
    def prepare(workshop: Workshop) -> Program:
        python: Path = workshop.environment(requirement)
        return Program([str(python), _script(script), *arguments])

    return prepare


def _rust(workshop: Workshop) -> Program:
    return Program([str(workshop.rust_filter())])


def _pymilter(mode: str) -> Callable[[Workshop], Program]:
    return _package("pymilter==1.0.5", "pymilter_filter", mode)


CONTENDERS = [
    Contender("c-nr", "C, no reply", _c("nr")),
    Contender("c-replying", "C, replying", _c("replying")),
    Contender("milter-message", "milter on_message", _milter("milter_message")),
    Contender("milter-message-shared", "milter on_message, shared library", _milter("milter_message", link="shared")),
    Contender("milter-observing", "milter, header and body observed", _milter("milter_observing")),
    Contender("milter-replying", "milter, replying", _milter("milter_replying")),
    Contender("milter-replying-each", "milter, replying to each field", _milter("milter_replying", "each")),
    Contender("milter-replying-shared", "milter, replying, shared library", _milter("milter_replying", link="shared")),
    Contender("indymilter", "indymilter (Rust), no reply", _rust, optional=True),
    Contender("pymilter-noreply", "pymilter, no reply", _pymilter("noreply"), optional=True),
    Contender("pymilter-observing", "pymilter, header and body no reply", _pymilter("observing"), optional=True),
    Contender("pymilter-replying", "pymilter, replying", _pymilter("replying"), optional=True),
    Contender(
        "purepythonmilter",
        "purepythonmilter (TCP)",
        _package("purepythonmilter==0.0.1", "purepythonmilter_filter"),
        optional=True,
        tcp_only=True,
        single_message="it sends the changes of a connection's earlier messages again",
    ),
]
