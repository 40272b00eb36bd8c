# SPDX-License-Identifier: GPL-3.0-or-later
"""``python -m benchmarks.sendmail_tcp``: what a message costs in a real Sendmail that asks a filter over TCP.

Sendmail sends the macros of a command and the command in two pieces. The second waits until the first is acknowledged,
which a system delays by 40 ms unless it is told not to. The library tells it, where libmilter's calls are redirected.
Both ways of linking are measured, over TCP and over a Unix socket, in turns. Needs root, and Sendmail as the tests
have it.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.contenders import Program
from benchmarks.process import FilterProcess
from benchmarks.workshop import HERE, Workshop
from tests.mta.sendmail import Sendmail, missing
from tests.mta.sink import Sink
from tests.mta.smtp import SmtpClient

LINKS = ("static", "shared")
TRANSPORTS = ("unix", "tcp")
# Delivery is not what is measured.
QUEUE_ONLY = {"confDELIVERY_MODE": "queue", "confSAFE_QUEUE": "False"}
MESSAGE = "From: <ann@client.test>\nTo: <bob@sink.test>\nSubject: hello\n\nHi\n"


def milliseconds(port: int, messages: int) -> float:
    """For a message, from MAIL to the answer to its end; the median of those on one connection."""
    taken = []
    with SmtpClient(port) as client:
        client.ehlo()
        for _ in range(messages):
            start = time.perf_counter()
            answer = client.send("ann@client.test", "bob@sink.test", MESSAGE)
            taken.append(time.perf_counter() - start)
            if answer.code != 250:
                raise SystemExit(f"Sendmail refuses the message: {answer}")
    return statistics.median(taken) * 1000


def measure(workshop: Workshop, rounds: int, messages: int) -> dict[tuple[str, str], float]:
    """The median of the rounds, by link and transport. All filters run all the time, and take turns."""
    taken: dict[tuple[str, str], list[float]] = {(link, transport): [] for link in LINKS for transport in TRANSPORTS}
    with tempfile.TemporaryDirectory(dir="/tmp") as name, Sink() as sink, Sendmail(Path(name), sink) as sendmail:
        for _ in range(rounds):
            for (link, transport), found in taken.items():
                variables = {"PYTHONPATH": str(workshop.milter(link))}
                program = Program([sys.executable, str(HERE / "filters" / "milter_replying.py")], variables)
                with FilterProcess(program, transport, Path(name), f"{link}-{transport}") as process:
                    found.append(milliseconds(sendmail.milter_service(process.socket, **QUEUE_ONLY), messages))
                sendmail.discard_queue()
    return {key: statistics.median(found) for key, found in taken.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sendmail_tcp", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="[3]")
    parser.add_argument("--messages", type=int, default=20, help="in each round [20]")
    parser.add_argument("--directory", type=Path, default=HERE / ".cache", help="for what is built")
    parsed = parser.parse_args(arguments)
    reason = missing()
    if reason:
        raise SystemExit(reason)
    found = measure(Workshop(parsed.directory), parsed.rounds, parsed.messages)
    print("| libmilter | Unix socket | TCP | TCP : Unix |\n| --- | --- | --- | --- |")
    for link in LINKS:
        unix, tcp = (found[link, transport] for transport in TRANSPORTS)
        print(f"| {link} | {unix:.1f} ms | {tcp:.1f} ms | {tcp / unix:.1f} |")


if __name__ == "__main__":
    main()
