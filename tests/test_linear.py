# SPDX-License-Identifier: GPL-3.0-or-later
"""No message costs more than linear work: twice as much of anything takes twice as many steps, and no more."""

from collections.abc import Iterator
from typing import Any, cast

import pytest

from benchmarks import fuzz_messages
from benchmarks.linear import CASES, EXAMPLES, Case
from milter import Address, Context
from milter.context import Conversation, Transaction
from tests.steps import steps


def test_steps_tell_linear_from_quadratic() -> None:
    def linear(count: int) -> None:
        for _ in range(count):
            pass

    def quadratic(count: int) -> None:
        for _ in range(count):
            linear(count)

    assert 1.9 < steps(lambda: linear(200)) / steps(lambda: linear(100)) < 2.1
    assert 3.8 < steps(lambda: quadratic(200)) / steps(lambda: quadratic(100)) < 4.2


SIZED = [
    *(pytest.param(case, 1200, id=name) for name, case in CASES.items()),
    *(pytest.param(case, 150, id=f"{name}, few") for name, case in CASES.items() if name not in EXAMPLES),
]


@pytest.mark.parametrize(("case", "size"), SIZED)
def test_twice_as_much_takes_twice_as_many_steps(case: Case, size: int) -> None:
    once, twice = case.make(size), case.make(2 * size)
    first = steps(lambda: case.act(once))
    assert steps(lambda: case.act(twice)) < 2.2 * first + 5000


class Counted(list[Address]):
    """Recipients, and how many of them were looked at or copied."""

    touched = 0

    def __iter__(self) -> Iterator[Address]:
        self.touched += len(self)
        return super().__iter__()

    def __getitem__(self, index: Any) -> Any:
        self.touched += len(self[index]) if isinstance(index, slice) else 1
        return super().__getitem__(index)


def test_a_look_at_the_recipients_copies_none() -> None:
    conversation = Conversation(1, None, None)
    transaction = conversation.transaction = Transaction(Address(""))
    counted = transaction.recipients = Counted(Address(f"{number}@mta.example") for number in range(1000))
    ctx: Context[Any, Any] = Context(conversation, cast(Any, None))
    counted.touched = 0
    assert len(ctx.recipients) == 1000
    assert (ctx.recipients[0], ctx.recipients[-1]) == ("0@mta.example", "999@mta.example")
    assert ctx.recipients[-3:-1] == ("997@mta.example", "998@mta.example")
    assert counted.touched == 4


def test_random_messages_are_read_and_edited_without_an_error() -> None:
    for number in range(1000):
        fuzz_messages.check(number)
