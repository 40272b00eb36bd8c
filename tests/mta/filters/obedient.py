# SPDX-License-Identifier: GPL-3.0-or-later
"""Changes each message as a file says.

    python tests/mta/filters/obedient.py SOCKET FILE

The file holds a list in Python's notation: ``[("add_header", "X-Seen", "yes"), …]``.
"""

import sys
from ast import literal_eval
from pathlib import Path

from milter import EomContext, Milter, Status

app = Milter("obedient")


@app.on_eom
def obey(ctx: EomContext) -> Status:
    for action, *arguments in literal_eval(Path(sys.argv[2]).read_text()):
        getattr(ctx, action)(*arguments)
    return Status.CONTINUE


if __name__ == "__main__":
    app.run(sys.argv[1])
