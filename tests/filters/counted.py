# SPDX-License-Identifier: GPL-3.0-or-later
"""Workers that count together, under a supervisor of the simplest kind: DIRECTORY COUNT.

Worker N listens on DIRECTORY/N.sock. The metrics are told at the address in the first line of standard output. To a
line with the number of a worker on standard input the supervisor kills it, and says so; at the end it stops all.
"""

import logging
import os
import signal
import socket
import sys
from collections.abc import Callable

import prometheus_client  # before the directory is there, as a script of a user's would

from milter import EomContext, Milter, metrics

children: list[int] = []


def fork(work: Callable[[], None]) -> int:
    process = os.fork()
    if process:
        return process
    try:
        work()
    except BaseException:
        logging.exception("a child failed")
        os._exit(1)
    os._exit(0)


def worker(number: int, writer: int) -> None:
    os.close(writer)
    app = Milter("counted")
    own = prometheus_client.Counter("own_messages", "A metric of the filter's own")

    @app.on_eom
    def count(ctx: EomContext) -> None:
        own.inc()

    app.run(f"unix:{sys.argv[1]}/{number}.sock", metrics="0")


def main() -> None:
    with metrics.directory() as directory:
        listener = metrics.listen("127.0.0.1:0")
        print(metrics.address_of(listener), flush=True)
        reader, writer = os.pipe()
        workers = [fork(lambda number=number: worker(number, writer)) for number in range(int(sys.argv[2]))]  # type: ignore[misc]
        endpoint = fork(lambda: answer(directory, listener, reader, writer))
        listener.close()
        print(directory.path, flush=True)
        for line in sys.stdin:
            killed = workers[int(line)]
            os.kill(killed, signal.SIGKILL)
            os.waitpid(killed, 0)
            directory.forget(killed)
            workers.remove(killed)
            print("killed", line.strip(), flush=True)
        for process in workers:
            os.kill(process, signal.SIGTERM)
            assert os.waitpid(process, 0)[1] == 0
        os.kill(endpoint, signal.SIGTERM)  # which does not concern it
        os.close(writer)
        assert os.waitpid(endpoint, 0)[1] == 0
    print("end", flush=True)


def answer(directory: metrics.Directory, listener: socket.socket, reader: int, writer: int) -> None:
    os.close(writer)
    directory.serve(listener, reader)


main()
