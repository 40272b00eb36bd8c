# SPDX-License-Identifier: GPL-3.0-or-later
"""A filter that looks at whole messages, in each way there is, and lets them pass."""

import sys

from milter import Context, EomContext, Message, Milter

app = Milter("whole_message")


@app.on_message
def look(ctx: EomContext, message: Message) -> None:
    print(f"<{message.sender}> to {', '.join(message.recipients)}: {message.as_bytes()!r}")
    print(message.headers.items(), message.body)
    with message.open() as file:
        assert file.read() == message.as_bytes()
    assert message.size == len(message.as_bytes())
    assert message.email()["Subject"] == message.headers.get("Subject")


@app.on_abort
def give_up(ctx: Context) -> None:
    print(f"<{ctx.sender}> gives up")


if __name__ == "__main__":
    app.run(sys.argv[1])
