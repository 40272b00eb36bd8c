# SPDX-License-Identifier: GPL-3.0-or-later
"""A filter whose handler of whole messages edits, and then raises for some of them."""

import logging
import sys

from milter import EomContext, Message, Milter, Reply, Status

POLICIES: dict[str, Status | Reply] = {
    "tempfail": Status.TEMPFAIL,
    "reject": Status.REJECT,
    "accept": Status.ACCEPT,
    "continue": Status.CONTINUE,
    "reply": Reply(451, "4.3.0", "out of order"),
}
socket, policy = sys.argv[1:]
app = Milter("raising_after_edits", on_error=POLICIES[policy])


@app.on_message
def mark(ctx: EomContext, message: Message) -> None:
    message.headers["X-Scanned"] = "clean"
    message.body = b"new\r\n"


@app.on_message
def look_up(ctx: EomContext, message: Message) -> None:
    message.recipients.add("archive@mta.example")
    if message.sender.matches("poison@client.example"):
        raise LookupError("the database is gone")


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s: %(message)s")
    app.run(socket)
