# SPDX-License-Identifier: GPL-3.0-or-later
"""Real servers that give up on a handler: the log names it, and it does not go on for ever."""

from pathlib import Path

import pytest

from tests.filter_process import FilterProcess, RunFilter

from .postfix import Postfix
from .sendmail import Sendmail
from .smtp import SmtpClient

FILTER = Path(__file__).parent / "filters" / "endless.py"
MESSAGE = "Subject: hello\n\nHi\n"


def impatient(server: Postfix | Sendmail, socket: str) -> int:
    if isinstance(server, Postfix):
        return server.milter_service(socket, milter_command_timeout="2s", milter_content_timeout="2s")
    return server.milter_service(socket, T="S:2s;R:2s;E:2s")


@pytest.mark.parametrize("server", ["postfix", "sendmail"])
def test_a_handler_that_the_server_gives_up_on_is_named_and_ends(
    request: pytest.FixtureRequest, server: str, socket_spec: str, run_filter: RunFilter
) -> None:
    endless: FilterProcess = run_filter(FILTER, socket_spec)
    with SmtpClient(impatient(request.getfixturevalue(server), endless.socket)) as client:
        client.ehlo()
        client.mail("ann@client.test")
        assert client.rcpt("ask@sink.test").code == 451
        endless.log.wait_for("ask still runs")
        endless.log.wait_for("ask was cancelled, since the MTA has closed its connection, in on_rcpt")
    with SmtpClient(impatient(request.getfixturevalue(server), endless.socket)) as client:
        client.ehlo()
        assert client.send("ann@client.test", "bob@sink.test", MESSAGE).code == 451
        endless.log.wait_for("scan still runs")
    took = endless.log.wait_for("on_eom took")
    assert took.endswith(", and the MTA did not wait: it has closed its connection")
    assert "queue id None" not in took
