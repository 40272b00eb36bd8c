# SPDX-License-Identifier: GPL-3.0-or-later
"""A filter that edits each message in all ways, and then gives the verdict that the sender's name says."""

import sys

from milter import Address, Context, EomContext, Message, Milter, Params, Reply, Status

app = Milter("edits_and_verdicts")


@app.on_rcpt
def admit(ctx: Context, recipient: Address, params: Params) -> Status:
    return Status.REJECT if recipient.local == "nobody" else Status.CONTINUE


@app.on_message
def edit(ctx: EomContext, message: Message) -> Status | Reply:
    print(*message.recipients)
    message.headers["Subject"] = "new"
    message.headers["X-Scanned"] = "clean"
    message.recipients.add("archive@mta.example")
    message.sender = "new@client.example"
    message.body = b"new\r\n"
    verdict = ctx.sender.partition("@")[0] if ctx.sender else ""
    return Reply(554, "5.7.1", "100% spam") if verdict == "REPLY" else Status[verdict]


if __name__ == "__main__":
    app.run(sys.argv[1])
