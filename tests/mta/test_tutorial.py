# SPDX-License-Identifier: GPL-3.0-or-later
"""The last step of docs/tutorial.md: its filter inside a real Postfix."""

from pathlib import Path

from tests.filter_process import FilterProcess
from tests.pages import DOCS, blocks

from .postfix import Postfix
from .sink import Sink
from .smtp import SmtpClient

PAGE = DOCS / "tutorial.md"


def test_the_filter_of_the_tutorial_works_in_postfix(postfix: Postfix, sink: Sink, tmp_path: Path) -> None:
    guard = [block for block in blocks(PAGE) if block.caption == "guard.py"][-1]
    (tmp_path / "guard.py").write_text(guard.source)
    with FilterProcess(
        "-m", "milter", "run", "guard:app", "--socket", "inet:0@localhost", directory=tmp_path
    ) as process:
        port = postfix.milter_service(process.socket, milter_default_action="tempfail")
        with SmtpClient(port) as client:
            refused = client.send("ann@client.test", "bob@sink.test", "Subject: Lottery\r\n\r\nYou won.\r\n")
            taken = client.send("ann@client.test", "bob@sink.test", "Subject: Hello\r\n\r\nHi.\r\n")
        arrived = sink.next()
    assert str(refused) == "554 5.7.1 we do not play"
    assert taken.code == 250
    assert [value.strip().split(",")[0] for value in arrived.values("X-Guard")] == ["seen"]
