# SPDX-License-Identifier: GPL-3.0-or-later
"""A filter that edits messages; the sender's name says what."""

import logging
import sys

from milter import EomContext, Message, Milter

app = Milter("edits")


@app.on_message
def edit(ctx: EomContext, message: Message) -> None:
    headers, recipients = message.headers, message.recipients
    match message.sender.partition("@")[0]:
        case "headers":
            headers["Subject"] = "new"
            del headers["X-Spam"]
            headers.insert(0, "X-First", "100% first")
            headers.insert(2, "X-Second", "second")
            headers["X-Last"] = "last"
        case "one-of-several":
            headers.replace("x-twin", "two", index=2)
            headers.replace("X-Twin", None, index=3)
        case "values":
            headers.add("X-Folded", "one\n two\r\n\tthree")
            headers.add("X-Latin", "caf\udce9")
            headers.add("X-Empty", "")
            headers["Subject"] = ""
        case "envelope":
            message.sender = "<new@client.example>"
            recipients.remove("bob@mta.example")
            recipients.remove("<bare@mta.example>")
            recipients.add("archive@mta.example")
            recipients.add("<quiet@mta.example>", "NOTIFY=NEVER")
        case "null-sender":
            message.sender = ""
        case "body":
            message.body = b"new\r\n.\r\n\0\r\n"
        case "no-body":
            message.body = b""
        case "two-bodies":
            ctx.replace_body(b"one\r\n")
            message.body = b"two\r\n"
        case "quarantine":
            headers["X-Suspect"] = "yes"
            ctx.quarantine("looks odd")
        case "nothing":
            headers["Subject"] = headers["Subject"]
            headers.add("X-Passing", "by")
            del headers["X-Passing"]
            message.sender = "nothing@client.example"
            recipients.remove("bare@mta.example")
            recipients.add("bare@mta.example")
            message.body = message.body


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s: %(message)s")
    app.run(sys.argv[1])
