# SPDX-License-Identifier: GPL-3.0-or-later
"""A filter whose handlers fork: SOCKET [coroutines] [on_start=ACT].

What a handler does is told by the sender, ``<ACT.TOKEN@client.example>``, or, in a coroutine, by the recipient. The
answer has the token, so that it shows whose answer it is, and what the act has returned: mostly the child's exit code.
"""

import asyncio
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NoReturn

from milter import Address, Context, EomContext, Message, Milter, NegotiateContext, Reply, Status

app = Milter("forking")


def code_of(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def forked(in_child: Callable[[], Any]) -> Any:
    """What a plain handler does: the child does something, and comes back as the handler does."""
    child = os.fork()
    if child == 0:
        return in_child()
    return code_of(child)


def raises() -> NoReturn:
    open("/nonexistent")  # noqa: SIM115
    raise AssertionError


def works(number: int) -> int:
    return number * 2


def sleeps() -> None:
    time.sleep(1000)


def lives_on(path: bytes) -> int:
    """A child without the filter's output, that lives until somebody writes to the pipe of this name."""
    child = os.fork()
    if child != 0:
        return child
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    os.close(int(sys.modules["sitecustomize"]._DESCRIPTOR))  # of the library's log
    with open(path) as pipe:
        pipe.read()
    os._exit(0)


def in_terminal() -> int:
    child, terminal = os.forkpty()
    if child == 0:
        sys.exit(5)
    code = code_of(child)
    os.close(terminal)
    return code


def terminated() -> int | None:
    process = multiprocessing.get_context("fork").Process(target=sleeps)
    process.start()
    process.terminate()
    process.join()
    # Where other threads start processes, too, multiprocessing may be about to hear of this one's end from them.
    while process.exitcode is None:
        os.sched_yield()
    return process.exitcode


def daemonic() -> str:
    multiprocessing.get_context("fork").Process(target=sleeps, daemon=True).start()
    return "begun"


def pool(method: str) -> list[int]:
    with multiprocessing.get_context(method).Pool(2) as workers:
        return workers.map(works, [1, 2])


def executor(method: str) -> list[int]:
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context(method)) as workers:
        return list(workers.map(works, [1, 2]))


def in_thread() -> list[Any]:
    """A thread forks; its child ends with the thread, as is usual in Python."""
    codes: list[Any] = []
    thread = threading.Thread(target=lambda: codes.append(forked(lambda: 0)))
    thread.start()
    thread.join()
    return codes


def status() -> str:
    """The signals that a program has blocked, which it inherits from the handler."""
    text = subprocess.run(["cat", "/proc/self/status"], capture_output=True, text=True, check=True).stdout
    return next(line.split()[1] for line in text.splitlines() if line.startswith("SigBlk"))


def descriptors() -> str:
    """The sockets that a program inherits which is started without care."""
    with os.popen("ls -l /proc/self/fd") as listing:
        return str(sum("socket:" in line for line in listing))


def handlers_in_child() -> Any:
    return forked(
        lambda: os._exit(
            0
            if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
            and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
            and signal.getsignal(signal.SIGINT) is signal.default_int_handler
            and signal.set_wakeup_fd(-1) == -1
            and not signal.pthread_sigmask(signal.SIG_BLOCK, ())
            else 1
        )
    )


def prints() -> None:
    sys.stdout.write("the child has written this")  # without an end of line


def goes_on() -> str:
    """A handler that comes after this one must not run in the child."""
    child = os.fork()
    return f"to the next {code_of(child)}" if child else "to the next"


def forks_again() -> None:
    assert forked(raises) == 1


def replaces() -> NoReturn:
    os.execvp("true", ["true"])


ACTS: dict[str, Callable[[], Any]] = {
    "nothing": lambda: None,
    "next": goes_on,
    "return": lambda: forked(lambda: None),
    "raise": lambda: forked(raises),
    "exit": lambda: forked(lambda: sys.exit(3)),
    "exit-well": lambda: forked(sys.exit),
    "exit-text": lambda: forked(lambda: sys.exit("the child gives up")),
    "leave": lambda: forked(lambda: os._exit(4)),
    "again": lambda: forked(forks_again),
    "exec": lambda: forked(replaces),
    "print": lambda: forked(prints),
    "terminal": in_terminal,
    "handlers": handlers_in_child,
    "terminate": terminated,
    "daemonic": daemonic,
    "pool-fork": lambda: pool("fork"),
    "pool-spawn": lambda: pool("spawn"),
    "pool-forkserver": lambda: pool("forkserver"),
    "executor-fork": lambda: executor("fork"),
    "executor-forkserver": lambda: executor("forkserver"),
    "thread": in_thread,
    "subprocess": lambda: subprocess.run(["false"], check=False).returncode,
    "preexec": lambda: subprocess.run(["false"], check=False, preexec_fn=lambda: None).returncode,
    "system": lambda: os.waitstatus_to_exitcode(os.system("exit 6")),
    "spawn": lambda: code_of(os.posix_spawnp("false", ["false"], os.environ)),
    "status": status,
    "descriptors": descriptors,
    "fail": raises,
}


def act(address: Address) -> tuple[Any, str]:
    """What came of it, and the token."""
    name, _, token = address.local.partition(".")
    if name.startswith("live:"):
        return lives_on(bytes.fromhex(name.removeprefix("live:"))), token
    return ACTS[name](), token


@app.on_mail
def plain(ctx: Context, sender: Address, params: Any) -> Status | Reply:
    if sender.startswith("pass"):
        return Status.CONTINUE
    if sender.startswith("context"):
        return Reply(550, "5.7.1", str(forked(lambda: print(ctx.macros["i"]))))
    result, token = act(sender)
    if str(result).startswith("to the next"):
        return Status.CONTINUE
    return Reply(550, "5.7.1", f"{token} {result}")


@app.on_mail
def plain_as_well(ctx: Context, sender: Address, params: Any) -> Status:
    if sender.startswith("next"):
        os.write(1, b"the next handler\n")
    return Status.CONTINUE


@app.on_message
def whole(ctx: EomContext, message: Message) -> Reply:
    result, token = act(Address(message.headers["Subject"]))
    return Reply(550, "5.7.1", f"{token} {result}")


async def asynchronous(ctx: Context, recipient: Address, params: Any) -> Status | Reply:
    await asyncio.sleep(0)
    if recipient.startswith("bob"):
        return Status.CONTINUE
    if recipient.startswith("await"):
        if child := os.fork():
            return Reply(550, "5.7.1", f"await {code_of(child)}")
        await asyncio.sleep(0)
    if recipient.startswith("task"):
        result = await asyncio.create_task(in_task())
        return Reply(550, "5.7.1", f"task {result}")
    result, token = act(recipient)
    return Reply(550, "5.7.1", f"{token} {result}")


async def in_task() -> int:
    if child := os.fork():
        return await asyncio.to_thread(code_of, child)
    sys.exit(3)


def at_the_side(ctx: Context | NegotiateContext) -> None:
    """A child of a handler without an answer tells its parent's standard error."""
    os.write(2, f"at the side: {forked(raises)}\n".encode())


def of_a_signal(number: int, frame: object) -> None:
    os.write(1, f"of a signal: {forked(lambda: sys.exit(7))}\n".encode())


if __name__ == "__main__":
    if "coroutines" in sys.argv:
        app.on_rcpt(asynchronous)
    if "everywhere" in sys.argv:
        app.on_negotiate(at_the_side)
        app.on_abort(at_the_side)
        app.on_close(at_the_side)
        signal.signal(signal.SIGUSR1, of_a_signal)
        app.on_stop(lambda: at_the_side(None))  # type: ignore[arg-type]
    for argument in sys.argv:
        if argument.startswith("on_start="):
            name = argument.removeprefix("on_start=")
            app.on_start(lambda name=name: os.write(1, f"on_start: {ACTS[name]()}\n".encode()))  # type: ignore[misc]
    app.run(sys.argv[1])
