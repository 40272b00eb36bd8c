# SPDX-License-Identifier: GPL-3.0-or-later
"""Does at each stage what a file of orders says, and prints what it is shown.

    python tests/mta/filters/obey.py SOCKET ORDERS [STAGE...]

Without stages it handles all of them but ``message``. The word ``+refused`` asks for the recipients that the server
itself refuses, ``+each`` for a reply to each header field. The orders are read anew for each connection: a JSON array
of ``[stage, argument, order]``. An order is a line of Python, run when the stage is called, with the names of
`_names`; where it is an expression, its value is the verdict if it is one. An order with an argument is run only
if that is the stage's first argument, or the sender. Each line of output is a JSON array: connection, stage, text.
"""

import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from milter import Actions, Context, Milter, NegotiateContext, Reply, Stage, Status

STAGES = ("connect", "helo", "mail", "rcpt", "data", "header", "eoh", "body", "eom", "unknown", "abort", "close")
# What a stage calls the arguments that its orders may use.
ARGUMENTS = {
    "connect": ("hostname", "address"),
    "helo": ("name",),
    "mail": ("sender", "params"),
    "rcpt": ("recipient", "params"),
    "header": ("name", "value"),
    "body": ("chunk",),
    "unknown": ("command",),
    "message": ("message",),
}

Order = tuple[str, str, str]

app = Milter(
    "obey",
    rejected_recipients="+refused" in sys.argv,
    header_replies="each" if "+each" in sys.argv else "together",
)
orders_of: dict[int, list[Order]] = {}


def told(connection: int, stage: str, text: str) -> None:
    # In one piece, since connections are served side by side.
    os.write(1, f"{json.dumps([connection, stage, text])}\n".encode())


def shown(stage: str, arguments: tuple[Any, ...]) -> str:
    """The arguments of a stage in one line."""
    match stage:
        case "connect":
            hostname, address = arguments
            return f"{hostname} {getattr(address, 'host', address)}"
        case "mail" | "rcpt":
            address, params = arguments
            return " ".join([address.raw, *params.raw])
        case "header":
            return ": ".join(arguments)
        case "body":
            return f"{len(arguments[0])} bytes"
        case "message":
            return ""
    return " ".join(map(str, arguments))


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang() -> None:
    threading.Event().wait()


def macros(ctx: Context) -> str:
    """The names of all macros that are known, sorted; without those that differ from machine to machine."""
    return " ".join(sorted(ctx.macros))


def obey(stage: str, ctx: Any, arguments: tuple[Any, ...]) -> Any:
    names = {"Reply": Reply, "Status": Status, "Stage": Stage, "Actions": Actions, "die": die, "hang": hang}
    names |= {"ctx": ctx, "macros": macros, "show": lambda *values: told(ctx.id, "show", " ".join(map(str, values)))}
    names |= dict(zip(ARGUMENTS.get(stage, ()), arguments, strict=False))
    for wanted, argument, order in orders_of.get(ctx.id, []):
        if wanted != stage or not concerns(argument, ctx, arguments):
            continue
        verdict = carried_out(order, names)
        if verdict is not None:
            return verdict
    return None


def concerns(argument: str, ctx: Any, arguments: tuple[Any, ...]) -> bool:
    if not argument:
        return True
    sender = None if isinstance(ctx, NegotiateContext) else ctx.sender
    return argument in (sender, str(arguments[0]) if arguments else None)


def carried_out(order: str, names: dict[str, Any]) -> Status | Reply | None:
    try:
        code = compile(order, "<order>", "eval")
    except SyntaxError:
        exec(order, names)
        return None
    value = eval(code, names)
    return value if isinstance(value, Status | Reply) else None


def handler(stage: str) -> Callable[..., Any]:
    def handle(ctx: Context, *arguments: Any) -> Any:
        told(ctx.id, stage, shown(stage, arguments))
        return obey(stage, ctx, arguments)

    return handle


@app.on_negotiate
def begin(ctx: NegotiateContext) -> None:
    told(ctx.id, "negotiate", "" if Actions.QUARANTINE in ctx.offered_actions else "no quarantine")
    orders_of[ctx.id] = json.loads(Path(sys.argv[2]).read_text())
    obey("negotiate", ctx, ())


if __name__ == "__main__":
    socket, _, *stages = sys.argv[1:]
    for stage in [stage for stage in stages if not stage.startswith("+")] or STAGES:
        getattr(app, f"on_{stage}")(handler(stage))
    app.run(socket)
