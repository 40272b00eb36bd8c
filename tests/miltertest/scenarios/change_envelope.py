# SPDX-License-Identifier: GPL-3.0-or-later
"""A filter that changes the sender and the recipients of messages."""

import sys

from milter import EomContext, Milter, Status

app = Milter("change_envelope")


@app.on_eom
def readdress(ctx: EomContext) -> Status:
    match ctx.sender:
        case "with-brackets@client.example":
            ctx.replace_sender("<new@client.example>")
        case "with-parameters@client.example":
            ctx.replace_sender("new@client.example", "RET=HDRS ENVID=42")
        case "bounce@client.example":
            ctx.replace_sender("<>")
        case _:
            ctx.replace_sender("new@client.example")
    ctx.add_recipient("archive@mta.example")
    ctx.add_recipient("<boss@mta.example>")
    ctx.add_recipient("quiet@mta.example", "NOTIFY=NEVER")
    for recipient in ctx.recipients:
        ctx.remove_recipient(recipient)
    ctx.remove_recipient("Stranger@MTA.example")
    ctx.remove_recipient("<friend@mta.example>")
    return Status.ACCEPT


if __name__ == "__main__":
    app.run(sys.argv[1])
