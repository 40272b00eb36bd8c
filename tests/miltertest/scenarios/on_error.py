# SPDX-License-Identifier: GPL-3.0-or-later
"""A filter whose handlers all raise, with the policy for that case chosen at its start."""

import logging
import sys

from milter import Address, Context, EomContext, Milter, Params, Reply, Status

socket, policy = sys.argv[1:]
POLICIES: dict[str, Status | Reply] = {
    "tempfail": Status.TEMPFAIL,
    "reject": Status.REJECT,
    "accept": Status.ACCEPT,
    "continue": Status.CONTINUE,
    "reply": Reply(554, "5.3.0", "the filter is 100% broken"),
}
app = Milter("on_error", on_error=POLICIES[policy])


@app.on_unknown
def refuse(ctx: Context, command: str) -> Status:
    raise RuntimeError("unknown")


@app.on_mail
def begin(ctx: Context, sender: Address, params: Params) -> Status:
    if sender.local == "mail":
        raise RuntimeError("mail")
    return Status.CONTINUE


@app.on_header
def look(ctx: Context, name: str, value: str) -> None:
    if str(ctx.sender).startswith("observer@"):
        raise RuntimeError("header")


@app.on_eom
def end(ctx: EomContext) -> Status:
    raise RuntimeError("eom")


@app.on_abort
def give_up(ctx: Context) -> None:
    raise RuntimeError("abort")


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s: %(message)s")
    app.run(socket)
