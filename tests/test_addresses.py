# SPDX-License-Identifier: GPL-3.0-or-later
"""Mail addresses: how they are read, compared, and checked before they are sent. The servers: tests/spellings.py."""

import pickle
import re
from collections.abc import Callable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from milter import Address, Context, EomContext, Message, Milter, Params, Status
from milter.content import MemoryContent
from milter.testing import AddRecipient, RemoveRecipient, ReplaceSender, Verdict
from tests.conftest import Serve
from tests.steps_of_addresses import steps

# ---- Reading


@pytest.mark.parametrize(
    ("raw", "text", "local", "domain"),
    [
        ("<ann@example.org>", "ann@example.org", "ann", "example.org"),
        ("<Ann@EXAMPLE.Org.>", "Ann@example.org", "Ann", "example.org"),
        ('< "Ann" @ (home) example.org >(x)', "Ann@example.org", "Ann", "example.org"),
        ('<"ann smith"@example.org>', '"ann smith"@example.org', "ann smith", "example.org"),
        (r'<"a\"n\\n"@example.org>', r'"a\"n\\n"@example.org', r"a\"n\n".replace('\\"', '"'), "example.org"),
        ('<"x>y"@sink.test>', '"x>y"@sink.test', "x>y", "sink.test"),
        ('<"a@b"@example.org>', '"a@b"@example.org', "a@b", "example.org"),
        ('<""@example.org>', '""@example.org', "", "example.org"),
        ("<@a.test,@b.test:ann@example.org>", "ann@example.org", "ann", "example.org"),
        ("<@[IPv6:::1]:ann@example.org>", "ann@example.org", "ann", "example.org"),
        ("<ann@[192.0.2.1]>", "ann@[192.0.2.1]", "ann", "[192.0.2.1]"),
        ("<ann@[IPv6:2001:DB8:0:0::1]>", "ann@[IPv6:2001:db8::1]", "ann", "[IPv6:2001:db8::1]"),
        ("<ann@[ipv6:nonsense]>", "ann@[ipv6:nonsense]", "ann", "[ipv6:nonsense]"),
        ("<änn@Bücher.example>", "änn@xn--bcher-kva.example", "änn", "xn--bcher-kva.example"),
        ("<ann@XN--BCHER-KVA.example>", "ann@xn--bcher-kva.example", "ann", "xn--bcher-kva.example"),
        ("<ann@bücher。example>", "ann@xn--bcher-kva.example", "ann", "xn--bcher-kva.example"),
        ("<ann@straße.example>", "ann@xn--strae-oqa.example", "ann", "xn--strae-oqa.example"),
        ("<ann@STRASSE.example>", "ann@strasse.example", "ann", "strasse.example"),
        ("<ann@\udcff.example>", "ann@\udcff.example", "ann", "\udcff.example"),
        ("<ann>", "ann", "ann", ""),
        ("<ann%example.org>", "ann@example.org", "ann", "example.org"),
        ("<example.org!ann>", "ann@example.org", "ann", "example.org"),
        ("<ann%example.org@mta.test>", "ann%example.org@mta.test", "ann%example.org", "mta.test"),
        ("<bo ss@example.org>", "bo.ss@example.org", "bo.ss", "example.org"),
        ("<>x@example.org", "x@example.org", "x", "example.org"),
        ("<", "", "", ""),
        (">", "", "", ""),
        ('"', r'"\""', '"', ""),
        ("(", "", "", ""),
        ("\\", r'"\\"', "\\", ""),
    ],
)
def test_an_address_is_read_as_the_servers_read_it(raw: str, text: str, local: str, domain: str) -> None:
    address = Address(raw)
    assert (str(address), address.local, address.domain, address.raw) == (text, local, domain, raw)


@pytest.mark.parametrize(
    "raw", ["<>", "< >", "<\t>", "<(c)>", "<>(c)", "(c)<>", '<"">', "<<>>", "<@a.test:>", "<,>", "<;>", ""]
)
def test_the_null_sender_is_empty_in_any_spelling(raw: str) -> None:
    assert Address(raw) == ""
    assert Address(raw).complete
    assert not Address(raw).matches("example.org", ".example.org", "ann@example.org")


def test_an_address_is_equal_to_its_text_and_has_its_hash() -> None:
    address = Address("<Ann@EXAMPLE.org>")
    assert address == "Ann@example.org"
    assert {"Ann@example.org": 1}[address] == 1
    assert address != "ann@example.org"
    assert address.canonical == "ann@example.org"
    assert pickle.loads(pickle.dumps(Address.from_arguments(["<Ann@EXAMPLE.org>", "SIZE=1"]))).params.raw == ("SIZE=1",)


@pytest.mark.parametrize(
    ("raw", "complete"),
    [
        ("<ann@example.org>", True),
        ("<ann>", False),
        ("<PostMaster>", True),
        ("<ann%example.net@example.org>", False),
        ("<example.net!ann@example.org>", False),
        ('<"ann@example.net"@example.org>', False),
        ("<ann+lists@example.org>", True),
    ],
)
def test_whether_an_address_says_by_itself_whose_it_is(raw: str, complete: bool) -> None:
    assert Address(raw).complete is complete


@pytest.mark.parametrize(
    ("pattern", "fits"),
    [
        ("Boss@Mail.Example.ORG", True),
        ('"boss"@mail.example.org.', True),
        ("other@mail.example.org", False),
        ("mail.example.org", True),
        ("@MAIL.example.org.", True),
        ("example.org", False),
        (".example.org", True),
        (".Example.ORG.", True),
        (".mail.example.org", False),
        (".ample.org", False),
    ],
)
def test_patterns(pattern: str, fits: bool) -> None:
    assert Address("<BOSS@mail.example.org>").matches(pattern) is fits
    assert Address("<BOSS@mail.example.org>").matches("nobody@example.net", pattern) is fits


def test_a_domain_fits_in_unicode_and_as_dns_has_it() -> None:
    for raw in ("<ann@bücher.example>", "<ann@xn--bcher-kva.example>"):
        assert Address(raw).matches("BÜCHER.example")
        assert Address(raw).matches("xn--bcher-kva.example")


@pytest.mark.parametrize(
    "pattern", ["", ".", "@", "ann@", "two words", "a,b", "ann%example.org@example.net", "<>", "a..b"]
)
def test_what_is_no_pattern_is_an_error_that_says_what_is(pattern: str) -> None:
    with pytest.raises(ValueError, match="write a mailbox"):
        Address("<ann@example.org>").matches("example.org", pattern)


_PIECES = st.sampled_from(
    [*'<>()@.,:;"\\[] \t%!', "ann", "example.org", "ä", "\udcff", "\0", "[IPv6:::1]", "xn--", "ß", "。"]
)
_TEXTS = st.lists(_PIECES, max_size=30).map("".join) | st.text(max_size=30)


@given(_TEXTS)
@example("@" * 20)
def test_any_text_is_read_without_an_exception_and_its_reading_is_final(raw: str) -> None:
    address = Address(raw)
    assert isinstance(address.local, str)
    assert address.domain == address.domain.lower()
    assert address.matches("example.org") in (True, False)
    if address.local and address.complete and re.fullmatch(r"[\w-]+(\.[\w-]+)*", address.domain):
        again = Address(f"<{address}>")
        assert (again.local, again.domain) == (address.local, address.domain)
        assert again.canonical == address.canonical


@pytest.mark.parametrize(
    "piece",
    [
        "(",
        ")",
        "()",
        "(a)",
        '"',
        '""',
        '"a"',
        "\\",
        "\\\\",
        "@",
        "@:",
        "@a:",
        "<",
        ">",
        "<>",
        ":",
        ";",
        ",",
        " ",
        "a ",
        "[",
        "]",
        "[]",
        "a.",
        ".",
        "ä.",
        "%",
        "!",
        "x" * 20,
    ],
)
@pytest.mark.parametrize("around", ["{}", "<{}@example.org>", "<ann@{}>", '<"{}"@example.org>', "<{};>"])
def test_the_work_is_linear(piece: str, around: str) -> None:
    """Counted in lines of Python."""
    few, many = (steps(around.format(piece * count)) for count in (500, 1000))
    assert many <= 2.2 * few + 200


# ---- What came from the server goes back to it, in any case

ODD = [
    '<"x>y"@sink.test>',
    "<a@b@sink.test>",
    "<bob%x@sink.test>",
    "<bob>",
    "bob@sink.test",
    "< bob@SINK.test. >(x)",
    "<bob@sink.test>,",
    '<"">',
]


@pytest.mark.parametrize("raw", ODD)
def test_a_recipient_of_the_client_can_be_removed(serve: Serve, raw: str) -> None:
    app = Milter("test")
    app.on_message(lambda ctx, message: message.recipients.remove(message.recipients[0]))
    assert changes_of(serve, app, raw) == [RemoveRecipient(raw)]


@pytest.mark.parametrize("raw", ODD)
@pytest.mark.parametrize(
    "remove",
    [lambda ctx: ctx.remove_recipient(ctx.recipients[0]), lambda ctx: ctx.remove_recipient(str(ctx.recipients[0]))],
)
def test_and_through_the_context(serve: Serve, raw: str, remove: Callable[[EomContext], None]) -> None:
    app = Milter("test")
    app.on_eom(remove)
    assert changes_of(serve, app, raw) == [RemoveRecipient(raw)]


@pytest.mark.parametrize("raw", [*ODD, "<>", "< >"])
def test_the_sender_of_the_client_can_be_set_again(serve: Serve, raw: str) -> None:
    app = Milter("test")

    @app.on_message
    def keep(ctx: EomContext, message: Message) -> None:
        message.sender = message.sender
        ctx.replace_sender(ctx.sender or "")

    (change,) = changes_of(serve, app, "<bob@sink.test>", raw)
    assert isinstance(change, ReplaceSender)
    assert Address(change.sender).canonical == Address(raw).canonical


def test_a_recipient_is_found_in_any_spelling(serve: Serve) -> None:
    app = Milter("test")

    @app.on_message
    def remove(ctx: EomContext, message: Message) -> None:
        assert "BOSS@Sink.TEST." in message.recipients
        message.recipients.discard('"boss"@sink.test')
        message.recipients.discard("other@sink.test")

    assert changes_of(serve, app, "< Boss@SINK.test >") == [RemoveRecipient("< Boss@SINK.test >")]


def test_of_two_that_differ_in_case_the_one_of_this_text_is_removed() -> None:
    recipients = Message(MemoryContent([]), Address(""), [Address("<Bob@x>"), Address("<bob@x>")]).recipients
    recipients.remove("bob@x")
    assert recipients == ["Bob@x"]
    recipients.remove("BOB@x")
    assert recipients == []


def test_a_recipient_that_is_there_in_another_spelling_is_not_added_again() -> None:
    recipients = Message(MemoryContent([]), Address(""), [Address("<Bob@SINK.test>")]).recipients
    recipients.add("bob@sink.test")
    assert recipients == ["Bob@sink.test"]


def changes_of(serve: Serve, app: Milter, recipient: str, sender: str = "<ann@client.example>") -> list[object]:
    client = serve(app).greeted()
    client.mail(sender)
    client.rcpt(recipient)
    client.data()
    client.eoh()
    end = client.end_of_message()
    assert end.answer.verdict is Verdict.CONTINUE
    return list(end.changes)


# ---- What goes to the server is one mailbox

NO_MAILBOX = {
    "a@sink.test, b@sink.test": "more than one mailbox",
    "a@sink.test,b@sink.test": "more than one mailbox",
    "a@sink.test;b@sink.test": "more than one mailbox",
    "a@sink.test b@sink.test": "more than one mailbox",
    "<a@sink.test><b@sink.test>": "without a display name",
    "a@b@sink.test": "more than one mailbox",
    "Bob <bob@sink.test>": "without a display name",
    '"Bob, Jr." <bob@sink.test>': "without a display name",
    "bob@sink.test>": "without a display name",
    "bob": "has no domain",
    "": "is empty",
    "<>": "is empty",
    "@sink.test": "is no mailbox",
    "bob@": "is no mailbox",
    "bob@sink..test": "is no mailbox",
    "bob.@sink.test": "is no mailbox",
    ".bob@sink.test": "is no mailbox",
    "bo b@sink.test": "is no mailbox",
    " bob@sink.test": "is no mailbox",
    "bob@sink.test ": "is no mailbox",
    "bob@sink.test(x)": "is no mailbox",
    '"bob@sink.test': "is no mailbox",
    "bob@[nonsense]": "is no mailbox",
    "@relay.test:bob@sink.test": "more than one mailbox",
    "bob%evil.test@sink.test": "a route to another domain",
    "evil.test!bob@sink.test": "a route to another domain",
    '"bob@evil.test"@sink.test': "a route to another domain",
    "bob\t@sink.test": "control character",
    "bob\x7f@sink.test": "control character",
    "bob\r\n@sink.test": "line end",
    "bob\0@sink.test": "NUL",
    f"{'b' * 250}@sink.test": "longer than 254 bytes",
}


@pytest.mark.parametrize("address", NO_MAILBOX)
def test_what_the_servers_do_not_read_as_one_mailbox_is_refused(address: str) -> None:
    message = Message(MemoryContent([]), Address(""), [])
    with pytest.raises(ValueError, match=NO_MAILBOX[address]):
        message.recipients.add(address)
    if address not in ("", "<>"):
        with pytest.raises(ValueError, match=NO_MAILBOX[address]):
            message.sender = address
    assert message.recipients == []


@pytest.mark.parametrize(
    ("address", "sent"),
    [
        ("bob@sink.test", "<bob@sink.test>"),
        ("<Bob@Sink.test>", "<Bob@Sink.test>"),
        ("bob+lists@sink.test", "<bob+lists@sink.test>"),
        ("SRS0=HHH=TT=example.org=ann@sink.test", "<SRS0=HHH=TT=example.org=ann@sink.test>"),
        ('"bob smith"@sink.test', '<"bob smith"@sink.test>'),
        ("bob@[192.0.2.1]", "<bob@[192.0.2.1]>"),
        ("bob@[IPv6:2001:db8::1]", "<bob@[IPv6:2001:db8::1]>"),
        ("bob@localhost", "<bob@localhost>"),
        ("böb@sink.test", "<böb@sink.test>"),
        ("bob@bücher.example", "<bob@xn--bcher-kva.example>"),
        ("postmaster", "<postmaster>"),
    ],
)
def test_one_mailbox_goes_out_in_brackets(serve: Serve, address: str, sent: str) -> None:
    app = Milter("test")
    app.on_eom(lambda ctx: ctx.add_recipient(address))
    assert changes_of(serve, app, "<ann@sink.test>") == [AddRecipient(sent)]


# ---- Login, host name, parameters


@pytest.mark.parametrize(
    ("version", "macro", "login"),
    [
        ("8.17.1.9", "ann+2Bx", "ann+x"),
        (None, "ann+2Bx", "ann+x"),
        ("8.17.1.9", "ann+x", "ann+x"),
        ("8.17.1.9", "+C3+A4nn", "änn"),
        ("8.17.1.9", "+FF", "\udcff"),
        ("Postfix 3.7.11", "ann+2Bx", "ann+2Bx"),
        ("Postcow 3.7.11", "ann+2Bx", "ann+2Bx"),
        ("8.17.1.9", "", None),
        ("8.17.1.9", None, None),
    ],
)
def test_the_login_is_what_the_client_gave(
    serve: Serve, version: str | None, macro: str | None, login: str | None
) -> None:
    app = Milter("test")
    seen: list[str | None] = []

    @app.on_mail
    def note(ctx: Context, sender: Address, params: Params) -> Status:
        seen.append(ctx.login)
        return Status.CONTINUE

    client = serve(app).client()
    client.negotiate()
    client.macros(b"C", {"v": version} if version else {})
    client.connect_info()
    client.helo()
    client.macros(b"M", {} if macro is None else {"{auth_authen}": macro})
    client.mail("<ann@client.example>")
    assert seen == [login]


@pytest.mark.parametrize(
    ("hostname", "macros", "verified"),
    [
        ("client.example", {"v": "Postfix 3.7.11"}, True),
        ("unknown", {"v": "Postfix 3.7.11"}, False),
        ("[192.0.2.1]", {"v": "Postfix 3.7.11"}, False),
        ("client.example", {"v": "8.17.1.9", "{client_resolve}": "OK"}, True),
        ("client.example", {"v": "8.17.1.9", "{client_resolve}": "FORGED"}, False),
        ("client.example", {"v": "8.17.1.9", "{client_resolve}": "TEMP"}, False),
        ("client.example", {"{client_resolve}": "FAIL"}, False),
        ("client.example", {"_": "client.example [192.0.2.1]"}, True),
        ("client.example", {"_": "client.example [192.0.2.1] (may be forged)"}, False),
        ("[192.0.2.1]", {"_": "[192.0.2.1]"}, False),
        ("client.example", {}, False),
    ],
)
def test_the_verified_host_name_is_no_forged_one(
    serve: Serve, hostname: str, macros: dict[str, str], verified: bool
) -> None:
    app = Milter("test")
    seen: list[str | None] = []

    @app.on_connect
    def note(ctx: Context, name: str, address: object) -> Status:
        seen.append(ctx.verified_hostname)
        return Status.CONTINUE

    client = serve(app).client()
    client.negotiate()
    client.macros(b"C", macros)
    client.connect_info(hostname)
    assert seen == [hostname if verified else None]


@pytest.mark.parametrize(
    ("raw", "name", "value"),
    [
        ("ORCPT=rfc822;ann+2Bx@example.org", "orcpt", "rfc822;ann+x@example.org"),
        ("ENVID=QQ314159+20x", "ENVID", "QQ314159 x"),
        ("auth=ann+3D1@example.org", "AUTH", "ann=1@example.org"),
        ("AUTH=<>", "AUTH", "<>"),
        ("ORCPT=utf-8;\\x{E4}nn@example.org", "ORCPT", "utf-8;änn@example.org"),
        ("ORCPT=utf-8;\\x{FFFFFF}nn@example.org", "ORCPT", "utf-8;\\x{FFFFFF}nn@example.org"),
        ("ENVID=a+2bx+", "ENVID", "a+2bx+"),
        ("SIZE=+31", "SIZE", "+31"),
        ("ORCPT", "ORCPT", None),
    ],
)
def test_parameters_in_xtext_are_decoded_by_name(raw: str, name: str, value: str | None) -> None:
    params = Params([raw])
    assert params[name] == value
    assert params.raw == (raw,)
