# SPDX-License-Identifier: GPL-3.0-or-later
"""The programs in docs/ run, pass a type checker in strict mode, and do what their pages say."""

import hashlib
import http.server
import importlib
import inspect
import json
import re
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dkim
import pytest
from mypy import api

import milter
from docs import figures
from milter import Milter
from milter.testing import MTA, MTAFactory
from tests.filter_process import REPOSITORY
from tests.pages import DOCS, Block, blocks, programs

HELD_ELSEWHERE = {"testing.md", "tutorial.md"}  # test_docs_testing.py, test_tutorial.py
PAGES = sorted(page for page in DOCS.rglob("*.md") if page.name not in HELD_ELSEWHERE and programs(page))
ALL = [(page, block) for page in PAGES for block in programs(page)]

Load = Callable[[str, str], Milter]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    """The filter of a page: its blocks as files in a directory, of which one is imported there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    known = set(sys.modules)

    def load(page: str, module: str) -> Milter:
        for number, block in enumerate(programs(DOCS / page)):
            (tmp_path / (block.caption or f"block_{number}.py")).write_text(block.source)
        app = importlib.import_module(module).app
        assert isinstance(app, Milter)
        return app

    yield load
    for name in set(sys.modules) - known:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


# ---- All of them


@pytest.mark.parametrize(("page", "block"), ALL, ids=[f"{page.relative_to(DOCS)}:{block.line}" for page, block in ALL])
def test_each_program_is_a_filter(load: Load, page: Path, block: Block, tmp_path: Path) -> None:
    number = programs(page).index(block)
    app = load(str(page.relative_to(DOCS)), (block.caption or f"block_{number}.py").removesuffix(".py"))
    assert app.functions


def test_mypy_finds_nothing_in_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MYPYPATH", f"{REPOSITORY}:{REPOSITORY / 'stubs'}:{tmp_path}")
    monkeypatch.chdir(tmp_path)
    tutorial = [(DOCS / "tutorial.md", block) for block in programs(DOCS / "tutorial.md")]
    for page, block in ALL + tutorial:
        name = block.caption if page.stem == "combine" else f"{page.stem.replace('-', '_')}_{block.line}.py"
        (tmp_path / name).write_text(block.source)
    report, errors, status = api.run(
        ["--strict", "--python-executable", sys.executable, *sorted(path.name for path in tmp_path.glob("*.py"))]
    )
    assert (status, errors) == (0, ""), report


# ---- One by one


def test_the_first_page_guards_internal_addresses(load: Load, milter_mta: MTAFactory) -> None:
    result = milter_mta(load("index.md", "block_0")).send(recipients="boss@internal.example")
    assert result.reply == "550 5.7.1 internal addresses are not for you"


@pytest.fixture
def policy(load: Load, tmp_path: Path, milter_mta: MTAFactory) -> MTA:
    (tmp_path / "blocked.txt").write_text("Blocked.example\n")
    return milter_mta(load("howto/policy.md", "policy"))


def test_policy_refuses_who_is_on_the_list_unless_authenticated(policy: MTA) -> None:
    assert policy.send(sender="ann@BLOCKED.example").reply == "550 5.7.1 no mail from blocked.example"
    assert policy.send(sender="ann@blocked.example", macros={"auth_authen": "ann"}).accepted
    assert policy.send(sender="ann@client.example").accepted


def test_policy_refuses_liars_but_not_our_own(policy: MTA) -> None:
    assert policy.send(helo="localhost").stage == "helo"
    assert policy.send(helo="localhost", client="127.0.0.1").accepted


def test_policy_refuses_one_recipient_of_a_bounce(policy: MTA) -> None:
    result = policy.send(sender="", recipients=["list-a@mta.example", "bob@mta.example"])
    assert result.recipients == ["bob@mta.example"]


MAIL = b"From: ann@example.org\r\nTo: bob@mta.example\r\nSubject:  two  spaces\r\n\r\nHi.\r\n"


def test_the_signature_is_valid(
    load: Load, tmp_path: Path, milter_mta: MTAFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = load("howto/sign.md", "sign")
    for block in blocks(DOCS / "howto/sign.md"):
        for command in re.findall(r"^\$ (openssl .*)$", block.source, re.MULTILINE):
            run = subprocess.run(["sh", "-c", command], check=True, capture_output=True, text=True)
    public = run.stdout
    mta = milter_mta(app)
    signed = mta.send(sender="ann@example.org", message=MAIL)
    assert signed.message.startswith(b"DKIM-Signature:")

    def txt(name: bytes, timeout: int = 5) -> bytes:
        assert name == b"mail._domainkey.example.org."
        return f"v=DKIM1; p={public}".encode()

    assert dkim.verify(signed.message, dnsfunc=txt)
    assert not dkim.verify(signed.message.replace(b"two  spaces", b"three"), dnsfunc=txt)
    assert mta.send(sender="ann@client.example", message=MAIL).message == MAIL


def test_a_known_attachment_is_refused(load: Load, tmp_path: Path, milter_mta: MTAFactory) -> None:
    (tmp_path / "sha256.txt").write_text(hashlib.sha256(b"harmful").hexdigest() + "\n")
    mta = milter_mta(load("howto/scan.md", "known"))
    head = b"Content-Type: application/octet-stream\nContent-Transfer-Encoding: base64\n\n"
    assert mta.send(message=head + b"aGFybWZ1bA==\n").code == 554
    assert mta.send(message=head + b"aGFybWxlc3M=\n").accepted


class Judge(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        scores = {"good": b'{"score": 0.25}', "bad": b'{"score": 0.99}', "bad?": b'{"score": 0.98}'}
        score = scores.get(asked["subject"], b"what?")
        self.send_response(200)
        self.send_header("Content-Length", str(len(score)))
        self.end_headers()
        self.wfile.write(score)

    def log_message(self, format: str, *arguments: object) -> None: ...


def test_a_web_service_judges(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Judge) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        monkeypatch.setenv("SERVICE", f"http://127.0.0.1:{server.server_port}")
        with MTA(load("howto/web-service.md", "ask")) as mta:
            results = [mta.send(message=f"Subject: {subject}\n\n") for subject in ("good", "bad", "broken")]
            stray = mta.send(sender="\udcff@client.example", message=b"Subject: bad\xff\n\n")
        server.shutdown()
    assert results[0].headers["X-Score"] == "0.25"
    assert results[1].reply == "550 5.7.1 this looks like spam"
    assert results[2].accepted
    assert "X-Score" not in results[2].headers
    assert stray.reply == "550 5.7.1 this looks like spam"


def test_senders_are_counted_in_a_file(load: Load, tmp_path: Path) -> None:
    with MTA(load("howto/greylist.md", "block_0")) as mta:
        for _ in range(3):
            mta.send(sender="ann@client.example")
    connection = sqlite3.connect(tmp_path / "senders.db")
    assert connection.execute("SELECT * FROM seen").fetchall() == [("ann@client.example", 3)]
    connection.close()


def test_two_filters_work_as_one(load: Load, milter_mta: MTAFactory) -> None:
    mta = milter_mta(load("howto/combine.md", "both"))
    assert mta.send(helo="localhost").rejected
    assert mta.send().headers["X-Second"] == "was here"


def test_what_came_from_pymilter_does_the_same(load: Load, milter_mta: MTAFactory) -> None:
    mta = milter_mta(load("howto/pymilter.md", "block_0"))
    assert mta.send(recipients="staff@mta.example").reply == "550 5.7.1 members only"
    assert mta.send(message=b"Subject: x\n\n1234567\n").headers["X-Size"] == "9"


def test_observed_fields_are_counted(load: Load, milter_mta: MTAFactory) -> None:
    result = milter_mta(load("explanation/no-reply.md", "block_0")).send(message=b"A: 1\nB: 2\n\n")
    assert result.headers["X-Fields"] == "2"


# ---- What the pages say of the library


def test_each_name_in_the_table_for_users_of_pymilter_exists() -> None:
    text = (DOCS / "howto/pymilter.md").read_text("utf-8").partition("## Names")[2].partition("\n## ")[0]
    columns = "\n".join(line.rsplit("|", 2)[1] for line in text.splitlines() if line.startswith("|"))
    owners = {"ctx": milter.EomContext, "message": milter.Message, "Status": milter.Status, "Milter": milter.Milter}
    named = re.findall(r"`(ctx|message|Status|Milter)\.(\w+)", columns)
    assert len(named) > 15
    assert [f"{owner}.{name}" for owner, name in named if not hasattr(owners[owner], name)] == []
    assert [name for name in re.findall(r"`(on_\w+)`", columns) if not hasattr(Milter, name)] == []
    options = inspect.signature(Milter).parameters
    assert [name for name in re.findall(r"`Milter\((\w+)=", columns) if name not in options] == []


def test_the_reference_names_each_public_name() -> None:
    text = "\n".join(page.read_text("utf-8") for page in (DOCS / "reference").glob("*.md"))
    named = set(re.findall(r"^\.\. auto\w+:: (?:milter\.)?(\w+)$", text, re.MULTILINE))
    assert sorted(set(milter.__all__) - named - {"__version__"}) == []
    decorators = {name for name in vars(Milter) if name.startswith("on_")}
    assert sorted(decorators - set(re.findall(r"^\.\. autoproperty:: Milter\.(\w+)$", text, re.MULTILINE))) == []


def test_each_page_is_in_the_navigation() -> None:
    index = (DOCS / "index.md").read_text("utf-8")
    named = {f"{line.strip()}.md" for line in index.splitlines() if re.fullmatch(r"[a-z/-]+", line.strip())}
    pages = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md") if "_build" not in page.parts}
    assert sorted(pages - named - {"index.md"}) == []


def test_each_filter_has_a_page_with_all_of_its_settings() -> None:
    for page in (DOCS / "filters").glob("*.md"):
        text = page.read_text("utf-8")
        for name in re.findall(r"literalinclude\} /\.\./(examples/\w+\.py)", text):
            settings = set(re.findall(r'environ\.get\("(\w+)"', (REPOSITORY / name).read_text("utf-8")))
            assert settings
            assert sorted(setting for setting in settings if f"`{setting}" not in text) == []


def test_the_figures_are_those_of_the_results(tmp_path: Path) -> None:
    shown = figures.substitutions()
    results: dict[str, Any] = json.loads(figures.RESULTS.read_text())
    measured = results["scenarios"]["each-8"]["results"]["milter-message"]
    assert f"{measured['median']['per_second']:,.0f}" in shown["rates_each_8"]
    for one in measured["rounds"]:
        one["per_second"] *= 2
    other = tmp_path / "results.json"
    other.write_text(json.dumps(results))
    assert float(figures.substitutions(other)["ratio_c"]) == pytest.approx(2 * float(shown["ratio_c"]), abs=0.11)


def test_no_figure_of_the_benchmark_is_typed() -> None:
    text = (DOCS / "explanation/speed.md").read_text("utf-8")
    assert re.findall(r"\d[\d.,]* (?:times|messages)", text) == []
