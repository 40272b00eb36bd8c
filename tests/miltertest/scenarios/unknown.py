# SPDX-License-Identifier: GPL-3.0-or-later
"""A filter that has something to say of unknown commands."""

import sys

from milter import Context, EomContext, Milter, Reply, Status

app = Milter("unknown")


@app.on_unknown
def judge(ctx: Context, command: str) -> Status | Reply | None:
    print(command, "within the message of", ctx.sender)
    match command.split()[0]:
        case "GET":
            return Reply(421, "4.7.0", "this is no web server")
        case "DEBUG":
            return Status.REJECT
        case "LATER":
            return Status.TEMPFAIL
    return None


@app.on_eom
def end(ctx: EomContext) -> Status:
    print("end of the message of", ctx.sender, "to", *ctx.recipients)
    return Status.CONTINUE


if __name__ == "__main__":
    app.run(sys.argv[1])
