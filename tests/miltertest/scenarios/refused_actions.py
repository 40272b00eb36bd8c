# SPDX-License-Identifier: GPL-3.0-or-later
"""A filter that asks for changes that cannot be made, and prints why not."""

import sys
from collections.abc import Callable

from milter import ActionError, Address, Context, EomContext, Milter, Params, StageError, Status

app = Milter("refused_actions")


def print_failure(action: Callable[..., object], *arguments: object) -> None:
    print(action.__name__, end=" ")
    try:
        action(*arguments)
    except StageError as failure:
        print("StageError:", failure)
    except ActionError as failure:
        print("ActionError:", failure)
    except (ValueError, TypeError) as failure:
        print(f"{type(failure).__name__}: {failure}")
    else:
        print("was carried out")


@app.on_mail
def too_early(ctx: Context, sender: Address, params: Params) -> Status:
    print_failure(lambda: ctx.add_header("X-Early", "bird"))  # type: ignore[attr-defined]
    print(hasattr(ctx, "add_header"))
    return Status.CONTINUE


@app.on_eom
def ask(ctx: EomContext) -> Status:
    if ctx.sender and ctx.sender.matches("ungranted@client.example"):
        ungranted(ctx)
    else:
        malformed(ctx)
    return Status.CONTINUE


def malformed(ctx: EomContext) -> None:
    print_failure(ctx.add_header, "", "no name")
    print_failure(ctx.add_header, "X-Colon:", "a colon in the name")
    print_failure(ctx.add_header, "X-Inject", "one\nX-Other: two")
    print_failure(ctx.add_header, "X-Return", "a bare\rreturn")
    print_failure(ctx.add_header, "X-Cut", "a NUL\0 in the value")
    print_failure(ctx.add_header, "X-Bytes", b"bytes")
    print_failure(ctx.insert_header, -1, "X-Index", "below zero")
    print_failure(ctx.replace_header, "Subject", 0, "counts from one")
    print_failure(ctx.replace_header, "Subject", True, "no number")
    print_failure(ctx.replace_sender, "Ann <ann@client.example>")
    print_failure(ctx.add_recipient, "")
    print_failure(ctx.add_recipient, "bob@mta.example", "NOTIFY=NEVER\r\nDATA")
    print_failure(ctx.remove_recipient, "two\nlines@mta.example")
    print_failure(ctx.replace_body, "text")
    print_failure(ctx.quarantine, "")
    print_failure(ctx.quarantine, "two\nlines")
    print_failure(ctx.add_header, "X-Long", "x" * 65536)


def ungranted(ctx: EomContext) -> None:
    print(repr(ctx.actions))
    print_failure(ctx.add_header, "X-Header", "value")
    print_failure(ctx.insert_header, 0, "X-Header", "value")
    print_failure(ctx.replace_header, "Subject", 1, "new")
    print_failure(ctx.replace_sender, "new@client.example")
    print_failure(ctx.add_recipient, "new@mta.example")
    print_failure(ctx.add_recipient, "new@mta.example", "NOTIFY=NEVER")
    print_failure(ctx.remove_recipient, "bob@mta.example")
    print_failure(ctx.replace_body, b"new")
    print_failure(ctx.quarantine, "reason")


if __name__ == "__main__":
    app.run(sys.argv[1])
