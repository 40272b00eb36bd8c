# SPDX-License-Identifier: GPL-3.0-or-later
"""No spelling of an address is a way around a program in the documentation, the examples, or a docstring.

Each function there that compares addresses, logins or host names must be in `RULES`, in `TESTED_BELOW`, or in
`HARMLESS` with a reason. Each rule meets, in real conversations, all that ``tests/spellings.py`` has.
"""

import doctest
import importlib
import pkgutil
import re
import sqlite3
import subprocess
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import spf

import milter
from examples import footer, greylist
from milter import Address, Milter
from milter.testing import (
    MTA,
    ClientAddress,
    Command,
    Envelope,
    Mailbox,
    Message,
    Quarantine,
    Session,
    Transcript,
    Verdict,
)
from tests.comparisons import comparing
from tests.filter_process import REPOSITORY
from tests.pages import DOCS, programs
from tests.spellings import (
    DELIVERED,
    DELIVERED_BY_POSTFIX,
    DELIVERED_BY_SENDMAIL,
    FOLDED,
    LOOKALIKES,
    MAILBOX,
    MAPPED,
    NEIGHBOURS,
    NULL,
    QUOTED_AS_A_WHOLE,
    REWRITTEN,
    REWRITTEN_BY_POSTFIX,
    ROUTED,
    spelt,
)

# ---- All programs


def programs_of_pages() -> Iterator[tuple[str, str]]:
    """Those of the documentation but its tests, by page and caption or number; a later version gets a ``'``."""
    names: set[str] = set()
    for page in (REPOSITORY / "README.md", *sorted(DOCS.rglob("*.md"))):
        for number, block in enumerate(programs(page)):
            own = re.match(r"# (\w+\.py)\n", block.source)
            name = f"{page.relative_to(REPOSITORY)}:{block.caption or (own[1] if own else number)}"
            if ":test_" not in name:
                name += "'" if name in names else ""
                names.add(name)
                yield name, block.source


def programs_of_folders() -> Iterator[tuple[str, str]]:
    for folder in ("examples", "benchmarks/filters"):
        for path in sorted((REPOSITORY / folder).glob("*.py")):
            yield str(path.relative_to(REPOSITORY)), path.read_text("utf-8")


def programs_of_docstrings() -> Iterator[tuple[str, str]]:
    """By the name of what they are in; all run within its module, as doctest runs them."""
    finder, parser = doctest.DocTestFinder(), doctest.DocTestParser()
    names = [found.name for found in pkgutil.walk_packages(milter.__path__, "milter.")]
    for module in sorted({"milter", "pytest_milter", *names} - {"milter.__main__"}):
        for found in finder.find(importlib.import_module(module), module):
            examples = parser.get_examples(found.docstring or "")
            yield found.name, "".join(example.source for example in examples)


PROGRAMS = {**dict(programs_of_pages()), **dict(programs_of_folders()), **dict(programs_of_docstrings())}


# ---- How a rule is tried


class Verbatim(Mailbox):
    """An argument of MAIL or RCPT just as it stands."""

    __slots__ = ()

    @property
    def path(self) -> str:
        return self.address


ANN = Mailbox("ann@client.example")
BOB = Mailbox("bob@mta.example")
MAIL = Message.parse(b"From: ann@client.example\r\nTo: bob@mta.example\r\nSubject: hello\r\n\r\nHi.\r\n")


def sent(app: Milter, envelopes: Sequence[Envelope], session: Session | None = None) -> list[Transcript]:
    """What became of a message to each of them, in one SMTP session."""
    with MTA(app) as mta, mta.connect() as connection:
        return [connection.client.send_message(envelope, MAIL, session) for envelope in envelopes]


def from_each(spellings: Sequence[str]) -> list[Envelope]:
    return [Envelope(Verbatim(spelling), (BOB,)) for spelling in spellings]


def to_each(spellings: Sequence[str]) -> list[Envelope]:
    return [Envelope(ANN, (Verbatim(spelling),)) for spelling in spellings]


def refused(transcript: Transcript, stage: Command) -> bool:
    answer = transcript.of(stage)[0].answer
    return answer is not None and answer.verdict in (Verdict.REPLY, Verdict.REJECT)


Judge = Callable[[Milter, Sequence[str]], list[bool]]
"""For each spelling, whether the filter takes it for the mailbox that the rule is about."""


def sender_is_refused(app: Milter, spellings: Sequence[str]) -> list[bool]:
    return [refused(transcript, Command.MAIL) for transcript in sent(app, from_each(spellings))]


def recipient_is_refused(app: Milter, spellings: Sequence[str]) -> list[bool]:
    nameless = Session(macros={"{client_ptr}": "unknown"})
    return [refused(transcript, Command.RCPT) for transcript in sent(app, to_each(spellings), nameless)]


def message_is_changed(app: Milter, spellings: Sequence[str]) -> list[bool]:
    ends = [transcript.end for transcript in sent(app, from_each(spellings))]
    return [end is not None and bool(end.changes) for end in ends]


def message_to_it_is_changed(app: Milter, spellings: Sequence[str]) -> list[bool]:
    ends = [transcript.end for transcript in sent(app, to_each(spellings))]
    return [end is not None and bool(end.changes) for end in ends]


def login_may_send(app: Milter, spellings: Sequence[str]) -> list[bool]:
    ann = Session(macros={"{auth_authen}": "ann", "{auth_type}": "PLAIN"})
    return [not refused(transcript, Command.MAIL) for transcript in sent(app, from_each(spellings), ann)]


def sender_is_counted_as_the_same(app: Milter, spellings: Sequence[str]) -> list[bool]:
    """In a database in the working directory, which has seen the first already."""
    known = spelt(DELIVERED[0], ANN.address)
    rows = []
    with MTA(app) as mta, mta.connect() as connection, sqlite3.connect("senders.db") as database:
        for spelling in (known, *spellings):
            connection.client.send_message(Envelope(Verbatim(spelling), (BOB,)), MAIL)
            rows.append(database.execute("SELECT messages FROM seen WHERE sender = ?", (ANN.address,)).fetchone())
    database.close()
    return [after > before for before, after in pairwise(rows)]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def greylisted(envelope: Callable[[Mailbox], Envelope], known: str) -> Judge:
    """Whether a client that came with the known spelling first is let in with the other one, after the delay."""

    def judge(app: Milter, spellings: Sequence[str]) -> list[bool]:
        clock = Clock()
        settings = greylist.Settings(store=":memory:")
        with MTA(greylist.filter_with(settings, clock)) as mta:
            return [let_in(mta, clock, number, spelling) for number, spelling in enumerate(spellings)]

    def let_in(mta: MTA, clock: Clock, number: int, spelling: str) -> bool:
        # Each from a network of its own: one that was let in is known.
        client = f"198.{number // 250}.{number % 250}.1"
        with mta.connect(client=client) as connection:
            session = Session(address=ClientAddress.of(client))
            clock.now = 0.0
            connection.client.send_message(envelope(Verbatim(spelt(DELIVERED[0], known))), MAIL, session)
            clock.now = 301.0
            second = connection.client.send_message(envelope(Verbatim(spelling)), MAIL, session)
        return not refused(second, Command.RCPT)

    return judge


def disowned(query: Any) -> tuple[str, int, str]:
    """What SPF says without a name server: one domain disowns the client, and no other."""
    return ("fail", 550, "no") if query.o == "client.example" else ("none", 250, "")


# ---- The rules


@dataclass(frozen=True)
class Rule:
    """What a function does with mail from or to a mailbox."""

    mailbox: str
    judge: Judge
    whole_domain: bool = False
    """It is about all mailboxes of the domain."""
    complete: bool = False
    """It refuses, too, what does not say by itself whose mailbox it is."""


INTERNAL = Rule("boss@internal.example", recipient_is_refused, whole_domain=True, complete=True)
STAFF = Rule("staff@mta.example", recipient_is_refused)
GREYLISTED_SENDER = Rule("ann@client.example", greylisted(lambda one: Envelope(one, (BOB,)), "ann@client.example"))
GREYLISTED_RECIPIENT = Rule("bob@mta.example", greylisted(lambda one: Envelope(ANN, (one,)), "bob@mta.example"))

RULES: dict[str, tuple[Rule, ...]] = {
    "README.md:0 no_strangers": (INTERNAL,),
    "docs/index.md:0 no_strangers": (INTERNAL,),
    "docs/testing.md:guard.py no_strangers": (INTERNAL,),
    "examples/guard.py no_strangers": (INTERNAL,),
    "docs/tutorial.md:guard.py members_only": (STAFF,),
    "docs/tutorial.md:guard.py' members_only": (STAFF,),
    "docs/howto/pymilter.md:0 members_only": (STAFF,),
    "docs/howto/policy.md:policy.py not_from_them": (Rule("eve@blocked.example", sender_is_refused, True),),
    "docs/howto/sign.md:sign.py sign": (Rule("ann@example.org", message_is_changed, True),),
    "docs/howto/greylist.md:0 count": (Rule("ann@client.example", sender_is_counted_as_the_same),),
    "docs/howto/addresses.md:addresses.py only_in_their_own_name": (
        Rule("eve@internal.example", sender_is_refused, True),
        Rule("ann@internal.example", login_may_send),
    ),
    "docs/howto/addresses.md:addresses.py keep_the_boss_from_strangers": (
        Rule("boss@internal.example", recipient_is_refused),
    ),
    "examples/footer.py is_meant": (Rule("ann@example.org", message_is_changed, True),),
    "examples/greylist.py greet": (GREYLISTED_SENDER, GREYLISTED_RECIPIENT),
    "examples/greylist.py seconds_to_wait": (GREYLISTED_SENDER, GREYLISTED_RECIPIENT),
    "examples/spf_check.py check": (Rule("ann@client.example", sender_is_refused, True),),
    "examples/spf_check.py mailbox": (Rule("ann@client.example", sender_is_refused, True),),
    "milter.app.Milter no_relay": (Rule("ann@example.net", recipient_is_refused, True),),
    "milter.message.Message tag": (Rule("list@mta.example", message_to_it_is_changed),),
    "milter.testing.mta.MTA guard": (Rule("boss@mta.example", recipient_is_refused),),
    "milter.context.Context protect": (Rule("boss@mta.example", recipient_is_refused),),
}

TESTED_BELOW = {
    "docs/howto/policy.md:policy.py no_liars": "test_a_host_name_may_be_written_otherwise",
    "docs/howto/combine.md:first.py no_localhost": "test_a_host_name_may_be_written_otherwise",
    "milter greet": "test_a_host_name_may_be_written_otherwise",
    "docs/howto/policy.md:policy.py no_bounces_for_lists": "test_a_bounce_is_one_however_its_sender_is_written",
    "milter.context.EomContext mark": "test_a_bounce_is_one_however_its_sender_is_written",
}

HARMLESS = {
    "docs/howto/web-service.md:ask.py ask": "it tells the addresses to a service, and compares the service's answer",
    "milter.addresses.Address ": "it shows what is equal",
    "milter.message.Recipients ": "it takes away what it was given just before",
}
"""Found, and no comparison."""

CASES = [(name, rule) for name, rules in RULES.items() for rule in rules]
IDS = [f"{name} {rule.judge.__name__}" for name, rule in CASES]


Load = Callable[[str], Milter]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """The filter in which a function is."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "blocked.txt").write_text("blocked.example\n")

    def load(name: str) -> Milter:
        program = name.rpartition(" ")[0]
        match program:
            case "docs/howto/sign.md:sign.py":
                key = ("openssl", "genrsa", "-out", "mail.key", "1024")
                subprocess.run(key, check=True, capture_output=True)
            case "examples/footer.py":
                return footer.filter_with(footer.Settings("Bye.\n", domains=frozenset({"example.org"})))
            case "examples/spf_check.py":
                monkeypatch.setattr(spf.query, "check", disowned)
                monkeypatch.setattr(spf.query, "get_header", lambda *_: "a field")
        names = {**namespace(program), "__name__": "program"}
        exec(compile(PROGRAMS[program], program, "exec"), names)
        app = names.get("app") or Milter("of a function")
        assert isinstance(app, Milter)
        if not app.functions:
            app.on_message(names[name.rpartition(" ")[2]])
        return app

    return load


def namespace(program: str) -> dict[str, Any]:
    """What a docstring sees without importing it; a page and a file see nothing."""
    parts = program.split(".")
    known = [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
    return dict(vars(next((sys.modules[name] for name in known if name in sys.modules), types.ModuleType("none"))))


# ---- The tests


HANDLER = "@app.on_rcpt\ndef rule(ctx, recipient, params):\n    sender = ctx.sender\n    {}"
COMPARING = (
    'if recipient == "boss@mta.example": ...',
    'if recipient.endswith("@mta.example"): ...',
    'if recipient in ("boss@mta.example",): ...',
    'domain = sender.rpartition("@")[2]',
    "allowed = sender in known",
    "key = (ctx.sender, recipient)\n    if key in seen: ...",
    "seen[recipient] += 1",
    "limit = limits.get(sender, 10)",
    're.search("@mta.example$", recipient)',
    'fnmatch.fnmatch(sender, "*@mta.example")',
    'return Status.ACCEPT if recipient.matches("mta.example") else None',
    "if not ctx.sender: ...",
    "return ctx.login and Status.ACCEPT",
    'if ctx.macros.get("{auth_authen}"): ...',
    'if ctx.macros["{rcpt_addr}"] == "boss@mta.example": ...',
    'ours = [each for each in ctx.recipients if "mta.example" in each]',
    'store.execute("SELECT 1 FROM seen WHERE sender = ?", (sender,))',
)
NOT_COMPARING = (
    'print(f"{sender} wrote to {recipient}")',
    "if len(ctx.recipients) > 10: ...",
    "if ctx.sender is None: ...",
    "ctx.transaction.append(recipient)",
    'ctx.remove_recipient("bob@mta.example")',
    'if params["SIZE"] == "10": ...',
    'if ctx.macros.get("i") == "A1": ...',
)


@pytest.mark.parametrize("statement", COMPARING)
def test_a_comparison_is_found(statement: str) -> None:
    assert comparing(HANDLER.format(statement)) == ["rule"]
    other_name = re.sub(r"\brecipient\b", "to", statement)
    assert comparing(f"@app.on_rcpt\nasync def rule(ctx, to, sender):\n    {other_name}") == ["rule"]


@pytest.mark.parametrize("statement", NOT_COMPARING)
def test_what_compares_nothing_is_not(statement: str) -> None:
    assert comparing(HANDLER.format(statement)) == []


def test_each_function_that_compares_is_known() -> None:
    found = {f"{program} {name}" for program, source in PROGRAMS.items() for name in comparing(source)}
    known = [*RULES, *TESTED_BELOW, *HARMLESS]
    assert sorted(found - set(known)) == [], "add them to RULES, so that no spelling passes them"
    assert sorted(set(known) - found) == []
    assert len(known) == len(set(known))
    assert [test for test in TESTED_BELOW.values() if test not in globals()] == []


@pytest.mark.parametrize(("name", "rule"), CASES, ids=IDS)
def test_every_spelling_is_the_same_mailbox(load: Load, name: str, rule: Rule) -> None:
    as_recipient = rule.judge is recipient_is_refused
    spellings = [*DELIVERED, *REWRITTEN, *(QUOTED_AS_A_WHOLE if as_recipient else ())]
    assert wrong(load(name), rule, spellings, True) == []


@pytest.mark.parametrize(("name", "rule"), CASES, ids=IDS)
def test_what_looks_like_it_is_not(load: Load, name: str, rule: Rule) -> None:
    lookalikes = [spelling for spelling in LOOKALIKES if not rule.complete or Address(spelling).complete]
    assert wrong(load(name), rule, lookalikes, False) == []


@pytest.mark.parametrize("name", [name for name, rules in RULES.items() if INTERNAL in rules])
def test_what_a_server_may_take_for_it_is_refused_and_the_postmaster_is_not(load: Load, name: str) -> None:
    app = load(name)
    assert recipient_is_refused(app, ROUTED) == [True] * len(ROUTED)
    assert recipient_is_refused(app, ["<postmaster>", "<PostMaster>"]) == [False, False]


@pytest.mark.parametrize(("name", "rule"), CASES, ids=IDS)
def test_neighbours_are_of_the_same_domain_only(load: Load, name: str, rule: Rule) -> None:
    assert wrong(load(name), rule, NEIGHBOURS, rule.whole_domain) == []


WHOLE = re.compile(r".*boss.*internal.*example")
"""The words can be replaced by others."""
REFUSALS = [(name, rule) for name, rule in CASES if rule.judge in (sender_is_refused, recipient_is_refused)]


@pytest.mark.parametrize(("name", "rule"), REFUSALS, ids=[name for name, _ in REFUSALS])
def test_what_only_one_server_delivers_is_refused_as_well(load: Load, name: str, rule: Rule) -> None:
    spellings = [*DELIVERED_BY_POSTFIX, *DELIVERED_BY_SENDMAIL, *FOLDED, *MAPPED]
    if rule.mailbox != MAILBOX:
        spellings = [spelling for spelling in spellings if WHOLE.match(spelling)]
    assert wrong(load(name), rule, spellings, True) == []


def wrong(app: Milter, rule: Rule, spellings: Sequence[str], expected: bool) -> list[str]:
    """Those that the filter does not take as it should."""
    written = [spelt(spelling, rule.mailbox) for spelling in spellings]
    return [text for text, hit in zip(written, rule.judge(app, written), strict=True) if hit is not expected]


def test_a_bounce_is_one_however_its_sender_is_written(load: Load) -> None:
    policy = load("docs/howto/policy.md:policy.py no_bounces_for_lists")
    lists = [
        Envelope(Verbatim(null), (Verbatim(spelt(one, "list-a@mta.example")),))
        for null in NULL
        for one in DELIVERED[:3]
    ]
    lists += [Envelope(Verbatim("<>"), (Verbatim(spelt(one, "list-a@mta.example")),)) for one in DELIVERED]
    others = [Envelope(Verbatim(null), (BOB,)) for null in NULL] + to_each([spelt(DELIVERED[0], "list-a@mta.example")])
    assert all(refused(transcript, Command.RCPT) for transcript in sent(policy, lists))
    assert not any(refused(transcript, Command.RCPT) for transcript in sent(policy, others))
    held = [transcript.end for transcript in sent(load("milter.context.EomContext mark"), from_each(NULL))]
    assert all(end is not None and any(isinstance(change, Quarantine) for change in end.changes) for end in held)


@pytest.mark.parametrize("name", sorted(name for name, test in TESTED_BELOW.items() if "host_name" in test))
def test_a_host_name_may_be_written_otherwise(load: Load, name: str) -> None:
    app = load(name)
    with MTA(app) as mta:
        liars = [mta.send(helo=helo) for helo in ("localhost", "LOCALHOST", "Localhost", "localhost.", "LOCALHOST.")]
        others = [
            mta.send(helo=helo) for helo in ("localhost.client.example", "notlocalhost", "localhos", "client.example")
        ]
    assert all(result.rejected for result in liars)
    assert all(result.accepted for result in others)


def test_what_the_servers_rewrite_is_found_in_their_macro(load: Load) -> None:
    app = load("docs/howto/addresses.md:addresses.py keep_the_boss_from_strangers")
    macros = {Command.RCPT: {"{rcpt_addr}": "boss@internal.example"}}
    transcripts = sent(app, to_each([*REWRITTEN, *REWRITTEN_BY_POSTFIX]), Session(stage_macros=macros))
    assert all(refused(transcript, Command.RCPT) for transcript in transcripts)
