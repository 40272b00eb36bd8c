# SPDX-License-Identifier: GPL-3.0-or-later
"""The filters of scenarios: one process for each command line, shared by all scenarios that ask for it."""

import json
from collections.abc import Sequence
from pathlib import Path

from milter.testing import Actions, Client
from milter.testing.wire import ALL_ACTIONS
from tests.filter_process import FilterProcess, RunFilter

from .scenario import NOBODY, Filter

FILTERS = Path(__file__).parent / "filters"
# Orders after which a process is of no use to others.
_DEADLY = ("die()", "hang()")

# What the filter prints of a server that allows no quarantine.
LAST = "no quarantine"


class Running:
    """A filter at work for a scenario."""

    def __init__(self, process: FilterProcess, orders: Path) -> None:
        self.process = process
        self._orders = orders
        self._seen_before = 0

    def begin(self, orders: Filter) -> None:
        """Give it the orders of a scenario; what it printed before belongs to others."""
        self._orders.write_text(json.dumps([[order.stage, order.argument, order.text] for order in orders.orders]))
        self._seen_before = len(self.process.stdout.lines)

    def seen(self) -> list[tuple[str, str]]:
        """Stages and their arguments, of all connections of the scenario, which must have ended."""
        # One more connection, which allows no quarantine: what was printed before it is here when its own lines are.
        with Client.connect(self.process.socket) as last:
            last.negotiate(actions=ALL_ACTIONS & ~Actions.QUARANTINE)
            last.quit()
            last.wait_for_close()
        lines = self.process.stdout.wait_until(lambda lines: _all_closed(_told(lines[self._seen_before :])))
        told = _told(lines[self._seen_before :])
        opened = {connection for connection, stage, text in told if (stage, text) == ("negotiate", "")}
        return [(stage, text) for connection, stage, text in told if connection in opened]


def _told(lines: Sequence[str]) -> list[tuple[int, str, str]]:
    return [json.loads(line) for line in lines]


def _all_closed(told: Sequence[tuple[int, str, str]]) -> bool:
    opened = {connection for connection, stage, _ in told if stage == "negotiate"}
    closed = {connection for connection, stage, _ in told if stage == "close"}
    return opened <= closed and any((stage, text) == ("negotiate", LAST) for _, stage, text in told)


class FilterPool:
    """Starts filters when they are first asked for. `directory`: for their sockets and orders."""

    def __init__(self, directory: Path, run_filter: RunFilter) -> None:
        self._directory = directory
        self._run_filter = run_filter
        self._running: dict[tuple[int, str], Running] = {}

    def prepare(self, filters: Sequence[Filter]) -> tuple[list[str], list[Running]]:
        """Where these filters listen, and those of them that run, with their orders."""
        running = [self._get(place, each) for place, each in enumerate(filters) if each.command != NOBODY]
        sockets = [self._socket(place, each.command) for place, each in enumerate(filters)]
        return sockets, running

    def retire(self, filters: Sequence[Filter]) -> None:
        """End those that the scenario has left dead or hanging."""
        for place, each in enumerate(filters):
            if any(word in order.text for order in each.orders for word in _DEADLY):
                self._running.pop((place, each.command)).process.kill()

    def _get(self, place: int, wanted: Filter) -> Running:
        key = (place, wanted.command)
        if key not in self._running:
            orders = self._directory / f"{self._name(*key)}.orders"
            orders.write_text("[]")
            script, *stages = wanted.command.split()
            socket = self._socket(place, wanted.command)
            process = self._run_filter(FILTERS / f"{script}.py", socket, orders, *stages)
            self._running[key] = Running(process, orders)
        running = self._running[key]
        running.begin(wanted)
        return running

    def _socket(self, place: int, command: str) -> str:
        return f"unix:{self._directory}/{self._name(place, command)}"

    def _name(self, place: int, command: str) -> str:
        return f"{place}-{command.replace(' ', '-')}"
