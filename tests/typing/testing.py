# SPDX-License-Identifier: GPL-3.0-or-later
"""Right and wrong tests of filters; read by mypy, never run. A comment says which error a line must have."""

from email.message import EmailMessage
from pathlib import Path
from typing import reveal_type

from milter import Milter, Status
from milter.testing import MTA, Mailbox, MTAFactory, Sendmail

app = Milter("typed")


# ---- Right


def test_right(milter_mta: MTAFactory) -> None:
    with MTA(app, like="sendmail", raise_errors=False, timeout=None) as mta:
        result = mta.send(sender="", recipients="bob@mta.example", message=b"Subject: test\n\n")
        mta.send(recipients=[Mailbox("bob@mta.example", ("NOTIFY=NEVER",)), "eve@mta.example"], params=["SIZE=1"])
        mta.send(message=Path("mail.eml"), client=None, helo="client.example", macros={"i": "ABC"})
        mta.send(message=EmailMessage())
        with mta.connect(client="192.0.2.8") as session:
            session.send(message="Subject: test\n\n", macros={"auth_authen": "ann"})
            reveal_type(session)  # error: Revealed type is "milter.testing.mta.SMTPSession"
        with mta.client() as client:
            reveal_type(client)  # error: Revealed type is "milter.testing.client.Client"
    reveal_type(milter_mta(app, like=Sendmail))  # error: Revealed type is "milter.testing.mta.MTA"
    reveal_type(milter_mta("inet:3000@localhost", version=2).send())  # error: "milter.testing.result.Result"
    assert result.verdict is Status.ACCEPT
    assert b"X-Scanned" in result.message
    assert result.message == b"Subject: test\r\n\r\n"
    assert "X-Scanned" in result.headers
    strings: list[str] = [result.headers["X-Scanned"], result.reply, result.refused["bob@mta.example"]]
    perhaps: list[str | None] = [result.headers.get("X-Scanned"), result.quarantine, result.stage]
    assert strings == perhaps


# ---- Wrong


def test_wrong(milter_mta: MTAFactory) -> None:
    mta = milter_mta(app)
    mta.send("ann@client.example")  # error: Too many positional arguments for "send" of "MTA"
    mta.send(message=17)  # error: Argument "message" to "send" of "MTA" has incompatible type "int"
    mta.send(sendr="ann@client.example")  # error: Unexpected keyword argument "sendr" for "send" of "MTA"
    mta.send(recipients=[17])  # error: List item 0 has incompatible type "int"
    milter_mta(app, like=Milter)  # error: Argument "like" to "__call__" of "MTAFactory" has incompatible type
    text: str = mta.send().message  # error: expression has type "bytes", variable has type "str"
    assert text
    MTA(17)  # error: Argument 1 to "MTA" has incompatible type "int"
