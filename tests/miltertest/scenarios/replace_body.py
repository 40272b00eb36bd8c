# SPDX-License-Identifier: GPL-3.0-or-later
"""A filter that replaces the bodies of messages, in each way there is."""

import logging
import sys
from collections.abc import Iterator

from milter import ActionError, EomContext, Milter, Status

app = Milter("replace_body")


def verses() -> Iterator[bytes]:
    yield b"first\r\n"
    yield b"second\r\n"


def interrupted() -> Iterator[bytes]:
    yield b"first\r\n"
    raise OSError("the rest cannot be read")


@app.on_eom
def replace(ctx: EomContext) -> Status:
    match ctx.sender:
        case "bytes@client.example":
            ctx.replace_body(b"all at once\r\n")
        case "iterable@client.example":
            ctx.replace_body(verses())
        case "pieces@client.example":
            ctx.append_body_chunk(b"one\r\n")
            ctx.append_body_chunk(b"two\r\n")
        case "both@client.example":
            ctx.replace_body(b"one\r\n")
            ctx.append_body_chunk(b"two\r\n")
        case "empty@client.example":
            ctx.replace_body(b"")
        case "empty-iterable@client.example":
            ctx.replace_body([])
        case "nul@client.example":
            ctx.replace_body(b"a\0b\r\n")
        case "twice@client.example":
            ctx.replace_body(b"one\r\n")
            print_refusal(ctx, b"two\r\n")
        case "halves@client.example":
            ctx.append_body_chunk(b"one\r\n")
            ctx.add_header("X-Between", "the halves")
            ctx.append_body_chunk(b"two\r\n")
        case "interrupted@client.example":
            try_to_replace(ctx)
    return Status.ACCEPT


def print_refusal(ctx: EomContext, body: bytes) -> None:
    try:
        ctx.replace_body(body)
    except ActionError as refusal:
        print(refusal)


def try_to_replace(ctx: EomContext) -> None:
    try:
        ctx.replace_body(interrupted())
    except OSError:
        print("half a body was sent")


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s: %(message)s")
    app.run(sys.argv[1])
