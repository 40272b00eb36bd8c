# SPDX-License-Identifier: GPL-3.0-or-later
"""A filter that refuses at one stage, with the text that the client asks for by its name."""

import sys

from milter import Context, Milter, Reply

app = Milter("replies")
socket, stage = sys.argv[1:]

REPLIES = {
    "one line": Reply(550, "5.7.1", "not for you"),
    "temporary": Reply(451, "4.3.0", "come back later"),
    "several lines": Reply(554, "5.7.0", "first", "second", "third"),
    "several temporary lines": Reply(450, "4.2.1", "first", "second"),
    "per cent": Reply(550, "5.7.1", "100% spam, %s %d %%"),
    "closing": Reply(421, "4.7.0", "good bye"),
    "no enhanced code": Reply(571, None, "just text"),
    "no enhanced code, several lines": Reply(471, None, "just", "text"),
    "other alphabet": Reply(550, "5.7.1", "не для вас"),
    "empty line": Reply(550, "5.7.1", ""),
}


def refuse(ctx: Context, *arguments: object) -> Reply:
    assert ctx.hostname is not None
    return REPLIES[ctx.hostname]


getattr(app, f"on_{stage}")(refuse)

if __name__ == "__main__":
    app.run(socket)
