# SPDX-License-Identifier: GPL-3.0-or-later
"""A filter that keeps its contexts for too long."""

import sys

from milter import Address, Context, ContextError, EomContext, Milter, Params, StageError, Status

app = Milter("expired_context")
kept: list[Context] = []


@app.on_helo
def greet(ctx: Context, name: str) -> None:
    try:
        print(ctx.transaction)
    except StageError as failure:
        print("StageError:", failure)


@app.on_mail
def keep(ctx: Context, sender: Address, params: Params) -> Status:
    kept.append(ctx)
    return Status.CONTINUE


@app.on_eom
def use(ctx: EomContext) -> None:
    kept.append(ctx)
    print("valid:", ctx.sender)
    try:
        print(kept[0].sender)
    except ContextError as failure:
        print("ContextError:", failure)


@app.on_close
def use_again(ctx: Context) -> None:
    late = kept[1]
    assert isinstance(late, EomContext)
    try:
        late.add_header("X-Late", "too late")
    except ContextError as failure:
        print("ContextError:", failure)


if __name__ == "__main__":
    app.run(sys.argv[1])
