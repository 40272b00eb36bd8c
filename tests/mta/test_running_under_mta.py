# SPDX-License-Identifier: GPL-3.0-or-later
"""`milter run` inside real servers under a steady stream of messages: reloads, a stop, a worker that is killed."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self

import pytest

from tests.filter_process import PATIENCE, FilterProcess

from .server import MailServer
from .smtp import Answer, SmtpClient

FILTERS = Path(__file__).parent / "filters"
BOB = "bob@sink.test"
MESSAGE = "Subject: hello\n\nHi\n"
CLIENTS = 3
WORKERS = 2


@pytest.fixture(params=["postfix", "sendmail"])
def server(request: pytest.FixtureRequest) -> MailServer:
    found: MailServer = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def worker_filter(socket_dir: Path) -> Iterator[FilterProcess]:
    arguments = (
        "-m",
        "milter",
        "run",
        "worker:app",
        "--socket",
        f"unix:{socket_dir}/filter",
        "--workers",
        str(WORKERS),
    )
    with FilterProcess(*arguments, directory=FILTERS, umask=0) as process:
        process.log.wait_for_count(" is listening on ", WORKERS)
        yield process


class Stream:
    """Clients that send one message after the other, each on a connection of its own, until they are told to stop."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._over = threading.Event()
        self._answers: list[Answer] = []
        self._news = threading.Condition()
        self._threads = [threading.Thread(target=self._send) for _ in range(CLIENTS)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(PATIENCE)

    @property
    def answers(self) -> list[Answer]:
        with self._news:
            return list(self._answers)

    def wait_for_more(self) -> None:
        """Until each client can have begun and ended another message."""
        with self._news:
            wanted = len(self._answers) + 2 * CLIENTS
            assert self._news.wait_for(lambda: len(self._answers) >= wanted, PATIENCE), "the stream has dried up"

    def _send(self) -> None:
        while not self._over.is_set():
            with SmtpClient(self._port) as client:
                client.ehlo()
                answer = client.send("ann@client.test", BOB, MESSAGE)
            with self._news:
                self._answers.append(answer)
                self._news.notify_all()


def test_of_reloads_no_client_is_aware(server: MailServer, worker_filter: FilterProcess) -> None:
    with Stream(server.milter_service(worker_filter.socket)) as stream:
        for number in range(3):
            stream.wait_for_more()
            worker_filter.signal(signal.SIGHUP)
            worker_filter.log.wait_for_count("was loaded again", number + 1)
        stream.wait_for_more()
    assert {answer.code for answer in stream.answers} == {250}
    deliveries = server.deliveries()
    assert len(deliveries) == len(stream.answers)
    judges = {delivery.values("X-Worker")[0] for delivery in deliveries}
    assert len(judges) > WORKERS


def test_at_a_stop_no_message_is_taken_that_was_not_judged(server: MailServer, worker_filter: FilterProcess) -> None:
    with Stream(server.milter_service(worker_filter.socket)) as stream:
        stream.wait_for_more()
        worker_filter.stop()
        stream.wait_for_more()
    codes = [answer.code for answer in stream.answers]
    assert set(codes) == {250, 451}
    deliveries = server.deliveries()
    assert len(deliveries) == codes.count(250)
    assert all(delivery.values("X-Worker") for delivery in deliveries)


def test_with_a_killed_worker_only_its_own_messages_are_deferred(
    server: MailServer, worker_filter: FilterProcess
) -> None:
    port = server.milter_service(worker_filter.socket)
    with contextlib.ExitStack() as stack:
        clients: dict[str, SmtpClient] = {}
        judges: dict[str, int] = {}
        # Which worker takes a connection is up to the system; at last there is one in each.
        while len(set(judges.values())) < WORKERS:
            assert len(clients) < 90, "all connections are in one worker"
            sender = f"ann{len(clients)}@client.test"
            client = clients[sender] = stack.enter_context(SmtpClient(port))
            client.ehlo()
            assert client.mail(sender).code == 250
            assert client.rcpt(BOB).code == 250
            judges[sender] = int(worker_filter.stdout.wait_for(f" {sender}").split()[0])
        killed = next(iter(judges.values()))
        os.kill(killed, signal.SIGKILL)
        worker_filter.log.wait_for(f"{killed}")
        codes = {sender: client.data(MESSAGE).code for sender, client in clients.items()}
    assert codes == {sender: 451 if judge == killed else 250 for sender, judge in judges.items()}
    with SmtpClient(port) as client:
        client.ehlo()
        assert client.send("late@client.test", BOB, MESSAGE).code == 250
    expected = {sender for sender, code in codes.items() if code == 250} | {"late@client.test"}
    assert {delivery.sender for delivery in server.deliveries()} == expected


@pytest.mark.parametrize("filter_name", ["forks:app", "forks:waiting"])
def test_of_a_filter_whose_handlers_fork_each_message_has_its_own_verdict(
    server: MailServer, filter_name: str, socket_dir: Path
) -> None:
    """Each client sends ham and spam on one connection, all at once."""
    python = ("-W", "ignore::DeprecationWarning", "-m", "milter")
    socket = f"unix:{socket_dir}/filter"
    with FilterProcess(*python, "run", filter_name, "--socket", socket, directory=FILTERS, umask=0) as process:
        port = server.milter_service(process.socket)
        with ThreadPoolExecutor(CLIENTS) as pool:
            wrong = pool.map(_send_ham_and_spam, [port] * CLIENTS, range(CLIENTS))
            assert [line for lines in wrong for line in lines] == []
    subjects = {delivery.values("Subject")[0] for delivery in server.deliveries()}
    assert subjects == {f"ham {client}-{number}" for client in range(CLIENTS) for number in range(0, 12, 2)}


def _send_ham_and_spam(port: int, client_number: int) -> list[str]:
    """What was answered wrongly."""
    wrong = []
    with SmtpClient(port) as client:
        client.ehlo()
        for number in range(12):
            token = f"{client_number}-{number}"
            subject = f"{'spam' if number % 2 else 'ham'} {token}"
            answer = client.send(f"ann{token}@client.test", BOB, f"Subject: {subject}\n\nHi\n")
            right = f"spam {token}" in answer.text if number % 2 else answer.code == 250
            if not right:
                wrong.append(f"{subject}: {answer}")
    return wrong
