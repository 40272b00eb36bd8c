# SPDX-License-Identifier: GPL-3.0-or-later
"""The program in README.md runs, and does what the text says."""

import re
from pathlib import Path

from milter import Milter
from milter.testing import AddHeader, Verdict
from tests.conftest import Serve, send_content

README = Path(__file__).parent.parent / "README.md"


def program() -> Milter:
    (source,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names: dict[str, object] = {"__name__": "readme"}
    exec(source, names)
    app = names["app"]
    assert isinstance(app, Milter)
    return app


def test_the_program_refuses_strangers_and_marks_what_passes(serve: Serve) -> None:
    client = serve(program()).greeted()
    client.mail("<ann@client.example>")
    answers = [client.rcpt("<boss@internal.example>"), client.rcpt("<bob@mta.example>")]
    client.data()
    end = send_content(client)
    assert [answer and answer.verdict for answer in answers] == [Verdict.REPLY, Verdict.CONTINUE]
    assert end.changes == (AddHeader("X-Guard", "ann@client.example wrote to 1"),)
