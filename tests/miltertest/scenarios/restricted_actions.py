# SPDX-License-Identifier: GPL-3.0-or-later
"""A filter that will add header fields, and nothing else."""

import sys

from milter import ActionError, Actions, EomContext, Milter, Status

app = Milter("restricted_actions", actions=Actions.ADD_HEADER | Actions.QUARANTINE)


@app.on_eom
def mark(ctx: EomContext) -> Status:
    print(repr(ctx.actions & Actions.ALL))
    ctx.add_header("X-Mark", "checked")
    try:
        ctx.remove_recipient("bob@mta.example")
    except ActionError as refusal:
        print(refusal)
    return Status.CONTINUE


if __name__ == "__main__":
    app.run(sys.argv[1])
