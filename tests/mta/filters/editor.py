# SPDX-License-Identifier: GPL-3.0-or-later
"""Edits whole messages: the sender's local part names the edits. Prints each message, received and edited.

    python tests/mta/filters/editor.py SOCKET

A line is an object in JSON. Bytes are shown in Latin-1, header fields as the library shows them.
"""

import json
import sys
from collections.abc import Callable

from milter import EomContext, Message, Milter

app = Milter("editor")
EDITS: dict[str, Callable[[Message], None]] = {}


def named(edit: Callable[[Message], None]) -> Callable[[Message], None]:
    EDITS[edit.__name__.replace("_", "-")] = edit
    return edit


@named
def nothing(message: Message) -> None:
    pass


@named
def change_fields(message: Message) -> None:
    message.headers["Subject"] = "changed: 100%"
    message.headers.replace("X-Twin", "the second", index=2)
    message.headers.replace("X-Latin", message.headers["X-Latin"] + ", and \udcfe more")
    message.headers["X-Folded"] = "another\n fold"


@named
def delete_fields(message: Message) -> None:
    del message.headers["X-Twin"]
    del message.headers["X-Folded"]


@named
def delete_some_of_a_name(message: Message) -> None:
    message.headers.replace("x-twin", None, index=1)
    message.headers.replace("X-TWIN", None, index=2)


@named
def make_one_of_several(message: Message) -> None:
    message.headers["x-twin"] = "the only one"


@named
def insert_fields(message: Message) -> None:
    headers = message.headers
    headers.insert(0, "X-Top", "first")
    headers.insert(3, "X-Middle", "two")
    headers.insert(3, "X-Middle", "one")
    headers.insert(6, "X-Twin", "between the twins")
    headers.insert(len(headers), "X-Bottom", "last")


@named
def add_fields(message: Message) -> None:
    message.headers.add("X-Twin", "the last")
    message.headers.add("X-Added", "folded\n here\n\tand there")
    message.headers.add("X-Added", "grüße \udcff")
    message.headers.add("X-Empty-Too", "")
    message.headers.add("Received", "by nobody")


@named
def rename_a_field(message: Message) -> None:
    place = message.headers.keys().index("Subject")
    message.headers.insert(place, "X-Old-Subject", message.headers["Subject"])
    del message.headers["Subject"]


@named
def reverse_all(message: Message) -> None:
    fields = message.headers.items()
    for name in {name.lower() for name, _ in fields}:
        del message.headers[name]
    for name, value in reversed(fields):
        message.headers.add(name, value)


@named
def change_envelope(message: Message) -> None:
    message.sender = "new@client.test"
    message.recipients.remove("bob@sink.test")
    message.recipients.add("<dora@sink.test>")
    message.recipients.add("fred@sink.test", "NOTIFY=NEVER")


@named
def make_a_bounce(message: Message) -> None:
    message.sender = "<>"


@named
def odd_body(message: Message) -> None:
    message.body = b".\r\n..\r\n.dot\r\n\x00\r\n" + bytes(range(128, 256)) + b"\r\n.\r\n"


@named
def no_body(message: Message) -> None:
    message.body = b""


@named
def long_body(message: Message) -> None:
    message.body = (b"%08d line\r\n" % number for number in range(200_000))


@named
def upper_case(message: Message) -> None:
    message.body = message.body.upper()


@named
def everything(message: Message) -> None:
    change_envelope(message)
    message.headers.insert(0, "X-Top", "first")
    message.headers["X-Twin"] = "the only one"
    message.headers.add("X-Scanned", "clean")
    message.body = b"prefixed\r\n" + message.body


@named
def failing(message: Message) -> None:
    everything(message)
    raise RuntimeError("failed after the edits")


@app.on_message
def edit(ctx: EomContext, message: Message) -> None:
    received = message.as_bytes()
    with message.open() as file:
        assert file.read() == received
    EDITS[message.sender.partition("@")[0]](message)
    edited = {
        "queue_id": ctx.queue_id,
        "received": received.decode("latin-1"),
        "sender": message.sender,
        "recipients": [[recipient, *recipient.params.raw] for recipient in message.recipients],
        "fields": message.headers.items(),
        "body": message.body.decode("latin-1"),
    }
    print(json.dumps(edited), flush=True)


if __name__ == "__main__":
    app.run(sys.argv[1])
