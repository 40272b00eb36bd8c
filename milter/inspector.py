# SPDX-License-Identifier: GPL-3.0-or-later
"""The command ``milter inspect``: print every stage of every conversation, its arguments and its macros.

A filter like any other, on the public API: it accepts everything and changes nothing.
``milter.cli`` calls `add_arguments` and `main`.
"""

import argparse
import contextlib
import json
import os
import sys
import threading
from collections.abc import Callable, Iterable
from enum import Flag
from typing import TextIO, TypeAlias

from milter.addresses import Address
from milter.app import Milter
from milter.context import Context, EomContext, NegotiateContext
from milter.envelope import ClientAddress, Params
from milter.errors import MilterError
from milter.outlets import end_without_reader, patient_stream, reader_is_gone
from milter.printable import printable
from milter.protocol import Stage
from milter.verdict import Status

Value: TypeAlias = str | int | list[str] | None
Show: TypeAlias = Callable[[int, Stage, dict[str, Value], dict[str, str]], None]

# Those that say something about a conversation, besides what the MTAs send by themselves.
WANTED_MACROS = {
    Stage.CONNECT: ("{client_addr}", "{client_connections}", "{client_name}", "{client_port}", "{client_ptr}"),
    Stage.HELO: (),
    Stage.MAIL: (),
    Stage.RCPT: (),
    Stage.DATA: (),
}

_BOLD, _BLUE, _GREEN, _PLAIN = "\x1b[1m", "\x1b[34m", "\x1b[32m", "\x1b[0m"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line of ``milter inspect``."""
    parser.description = (
        "Print every stage of every conversation between SMTP clients and an MTA, with its arguments and macros. "
        "All mail is accepted, nothing is changed. Ctrl-C ends it."
    )
    parser.add_argument(
        "socket", help="where to listen: inet:port@host, unix:path, ...; name it to the MTA as a milter"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    parser.add_argument(
        "--color", choices=("auto", "always", "never"), default="auto", help="colour the output (auto: on a terminal)"
    )


def main(arguments: argparse.Namespace) -> int:
    """Run until a signal comes, or nothing reads the output any more. Exit code 0, or 1 when it could not run."""
    output = patient_stream(sys.stdout, "standard output", lambda failure: lose(failure))
    app = make_inspector(_printer(arguments, output))

    def lose(failure: OSError) -> None:
        """The mail has nothing to do with that: it is accepted as before, until the end."""
        if isinstance(failure, BrokenPipeError):
            app.stop()
        else:
            _tell(f"milter inspect: lines are lost, since they cannot be written: {failure.strerror}")

    app.on_start(lambda: _tell(f"inspecting on {arguments.socket}; Ctrl-C ends"))
    app.on_stop(lambda: _tell("inspector ended"))
    try:
        app.run(arguments.socket, grace=1.0)
    except MilterError as failure:
        _tell(f"milter inspect: {failure}")
        return 1
    return end_without_reader() if reader_is_gone(sys.stdout) else 0


def _tell(text: str) -> None:
    with contextlib.suppress(OSError):  # that reader is gone, too
        print(text, file=sys.stderr, flush=True)


def make_inspector(show: Show) -> Milter:
    """A filter that gives each event to `show`: connection, stage, arguments and macros."""
    app = Milter("inspector", rejected_recipients=True)

    def see(ctx: Context, stage: Stage, **arguments: Value) -> Status:
        show(ctx.id, stage, arguments, dict(ctx.macros))
        return Status.CONTINUE

    @app.on_negotiate
    def on_negotiate(ctx: NegotiateContext) -> None:
        for stage, macros in WANTED_MACROS.items():
            ctx.request_macros(stage, macros)
        offered = {"actions": _names(ctx.offered_actions), "options": _names(ctx.offered_options)}
        show(ctx.id, Stage.NEGOTIATE, dict(offered), {})

    @app.on_connect
    def on_connect(ctx: Context, hostname: str, address: ClientAddress) -> Status:
        return see(ctx, Stage.CONNECT, hostname=hostname, address=None if address is None else str(address))

    @app.on_helo
    def on_helo(ctx: Context, name: str) -> Status:
        return see(ctx, Stage.HELO, name=name)

    @app.on_mail
    def on_mail(ctx: Context, sender: Address, params: Params) -> Status:
        return see(ctx, Stage.MAIL, sender=sender.raw, params=list(params.raw))

    @app.on_rcpt
    def on_rcpt(ctx: Context, recipient: Address, params: Params) -> Status:
        return see(ctx, Stage.RCPT, recipient=recipient.raw, params=list(params.raw))

    @app.on_data
    def on_data(ctx: Context) -> Status:
        return see(ctx, Stage.DATA)

    @app.on_header
    def on_header(ctx: Context, name: str, value: str) -> Status:
        return see(ctx, Stage.HEADER, name=name, value=value)

    @app.on_eoh
    def on_eoh(ctx: Context) -> Status:
        return see(ctx, Stage.EOH)

    @app.on_body
    def on_body(ctx: Context, chunk: bytes) -> Status:
        return see(ctx, Stage.BODY, size=len(chunk), chunk=chunk.decode("utf-8", "surrogateescape"))

    @app.on_eom
    def on_eom(ctx: EomContext) -> Status:
        return see(ctx, Stage.EOM, sender=ctx.sender, recipients=list(ctx.recipients))

    @app.on_unknown
    def on_unknown(ctx: Context, command: str) -> Status:
        return see(ctx, Stage.UNKNOWN, command=command)

    @app.on_abort
    def on_abort(ctx: Context) -> None:
        see(ctx, Stage.ABORT)

    @app.on_close
    def on_close(ctx: Context) -> None:
        see(ctx, Stage.CLOSE)

    return app


def _names(flags: Flag) -> list[str]:
    return [flag.name or "" for flag in flags]


# ---- Printing --------------------------------------------------------------------------------


def _printer(arguments: argparse.Namespace, output: TextIO) -> Show:
    as_lines = _JsonLines() if arguments.json else _TextLines(_wants_colour(arguments.color, output))
    lock = threading.Lock()

    def show(connection: int, stage: Stage, values: dict[str, Value], macros: dict[str, str]) -> None:
        with lock:  # connections are served side by side, and an event's lines belong together
            lines = as_lines(connection, stage, values, macros)
            output.write("".join(f"{line}\n" for line in lines))
            output.flush()

    return show


def _wants_colour(choice: str, output: TextIO) -> bool:
    if choice == "auto":
        return output.isatty() and "NO_COLOR" not in os.environ
    return choice == "always"


class _JsonLines:
    """One object for each event, in ASCII: a byte that is no UTF-8 appears as a lone surrogate."""

    def __call__(
        self, connection: int, stage: Stage, values: dict[str, Value], macros: dict[str, str]
    ) -> Iterable[str]:
        yield json.dumps({"connection": connection, "stage": stage.name.lower(), **values, "macros": macros})


class _TextLines:
    """A few lines for each event, with those macros that are new or have another value since the last one."""

    def __init__(self, coloured: bool) -> None:
        self._colours = (_BOLD, _BLUE, _GREEN, _PLAIN) if coloured else ("", "", "", "")
        self._shown: dict[int, dict[str, str]] = {}

    def __call__(
        self, connection: int, stage: Stage, values: dict[str, Value], macros: dict[str, str]
    ) -> Iterable[str]:
        bold, blue, green, plain = self._colours
        yield f"[{connection}] {bold}{stage.name}{plain}"
        for name, value in values.items():
            for line in _printable_lines(value):
                yield f"    {blue}{name:<12}{plain} {line}"
                name = ""
        for name, text in self._news(connection, macros).items():
            yield f"    {green}{name:<20}{plain} {printable(text)}"
        if stage is Stage.CLOSE:
            self._shown.pop(connection, None)

    def _news(self, connection: int, macros: dict[str, str]) -> dict[str, str]:
        before = self._shown.get(connection, {})
        self._shown[connection] = macros
        return {name: text for name, text in macros.items() if before.get(name) != text}


def _printable_lines(value: Value) -> list[str]:
    if value is None:
        return ["unknown"]
    if isinstance(value, list):
        return [printable(" ".join(value)) or "none"]
    return [printable(line) for line in str(value).replace("\r\n", "\n").split("\n")]
