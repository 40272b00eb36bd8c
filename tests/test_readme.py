# SPDX-License-Identifier: GPL-3.0-or-later
"""The programs in README.md run, and do what the text says."""

import re
import socketserver
import threading
from pathlib import Path

from milter import Milter
from milter.testing import AddHeader, Envelope, Message, Postfix, Result, Verdict
from tests.conftest import Serve, begin_message, send_content

README = Path(__file__).parent.parent / "README.md"


def source_of(number: int) -> str:
    sources: list[str] = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    return sources[number]


def program(number: int, scanner: str = "") -> Milter:
    source = source_of(number).replace("/run/scanner.sock", scanner)
    names: dict[str, object] = {"__name__": "readme"}
    exec(source, names)
    app = names["app"]
    assert isinstance(app, Milter)
    return app


def test_the_first_program_refuses_strangers_and_marks_what_passes(serve: Serve) -> None:
    client = serve(program(0)).greeted()
    client.mail("<ann@client.example>")
    answers = [client.rcpt("<boss@internal.example>"), client.rcpt("<bob@mta.example>")]
    client.data()
    end = send_content(client)
    assert [answer and answer.verdict for answer in answers] == [Verdict.REPLY, Verdict.CONTINUE]
    assert end.changes == (AddHeader("X-Guard", "ann@client.example wrote to 1"),)


def test_the_second_program_refuses_a_virus_and_marks_what_passes(serve: Serve) -> None:
    client = serve(program(1)).client()
    envelope = Envelope.of("ann@client.example", "bob@mta.example")
    headers = b"X-Spam: no\r\nSubject: test\r\n\r\n"
    clean = client.send_message(envelope, Message.parse(headers + b"text\r\n"))
    virus = client.send_message(envelope, Message.parse(headers + b"EICAR-STANDARD-ANTIVIRUS-TEST-FILE\r\n"))
    delivery = clean.delivery(Postfix(clean.negotiated.steps))
    assert [header.raw for header in delivery.without_trace().headers] == ["Subject: test", "X-Scanned: clean"]
    assert delivery.envelope == Envelope.of("ann@client.example", "bob@mta.example", "archive@mail.example")
    assert virus.end is not None
    assert (virus.end.answer.code, virus.end.answer.lines) == (554, ("virus found",))


class Scanner(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        self.wfile.write(b"bad" if b"virus" in self.rfile.read() else b"good")


def test_the_third_program_asks_a_scanner(serve: Serve, tmp_path: Path) -> None:
    with socketserver.ThreadingUnixStreamServer(f"{tmp_path}/scanner.sock", Scanner) as scanner:
        threading.Thread(target=scanner.serve_forever).start()
        client = serve(program(2, f"{tmp_path}/scanner.sock")).greeted()
        verdicts = []
        for body in (b"a text\r\n", b"a virus\r\n"):
            begin_message(client)
            verdicts.append(send_content(client, body).answer.verdict)
        scanner.shutdown()
    assert verdicts == [Verdict.CONTINUE, Verdict.REJECT]


def test_the_test_of_the_first_program_passes() -> None:
    names: dict[str, object] = {"app": program(0)}
    exec(source_of(3), names)
    assert isinstance(names["result"], Result)
    assert names["result"].rejected
