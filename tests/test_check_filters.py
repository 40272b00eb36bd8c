# SPDX-License-Identifier: GPL-3.0-or-later
"""The command ``milter check`` against filters of this library, through libmilter: what they see, what is shown."""

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from milter import Context, EomContext, Message, Milter, Params, Reply, Status
from milter.checker import add_arguments, main
from tests.conftest import Serve

Run: TypeAlias = Callable[..., int]


@pytest.fixture
def run(serve: Serve) -> Run:
    """Serve a filter and run the command on it; messages and options follow the filter."""

    def check(app: Milter[Any, Any], *arguments: str | Path) -> int:
        parser = argparse.ArgumentParser(prog="milter check")
        add_arguments(parser)
        return main(parser.parse_args([serve(app).server.socket, *map(str, arguments)]))

    return check


def mail(directory: Path, name: str, data: bytes = b"Subject: hello\r\n\r\ntext\r\n") -> Path:
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def silent() -> Milter[Any, Any]:
    """It has nothing to say."""
    app = Milter("silent")

    @app.on_eom
    def at_the_end(ctx: EomContext) -> Status:
        return Status.CONTINUE

    return app


def judge() -> Milter[Any, Any]:
    """It does what the subject says."""
    app = Milter("judge")
    answers: dict[str, Status | Reply] = {
        "accept": Status.ACCEPT,
        "discard": Status.DISCARD,
        "reject": Reply(554, "5.7.1", "not wanted"),
        "defer": Reply(451, "4.7.1", "later"),
    }

    @app.on_header
    def on_header(ctx: Context, name: str, value: str) -> Status | Reply:
        return answers.get(value, Status.CONTINUE)

    return app


def documents(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


# ---- what the filter is told


class Notes:
    """A filter that writes down macros and parameters."""

    def __init__(self, **wanted: list[str]) -> None:
        self.macros: dict[str, dict[str, str]] = {}
        self.params: list[list[str]] = []
        self.recipients: list[str] = []
        self.version_has_data = False
        app = self.app = Milter("notes")

        @app.on_connect(macros=wanted.get("connect", []))
        def on_connect(ctx: Context, hostname: str, address: object) -> Status:
            return self.note("connect", ctx)

        @app.on_helo
        def on_helo(ctx: Context, name: str) -> Status:
            return self.note("helo", ctx)

        @app.on_mail
        def on_mail(ctx: Context, sender: str, params: Params) -> Status:
            self.params.append(list(params.raw))
            return self.note("mail", ctx)

        @app.on_rcpt
        def on_rcpt(ctx: Context, recipient: str, params: Params) -> Status:
            self.params.append(list(params.raw))
            self.recipients.append(recipient)
            return self.note("rcpt", ctx)

        @app.on_data
        def on_data(ctx: Context) -> Status:
            self.version_has_data = True
            return self.note("data", ctx)

        @app.on_eom
        def on_eom(ctx: EomContext) -> Status:
            return self.note("eom", ctx)

    def note(self, stage: str, ctx: Context) -> Status:
        # Names that the library does not know are found when they are asked for, not listed.
        others = {name: ctx.macros[name] for name in ("{rare}", "{late}") if name in ctx.macros}
        self.macros[stage] = {**ctx.macros, **others}
        return Status.CONTINUE


def test_parameters_of_sender_and_recipients_reach_the_filter(run: Run) -> None:
    notes = Notes()
    arguments = ["--mail-param", "SIZE=1000", "--mail-param", "SMTPUTF8", "--rcpt-param", "NOTIFY=NEVER"]
    assert run(notes.app, *arguments, "--to", "a@x.example", "--to", "<b@x.example>") == 0
    assert notes.params == [["SIZE=1000", "SMTPUTF8"], ["NOTIFY=NEVER"], ["NOTIFY=NEVER"]]
    assert notes.recipients == ["a@x.example", "b@x.example"]


def test_tls_and_a_login_have_their_macros_at_their_stages(run: Run) -> None:
    notes = Notes()
    assert run(notes.app, "--tls", "--auth", "ann") == 0
    assert "{tls_version}" not in notes.macros["connect"]
    assert notes.macros["helo"]["{tls_version}"] == "TLSv1.3"
    assert notes.macros["helo"]["{cipher_bits}"] == "256"
    assert "{auth_authen}" not in notes.macros["helo"]
    assert notes.macros["mail"]["{auth_authen}"] == "ann"
    assert notes.macros["mail"]["{auth_type}"] == "PLAIN"


def test_without_the_options_a_client_has_neither_tls_nor_a_login(run: Run) -> None:
    notes = Notes()
    assert run(notes.app) == 0
    assert not {"{tls_version}", "{cipher}", "{auth_authen}", "{auth_type}"} & notes.macros["eom"].keys()


def test_a_macro_goes_where_it_is_wanted_or_to_its_stage_or_to_connect(run: Run) -> None:
    notes = Notes()
    macros = ["auth_type=LOGIN", "{rare}=everywhere", "mail:late=1", "j=other.example", "data:nrcpts=7"]
    assert run(notes.app, *(text for macro in macros for text in ("--macro", macro))) == 0
    assert notes.macros["connect"]["{rare}"] == "everywhere"
    assert notes.macros["connect"]["j"] == "other.example"
    assert "{auth_type}" not in notes.macros["helo"]
    assert notes.macros["mail"]["{auth_type}"] == "LOGIN"
    assert "{late}" not in notes.macros["helo"]
    assert notes.macros["mail"]["{late}"] == "1"
    assert "{nrcpts}" not in notes.macros["rcpt"]
    assert notes.macros["data"]["{nrcpts}"] == "7"


def test_a_macro_of_a_stage_is_stronger_than_the_usual_one(run: Run) -> None:
    notes = Notes(connect=["{client_addr}"])
    assert run(notes.app, "--auth", "ann", "--macro", "mail:auth_authen=eve", "--macro", "client_addr=192.0.2.99") == 0
    assert notes.macros["mail"]["{auth_authen}"] == "eve"
    assert notes.macros["connect"]["{client_addr}"] == "192.0.2.99"


def test_sendmail_has_other_macros_than_postfix(run: Run) -> None:
    notes = Notes()
    assert run(notes.app, "--mta", "sendmail", "--tls") == 0
    assert notes.macros["connect"]["{if_name}"] == "mta.example"
    assert notes.macros["helo"]["{cert_subject}"] == ""
    assert notes.macros["mail"]["i"] == "4AMC0001000001"
    assert notes.macros["mail"]["{mail_mailer}"] == "relay"


def test_postfix_knows_no_queue_id_at_mail(run: Run) -> None:
    notes = Notes()
    assert run(notes.app) == 0
    assert "i" not in notes.macros["mail"]
    assert "i" in notes.macros["data"]


def test_the_offer_is_that_of_the_mta_unless_another_one_is_named(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    notes = Notes()
    assert run(notes.app, "--mta", "sendmail", "--offer", "postfix", "--json") == 0
    assert "{if_name}" not in notes.macros["connect"]
    assert documents(capsys)[0]["negotiated"]["version"] == 6


def test_an_old_mta_offers_version_2_and_sends_no_data(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    notes = Notes()
    assert run(notes.app, "--offer", "v2", "--json") == 0
    assert documents(capsys)[0]["negotiated"]["version"] == 2
    assert "eom" in notes.macros
    assert not notes.version_has_data


def test_an_old_mta_does_not_offer_stages_without_a_reply(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(editor(), "--offer", "v2", "--json") == 0
    assert "noreply_body" not in documents(capsys)[0]["negotiated"]["steps"]


# ---- what becomes of a message


def editor() -> Milter[Any, Any]:
    app = Milter("editor")

    @app.on_message
    def edit(ctx: EomContext, message: Message) -> None:
        message.headers["Subject"] = "changed"
        message.headers.add("X-New", "one\n two")
        message.body = message.body.replace(b"second", b"\xff\0\x1b[31m")
        message.recipients.add("eve@mta.example")
        message.sender = "new@client.example"

    return app


def test_what_would_change_is_a_unified_diff(run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(editor(), mail(tmp_path, "a.eml", b"Subject: hello\n\nfirst\nsecond\nthird\n")) == 0
    assert capsys.readouterr().out.partition("\n--- ")[2].splitlines() == [
        "envelope as sent",
        "+++ envelope as delivered",
        "@@ -1,2 +1,3 @@",
        "-MAIL FROM:<ann@client.example>",
        "+MAIL FROM:<new@client.example>",
        " RCPT TO:<bob@mta.example>",
        "+RCPT TO:<eve@mta.example>",
        "--- message as sent",
        "+++ message as delivered",
        "@@ -1,7 +1,9 @@",
        " Received: from client.example (client.example [192.0.2.1])",
        " \tby mta.example",
        "-Subject: hello",
        "+Subject: changed",
        "+X-New: one",
        "+ two",
        " ",
        " first",
        "-second",
        "+\\xff\\x00\\x1b[31m",
        " third",
    ]


def test_a_filter_that_changes_nothing_leaves_no_diff(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(silent()) == 0
    assert capsys.readouterr().out.endswith("\n\nnothing would change\n")


def test_no_diff_is_shown_of_what_is_not_delivered(
    run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run(judge(), mail(tmp_path, "a.eml", b"Subject: reject\n\n")) == 1
    output = capsys.readouterr().out
    assert "---" not in output
    assert "would change" not in output


def test_a_recipient_that_is_refused_is_gone_in_the_diff(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    app = Milter("refuse")

    @app.on_rcpt
    def on_rcpt(ctx: Context, recipient: str, params: Params) -> Status:
        return Status.REJECT if recipient.startswith("eve") else Status.CONTINUE

    assert run(app, "--to", "bob@mta.example", "--to", "eve@mta.example") == 0
    output = capsys.readouterr().out
    assert "-RCPT TO:<eve@mta.example>\n" in output
    assert " RCPT TO:<bob@mta.example>\n" in output


def test_the_document_of_a_message_has_all_its_keys(
    run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = mail(tmp_path, "a.eml", b"Subject: caf\xe9\n\nsecond\n")
    assert run(editor(), path, "--json", "--rcpt-param", "NOTIFY=NEVER") == 0
    (document,) = documents(capsys)
    assert document | {"stages": [], "diff": [], "negotiated": {}} == {
        "kind": "message",
        "message": str(path),
        "verdict": "accepted",
        "decided_at": None,
        "reply": ["250 2.0.0 Ok"],
        "refused_recipients": [],
        "quarantine": None,
        "error": None,
        "exit_code": 0,
        "negotiated": {},
        "stages": [],
        "changes": [
            {"action": "replace_sender", "sender": "<new@client.example>", "params": None},
            {"action": "add_recipient", "recipient": "<eve@mta.example>", "params": None},
            {"action": "add_header", "name": "X-New", "value": "one\n two"},
            {"action": "replace_header", "index": 1, "name": "Subject", "value": "changed"},
            {"action": "replace_body", "chunk": "\udcff\0\x1b[31m\r\n"},
        ],
        "progress": 0,
        "delivered": {
            "sender": {"address": "new@client.example", "params": []},
            "recipients": [
                {"address": "bob@mta.example", "params": ["NOTIFY=NEVER"]},
                {"address": "eve@mta.example", "params": []},
            ],
            "headers": [
                ["Received", "from client.example (client.example [192.0.2.1])\n\tby mta.example"],
                ["Subject", "changed"],
                ["X-New", "one\n two"],
            ],
            "body": "\udcff\0\x1b[31m\r\n",
        },
        "diff": [],
    }
    assert {"stage": "data", "argument": "", "sent": False, "answer": None} in document["stages"]
    assert document["stages"][-1] == {"stage": "end", "argument": "", "sent": True, "answer": "continue"}
    assert document["negotiated"].keys() == {"version", "actions", "steps"}
    assert "add_header" in document["negotiated"]["actions"]
    assert document["diff"][-2:] == ["-second", "+\\xff\\x00\\x1b[31m"]


def test_the_document_of_a_refused_message_says_where_and_what_the_client_is_told(
    run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run(judge(), mail(tmp_path, "a.eml", b"Subject: defer\n\n"), "--json") == 75
    (document,) = documents(capsys)
    assert (document["verdict"], document["decided_at"], document["exit_code"]) == ("deferred", "eoh", 75)
    assert document["reply"] == ["451 4.7.1 later"]
    assert document["delivered"] is None
    assert document["diff"] == []


def test_the_document_of_a_refused_recipient_has_its_reply(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    app = Milter("refuse")

    @app.on_rcpt
    def on_rcpt(ctx: Context, recipient: str, params: Params) -> Reply:
        return Reply(550, "5.1.1", "unknown")

    assert run(app, "--json") == 1
    (document,) = documents(capsys)
    assert document["refused_recipients"] == [{"recipient": "<bob@mta.example>", "reply": ["550 5.1.1 unknown"]}]
    assert (document["verdict"], document["decided_at"], document["reply"]) == ("rejected", None, [])


def test_the_leading_space_of_a_changed_header_is_not_shown(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(editor()) == 0
    assert "changes   replace sender <new@client.example>\n" in (output := capsys.readouterr().out)
    assert "add header X-New: one\\n two\n" in output


# ---- many messages


def test_a_directory_is_searched_for_messages_in_order(
    run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name in ("b.eml", "a/z.EML", "a/not.txt", "a/deep/c.eml"):
        mail(tmp_path, name)
    assert run(silent(), tmp_path, "--brief") == 0
    names = [str(tmp_path / name) for name in ("a/deep/c.eml", "a/z.EML", "b.eml")]
    assert capsys.readouterr().out == "".join(f"accepted  {name}\n" for name in names) + "3 messages: accepted 3\n"


@pytest.mark.parametrize(
    ("subjects", "code"),
    [
        (["accept", "discard"], 0),
        (["accept", "defer"], 75),
        (["reject", "defer", "accept"], 1),
    ],
)
def test_the_exit_code_of_many_is_the_worst(
    run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path, subjects: list[str], code: int
) -> None:
    paths = [mail(tmp_path, f"{subject}.eml", f"Subject: {subject}\n\n".encode()) for subject in subjects]
    assert run(judge(), *paths) == code
    output = capsys.readouterr().out
    assert [line[3:] for line in output.splitlines() if line.startswith("== ")] == [str(path) for path in paths]
    assert output.splitlines()[-1].startswith(f"{len(subjects)} messages: ")


def test_a_message_that_cannot_be_read_is_told_and_the_others_are_sent(
    run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    good = mail(tmp_path, "good.eml")
    assert run(judge(), tmp_path / "none.eml", good, "--brief") == 2
    captured = capsys.readouterr()
    assert captured.out == f"failed    {tmp_path}/none.eml\naccepted  {good}\n2 messages: accepted 1, failed 1\n"
    assert captured.err == f"milter check: {tmp_path}/none.eml cannot be read: No such file or directory\n"


def test_brief_says_why_a_message_is_refused(run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = mail(tmp_path, "a.eml", b"Subject: reject\n\n")
    assert run(judge(), path, "--brief") == 1
    assert capsys.readouterr().out == f"rejected  {path}: 554 5.7.1 not wanted\n"


def test_each_message_has_a_document_the_bad_ones_too(
    run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run(silent(), mail(tmp_path, "a.eml"), mail(tmp_path, "b.eml", b""), "--json") == 2
    good, bad = documents(capsys)
    assert good.keys() == bad.keys()
    assert (bad["verdict"], bad["exit_code"], bad["error"]) == (None, 2, f"{tmp_path}/b.eml is empty")


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "is empty"),
        (b"\x89PNG\r\n", "is not a message"),
        (b"just text\n", "is not a message"),
        (b"\xef\xbb\xbfSubject: x\n\n", "is not a message"),
    ],
)
def test_what_is_no_message_is_not_sent(
    run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path, data: bytes, problem: str
) -> None:
    notes = Notes()
    assert run(notes.app, mail(tmp_path, "a.eml", data)) == 2
    assert f"{tmp_path}/a.eml {problem}" in capsys.readouterr().err
    assert notes.macros == {}


def test_a_directory_without_messages_is_told(run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    mail(tmp_path, "mails/a.txt")
    assert run(silent(), tmp_path / "mails") == 2
    assert capsys.readouterr().err == (
        f"milter check: {tmp_path}/mails is a directory without a file named *.eml in it, or below it\n"
    )


# ---- unusual bytes


def seen(run: Run, tmp_path: Path, data: bytes, *arguments: str) -> tuple[bytes, int]:
    """The message as the filter saw it, and the exit code."""
    app = Milter("seen")
    messages: list[bytes] = []

    @app.on_message
    def see(ctx: EomContext, message: Message) -> None:
        messages.append(message.as_bytes())

    code = run(app, mail(tmp_path, "a.eml", data), *arguments)
    return b"".join(messages), code


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"])
def test_line_ends_of_a_file_do_not_matter(run: Run, tmp_path: Path, line_end: bytes) -> None:
    data = line_end.join([b"A: 1", b"\tfold", b"B: 2", b"", b"one", b".", b"last"])
    assert seen(run, tmp_path, data) == (b"A: 1\r\n\tfold\r\nB: 2\r\n\r\none\r\n.\r\nlast\r\n", 0)


def test_eight_bits_and_nul_in_the_body_are_kept(run: Run, tmp_path: Path) -> None:
    assert seen(run, tmp_path, b"A: \xe9\n\n\0\xff\n") == (b"A: \xe9\r\n\r\n\0\xff\r\n", 0)


def test_postfix_makes_a_space_of_a_bare_cr_and_cuts_a_header_at_nul(run: Run, tmp_path: Path) -> None:
    data = b"A: one\rtwo\nB: x\0y\n\nthree\rfour\n"
    assert seen(run, tmp_path, data) == (b"A: one two\r\nB: x\r\n\r\nthree four\r\n", 0)


def test_sendmail_takes_a_nul_out_of_a_header(run: Run, tmp_path: Path) -> None:
    assert seen(run, tmp_path, b"B: x\0y\n\n\0\n", "--mta", "sendmail") == (b"B: xy\r\n\r\n\0\r\n", 0)


@pytest.mark.parametrize("data", [b"A: one\rtwo\n\n", b"A: 1\n\none\rtwo\n"])
def test_sendmail_refuses_a_bare_cr_itself(
    run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path, data: bytes
) -> None:
    assert seen(run, tmp_path, data, "--mta", "sendmail") == (b"", 2)
    assert "Sendmail itself refuses" in capsys.readouterr().err


# ---- measuring


def test_many_messages_over_many_connections_are_measured(
    run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for subject in ("accept", "reject"):
        mail(tmp_path, f"{subject}.eml", f"Subject: {subject}\n\n".encode())
    assert run(judge(), tmp_path, "--repeat", "20", "--connections", "4") == 1
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"messages  40 of 40 in \d+\.\d{3} s, over 4 connections at once", lines[0])
    assert re.fullmatch(r"rate      \d+\.\d messages/s", lines[1])
    assert re.fullmatch(r"latency   p50 \d+\.\d\d ms, p99 \d+\.\d\d ms, max \d+\.\d\d ms", lines[2])
    assert lines[3:] == ["verdicts  accepted 20, rejected 20"]


def test_what_was_measured_is_a_document(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(silent(), "--repeat", "3", "--json") == 0
    (document,) = documents(capsys)
    latency = document["latency_ms"]
    assert 0 < latency["p50"] <= latency["p99"] <= latency["max"] <= document["seconds"] * 1000
    assert document["messages_per_second"] == pytest.approx(3 / document["seconds"])
    figures = {"seconds": 0, "messages_per_second": 0, "latency_ms": {}}
    assert document | figures == figures | {
        "kind": "load",
        "messages": 3,
        "connections": 1,
        "verdicts": {"accepted": 3},
        "errors": {},
        "interrupted": False,
        "exit_code": 0,
    }


def test_each_message_that_is_measured_is_sent_as_often_as_asked(run: Run) -> None:
    notes = Notes()
    assert run(notes.app, "--repeat", "5", "--connections", "2") == 0
    assert len(notes.recipients) == 5


def test_nothing_is_measured_where_nobody_listens(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    parser = argparse.ArgumentParser(prog="milter check")
    add_arguments(parser)
    assert main(parser.parse_args([f"unix:{tmp_path}/none", "--repeat", "1000"])) == 2
    captured = capsys.readouterr()
    assert captured.out.startswith("messages  1 of 1000 in ")
    assert captured.err.count("is the filter running? (1 times)") == 1


def test_a_message_that_cannot_be_read_is_told_before_anything_is_measured(
    run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    notes = Notes()
    assert run(notes.app, mail(tmp_path, "a.eml"), tmp_path / "none.eml", "--repeat", "2") == 2
    assert "none.eml cannot be read" in capsys.readouterr().err
    assert notes.recipients == []


# ---- the documentation


@pytest.mark.parametrize(("table", "arguments"), [(0, []), (1, ["--repeat", "2"])])
def test_the_documentation_names_each_key(
    run: Run, capsys: pytest.CaptureFixture[str], table: int, arguments: list[str]
) -> None:
    text = (Path(__file__).parent.parent / "docs" / "check.md").read_text()
    keys = re.findall(r"^\| `(\w+)` \|", text.split("| key | value |")[table + 1], re.MULTILINE)
    assert run(silent(), "--json", *arguments) == 0
    assert list(documents(capsys)[0]) == keys
