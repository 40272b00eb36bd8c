# SPDX-License-Identifier: GPL-3.0-or-later
"""A message, as a handler reads and edits it: exact to the byte, valid as long as it says, a mapping as it says.

What becomes of the edits is in test_edits.py.
"""

import gc
import io
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from email import message_from_bytes, policy
from email.headerregistry import AddressHeader
from email.message import EmailMessage

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from milter.addresses import Address
from milter.content import Content
from milter.errors import ContextError
from milter.message import MemoryContent, Message, freeze
from milter.parsed import LimitDefect

Fields = list[tuple[bytes, bytes]]


class Gathered(MemoryContent):
    """A content as the shim's: gone when the handler has returned, in a file if it is large. Counts what is read."""

    def __init__(self, fields: Fields, body: bytes = b"", *, spooled: bool = False) -> None:
        super().__init__(fields, body)
        self.gone = False
        self.reads: list[tuple[int, int]] = []
        self.file = tempfile.TemporaryFile() if spooled else None  # noqa: SIM115 (closed by end())
        if self.file is not None:
            self.file.write(self._data)
            self.file.flush()
            self.file.seek(5)  # nobody may rely on the position

    def read(self, offset: int, size: int) -> bytes:
        if self.gone:
            raise ContextError("the handler is over")
        assert 0 <= offset <= offset + size <= self.size
        self.reads.append((offset, size))
        return super().read(offset, size)

    def spool_file(self) -> int | None:
        if self.gone:
            raise ContextError("the handler is over")
        return os.dup(self.file.fileno()) if self.file is not None else None

    def end(self) -> None:
        self.gone = True
        if self.file is not None:
            self.file.close()


SENDER, RECIPIENTS = Address.from_arguments(["<ann@client.example>", "SIZE=9"]), [Address("bob@mta.example")]


def made(content: Content, *, wire_space: bool = True, leading_space: bool = False) -> Message:
    return Message(content, SENDER, RECIPIENTS, wire_space=wire_space, leading_space=leading_space)


def message_of(*lines: bytes, body: bytes = b"", leading_space: bool = False) -> Message:
    """Of header fields as they stand in a message, folds as LF."""
    fields: Fields = [(name, value) for name, _, value in (line.partition(b":") for line in lines)]
    return made(MemoryContent(fields, body), leading_space=leading_space)


@pytest.fixture
def descriptors() -> Iterator[None]:
    """No file stays open."""
    if not os.path.exists("/dev/fd"):
        pytest.skip("open files are told in /proc, by way of /dev/fd")
    before = len(os.listdir("/dev/fd"))
    yield
    gc.collect()
    assert len(os.listdir("/dev/fd")) == before


# ---- Every byte

EXACT = [
    (b"\r\n", [], b""),
    (b"\r\nbody without fields\r\n", [], b"body without fields\r\n"),
    (b"Subject: hello\r\n\r\n", [(b"Subject", b" hello")], b""),
    (b"A:b\r\nC:\td\r\nE:  f \r\n\r\n", [(b"A", b"b"), (b"C", b"\td"), (b"E", b"  f ")], b""),
    (b"Empty:\r\nSpace: \r\n\r\n\r\n", [(b"Empty", b""), (b"Space", b" ")], b"\r\n"),
    (b"X: 1\r\nx: 2\r\nX: 1\r\n\r\n", [(b"X", b" 1"), (b"x", b" 2"), (b"X", b" 1")], b""),
    (b"F: a\r\n b\r\n\tc\r\n\r\n", [(b"F", b" a\n b\n\tc")], b""),
    (b"F: a\r\n b\r\n c\rd\r\r\n e\r\n\r\n", [(b"F", b" a\r\n b\n c\rd\r\r\n e")], b""),
    (b"\xe4\xff: caf\xc3\xa9\xff\r\n\r\n\xff\0\r.\n", [(b"\xe4\xff", b" caf\xc3\xa9\xff")], b"\xff\0\r.\n"),
]


@pytest.mark.parametrize("spooled", [False, True], ids=["memory", "spooled"])
@pytest.mark.parametrize(
    ("due", "fields", "body"), EXACT, ids=lambda value: repr(value) if isinstance(value, bytes) else ""
)
def test_every_byte_is_what_the_mta_sent(due: bytes, fields: Fields, body: bytes, spooled: bool) -> None:
    content = Gathered(fields, body, spooled=spooled)
    assert made(content).as_bytes() == due
    assert made(content).size == len(due)
    assert made(content).body == body
    assert made(content, leading_space=True).headers.raw == tuple(fields)
    assert made(content).headers.raw == tuple((name, value.removeprefix(b" ")) for name, value in fields)
    with made(content).open() as file:
        assert file.read() == due
    assert isinstance(made(content).email(), EmailMessage)
    content.end()


byte_texts = st.binary(max_size=8).map(lambda text: text.replace(b"\0", b""))
names = st.sampled_from([b"A", b"a", b"X-Long-Name", b"\xff"])


@settings(derandomize=True, deadline=None, max_examples=300)
@given(fields=st.lists(st.tuples(names, byte_texts), max_size=6), body=st.binary(max_size=40), data=st.data())
def test_every_byte_of_random_messages(fields: Fields, body: bytes, data: st.DataObject) -> None:
    lines = [name + b":" + value.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n") + b"\r\n" for name, value in fields]
    due = b"".join(lines) + b"\r\n" + body
    content = Gathered(fields, body, spooled=data.draw(st.booleans()))
    message = made(content)
    assert message.size == len(due)
    with message.open() as file:
        plain = io.BytesIO(due)
        for _ in range(4):
            position, size = data.draw(st.integers(0, len(due) + 3)), data.draw(st.integers(-1, 20))
            assert file.seek(position) == plain.seek(position) == file.tell()
            assert file.read(size) == plain.read(size)
            assert file.tell() == plain.tell()
    assert message.as_bytes() == due
    message.email()
    content.end()


def test_without_the_space_on_the_wire_one_is_put_where_the_mta_took_one() -> None:
    content = MemoryContent([(b"Subject", b"hello"), (b"Fold", b"\n v")], b"x\r\n")
    message = made(content, wire_space=False)
    assert message.as_bytes() == b"Subject: hello\r\nFold: \r\n v\r\n\r\nx\r\n"
    assert message.headers.items() == [("Subject", "hello"), ("Fold", "\n v")]


def test_the_space_is_shown_to_who_wants_it() -> None:
    lines = (b"A: v", b"B:v", b"C:\tv", b"D:  v", b"E:", b"F: ")
    assert message_of(*lines).headers.values() == ["v", "v", "\tv", " v", "", ""]
    assert message_of(*lines, leading_space=True).headers.values() == [" v", "v", "\tv", "  v", "", " "]


# ---- As a file


@pytest.mark.parametrize("spooled", [False, True], ids=["memory", "spooled"])
def test_a_large_message_can_be_read_in_any_order(spooled: bool, descriptors: None) -> None:
    body = bytes(range(256)) * 4096
    content = Gathered([(b"A", b" 1")], body, spooled=spooled)
    due = b"A: 1\r\n\r\n" + body
    with made(content).open() as file:
        assert isinstance(file, io.BufferedReader)
        assert file.readable()
        assert file.seekable()
        assert not file.writable()
        assert file.readline() == b"A: 1\r\n"
        assert file.peek(2)[:2] == b"\r\n"
        assert file.seek(-5, os.SEEK_END) == len(due) - 5
        assert file.read() == due[-5:]
        assert file.read() == b""
        assert file.seek(300_000) == 300_000
        file.seek(-10, os.SEEK_CUR)
        assert file.read(100_000) == due[299_990:399_990]
        assert file.seek(len(due) + 10) == len(due) + 10
        assert file.read() == b""
        file.seek(0)
        assert b"".join(iter(lambda: file.read(70_001), b"")) == due
        with pytest.raises(OSError, match="beginning"):
            file.seek(-1)
    with pytest.raises(ValueError, match="closed"):
        file.read()
    content.end()


def test_a_spooled_message_is_not_loaded_to_be_read_as_a_file(descriptors: None) -> None:
    content = Gathered([(b"A", b" 1")], b"x" * 3_000_000, spooled=True)
    message = made(content)
    with message.open() as file:
        while file.read(1 << 16):
            pass
    assert sum(size for _, size in content.reads) == content.header_size
    content.end()


def test_files_of_one_message_do_not_disturb_each_other(descriptors: None) -> None:
    content = Gathered([(b"A", b" 1")], b"0123456789" * 100_000, spooled=True)
    message = made(content)
    with message.open() as one, message.open() as two:
        one.seek(500_000)
        assert two.read(10) == b"A: 1\r\n\r\n01"
        assert one.read(10) == b"2345678901"
    content.end()


@pytest.mark.parametrize("spooled", [False, True], ids=["memory", "spooled"])
def test_a_file_outlives_the_handler(spooled: bool, descriptors: None) -> None:
    content = Gathered([(b"A", b" 1")], b"x" * 2_000_000, spooled=spooled)
    message = made(content)
    file = message.open()
    content.end()
    freeze(message)
    del message
    with file:
        assert file.read() == b"A: 1\r\n\r\n" + b"x" * 2_000_000


def test_a_file_that_nobody_closes_is_closed_when_it_is_forgotten(descriptors: None) -> None:
    content = Gathered([], b"x", spooled=True)
    file = made(content).open()
    del file
    content.end()


def test_a_spool_file_that_is_too_short_is_an_error_and_no_end() -> None:
    content = Gathered([], b"x" * 100, spooled=True)
    assert content.file is not None
    content.file.truncate(50)
    with made(content).open() as file, pytest.raises(OSError, match="shorter"):
        file.read()
    content.end()


# ---- Parsed


def test_the_parsed_message_is_made_once_from_what_was_received() -> None:
    lines = (b"From: Ann <ann@client.example>", b"Subject: =?utf-8?q?caf=C3=A9?=", b"Content-Type: text/html")
    message = message_of(*lines, body=b"<p>\r\n")
    message.headers["Subject"] = "edited"
    message.body = b"edited\r\n"
    email = message.email()
    assert email["Subject"] == "café"
    assert email["From"].addresses[0].username == "ann"
    assert email.get_content_type() == "text/html"
    assert email.get_payload() == "<p>\r\n"
    assert bytes(email) == message.as_bytes()
    assert message.email() is email


GARBAGE = [
    [b"Content-Type: multipart/mixed; boundary=", b"MIME-Version: 1.0"],
    [b'Content-Type: \xff\xfe; =;="', b"Content-Disposition: \xff;;=", b"Content-Transfer-Encoding: \xff"],
    [b"To: <<<>>>,,;:@[", b'From: "', b"Date: when?", b"Message-ID: <", b"Subject: =?utf-8?q?\xff?= =?x?b?!?="],
    [b"To: =?utf-8?q?=0A?= <a@b>", b"From: " + b"(" * 3000, b"MIME-Version: \xff", b"Resent-Date: \0"],
    [b"Content-Type: text/plain; x*0*=utf-8''%FF; x*2=b", b"Content-Disposition: attachment; filename*=''%"],
    [b":", b"\xff: v", b" A: b", b"A B: c", b"A:\r\rb\n\n\n"],
    [b'Content-Type: multipart/mixed; boundary="a"', b"To: \xe4@b:;", b"Content-Type: message/rfc822"],
]


@pytest.mark.parametrize("lines", GARBAGE, ids=range(len(GARBAGE)))
def test_no_message_is_too_bad_to_be_parsed(lines: list[bytes]) -> None:
    email = message_of(*lines, body=b"--a\r\n--a--\r\n\xff\r\n--").email()
    read_all_of(email)


def read_all_of(email: EmailMessage) -> None:
    """What handlers ask for."""
    for name, value in email.items():
        assert str(value) == value
        assert email.get_all(name)
    email.get_content_type(), email.get_content_charset(), email.get_filename(), email.get_boundary()
    email.is_attachment(), email.get_content_disposition(), email.get_params()
    for address in ("From", "To"):
        if email[address] is not None:
            assert isinstance(email[address].addresses, tuple)
    for part in email.walk():
        part.get_payload(decode=True)


@settings(derandomize=True, deadline=None, max_examples=300)
@given(
    name=st.sampled_from(
        [b"To", b"Date", b"Subject", b"Content-Type", b"Content-Disposition", b"MIME-Version", b"Message-ID"]
    ),
    value=st.lists(st.sampled_from([*b"<>@,;:()[]\"\\=?'*%/. \tab1\xff\r\n", "=?utf-8?q?", "?="]), max_size=25),
)
def test_no_field_is_too_bad_to_be_read(name: bytes, value: list[int | str]) -> None:
    text = b"".join(bytes([item]) if isinstance(item, int) else item.encode() for item in value)
    email = message_of(name + b": " + text).email()
    read_all_of(email)


def test_a_field_that_the_standard_library_fails_at_keeps_its_text(monkeypatch: pytest.MonkeyPatch) -> None:
    parse = AddressHeader.parse.__func__  # type: ignore[attr-defined]

    def fail(cls: type[AddressHeader], value: str, kwds: dict[str, object]) -> None:
        if value:
            raise IndexError(value)
        parse(cls, value, kwds)

    monkeypatch.setattr(AddressHeader, "parse", classmethod(fail))
    email = message_of(b"To: <bob@mta.example>", b"Subject: s").email()
    assert (email["To"], email["Subject"]) == ("<bob@mta.example>", "s")
    assert email["To"].addresses == ()
    assert "cannot be parsed" in str(email["To"].defects[-1])


def test_parts_that_are_too_deep_are_text() -> None:
    lines, body = [b"Content-Type: multipart/mixed; boundary=b0", b"Subject: deep"], b""
    for level in range(1000):
        body += b"--b%d\r\nContent-Type: multipart/mixed; boundary=b%d\r\n\r\n" % (level, level + 1)
    body += b"in the deep\r\n--b0\r\n\r\na part of the first\r\n--b0--\r\n"
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(1000)  # as Python has it; other tests may have raised it
    try:
        email = message_of(*lines, body=body).email()
    finally:
        sys.setrecursionlimit(limit)
    assert email["Subject"] == "deep"
    *containers, deepest, last = email.walk()
    assert len(containers) == 21
    assert all(part.is_multipart() for part in containers)
    assert last.get_payload() == "a part of the first"
    assert deepest.get_content_type() == "application/octet-stream"
    assert str(deepest.get_payload()).endswith("in the deep")
    assert deepest.keys() == []
    assert [str(defect) for defect in deepest.defects] == ["a part is not parsed: it lies in more than 20 others"]
    assert isinstance(deepest.defects[0], LimitDefect)


def test_of_too_many_parts_the_rest_is_one() -> None:
    body = b"".join(b"--a\r\n\r\npart %d\r\n" % number for number in range(1, 2001)) + b"--a--\r\n"
    email = message_of(b"Content-Type: multipart/mixed; boundary=a", body=body).email()
    parts = list(email.iter_parts())
    assert [part.get_payload() for part in parts[:-1]] == [f"part {number}" for number in range(1, 1000)]
    assert parts[-1].get_content_type() == "application/octet-stream"
    assert parts[-1].get_payload(decode=True) == body[body.index(b"\r\npart 1000\r\n") : -2]
    assert ["1000 parts" in str(defect) for defect in parts[-1].defects] == [True]
    assert body.endswith(b"--a--\r\n")
    assert b"part 2000\r\n--a--" in bytes(email)


def test_a_field_that_is_too_long_is_text() -> None:
    to = b"To: " + b", ".join(b"user%d@client.example" % number for number in range(2000))
    kind = b"Content-Type: multipart/mixed; boundary=a; x=" + b"x" * 9000
    words = b"From: " + b"(a)" * 1000
    email = message_of(to, kind, words, b"Subject: " + b"x" * 8000, body=b"--a\r\n\r\n--a--\r\n").email()
    assert len(email["To"].addresses) == len(email["From"].addresses) == 0
    assert [f"{name}: {email[name]}".encode() for name in email] == [to, kind, words, b"Subject: " + b"x" * 8000]
    assert email.get_content_type() == "multipart/mixed"
    assert (email.get_boundary(), email.get_param("x"), email.get_params()) == (None, None, None)
    assert not email.is_multipart()
    limits = [str(defect).partition(" ")[0] for defect in email.defects if isinstance(defect, LimitDefect)]
    assert limits == ["To", "Content-Type", "From"]
    copy = EmailMessage()
    copy["To"] = email["To"]
    assert bytes(copy).startswith(to)


def test_fields_below_the_limits_are_parsed() -> None:
    to = b"To: " + b", ".join(b"user%d@client.example" % number for number in range(300))
    email = message_of(to, b"Subject: " + b"=?utf-8?q?caf=C3=A9?= " * 100).email()
    assert len(email["To"].addresses) == 300
    assert email["Subject"].startswith("café")
    assert email.defects == []


BYTES_AND_TEXT = [
    [b"Subject: " + b"\xe4" * 200],
    [b"From: \xe4" + b"(a)" * 40 + b"\r\n " + b"\xff" * 100],
    [b"X: a\x0bb\x85c\x1cd", b"To: " + b"\xc3\xa4" * 100 + b" <a@b>"],
    [b"Content-Type: text/plain; charset=none", b"Subject: x"],
    [b"Content-Type: text/plain; charset=us-ascii", b"Subject: x"],
    [b"Content-Type: text/plain; charset=idna", b"Subject: x"],
    [b"Content-Type: text/plain; charset*=x'y'z", b"Content-Transfer-Encoding: base64"],
]


@pytest.mark.parametrize("lines", BYTES_AND_TEXT, ids=range(len(BYTES_AND_TEXT)))
def test_what_was_received_can_be_written_again(lines: list[bytes]) -> None:
    message = message_of(*lines, body=b"text \xe4\xff\r\n")
    email = message.email()
    assert bytes(email) == message.as_bytes()
    assert "text " in email.as_string()
    assert str(email)
    assert "text " in email.get_content() or "base64" in email.as_string()
    assert email.get_payload()


PARAMETERS = [
    (b"attachment; filename*=utf-8''a; filename*0=b", "a"),
    (b"attachment; filename*0*=utf-8''%C3; filename*1*=%A4", "ä"),
    (b"attachment; filename*=idna''%e4", "\ufffd"),
    (b"attachment; filename*=undefined''a", "a"),
]


@pytest.mark.parametrize(("value", "name"), PARAMETERS, ids=range(len(PARAMETERS)))
def test_parameters_that_the_standard_library_fails_at_are_read(value: bytes, name: str) -> None:
    email = message_of(b"Content-Disposition: " + value).email()
    assert email.get_filename() == name
    assert email.get_content_disposition() == "attachment"
    assert email.get_param("FILENAME", header="content-disposition") is not None


def test_a_charset_that_takes_quadratic_time_is_not_used() -> None:
    email = message_of(b"Content-Type: text/plain; charset=Punycode", body=b"abc-def\xff").email()
    assert email.get_content() == email.get_payload() == "abc-def\ufffd"


def test_what_is_set_is_written_as_the_standard_library_does() -> None:
    email = message_of(b"Subject: x", b"To: \xe4").email()
    email.replace_header("Subject", "ä" * 3)
    email["X-Long"] = "word " * 3000
    del email["To"]
    email["to"] = "bob@mta.example"
    assert email.get("TO") == "bob@mta.example"
    assert "Cc" not in email
    assert "x-long" in email
    copy = message_from_bytes(bytes(email), policy=policy.default)
    assert copy["Subject"] == "äää"
    assert copy["X-Long"].split() == ["word"] * 3000
    assert b"Subject: =?utf-8?" in bytes(email)


# ---- Lazy, and valid as long as it says


def test_nothing_is_read_that_nobody_asks_for() -> None:
    content = Gathered([(b"A", b" 1")], b"x" * 1000)
    message = made(content)
    assert (message.sender, list(message.recipients)) == ("ann@client.example", ["bob@mta.example"])
    repr(message)
    assert content.reads == []
    headers = message.headers
    assert (headers["a"], headers.get("b"), headers.raw, len(headers)) == ("1", None, ((b"A", b"1"),), 1)
    assert content.reads == [(0, content.header_size)]
    assert message.body == message.body == b"x" * 1000
    assert content.reads[1:] == [(content.header_size, 1000)]


READS: list[Callable[[Message], object]] = [
    lambda message: message.headers.items(),
    lambda message: message.headers.raw,
    lambda message: message.headers["A"],
    lambda message: len(message.headers),
    lambda message: message.body,
    lambda message: message.size,
    lambda message: message.as_bytes(),
    lambda message: message.email().as_bytes(),
    lambda message: [message.sender, *message.recipients],
]


@pytest.mark.parametrize("spooled", [False, True], ids=["memory", "spooled"])
@pytest.mark.parametrize("read", READS, ids=range(len(READS)))
def test_what_was_read_stays_valid(read: Callable[[Message], object], spooled: bool, descriptors: None) -> None:
    content = Gathered([(b"A", b" 1")], b"x", spooled=spooled)
    message = made(content)
    before = read(message)
    content.end()
    freeze(message)
    assert read(message) == before


def test_a_file_can_be_had_of_what_was_read(descriptors: None) -> None:
    content = Gathered([(b"A", b" 1")], b"x", spooled=True)
    message = made(content)
    assert message.as_bytes() == b"A: 1\r\n\r\nx"
    content.end()
    with message.open() as file:
        assert file.read() == b"A: 1\r\n\r\nx"


@pytest.mark.parametrize("read", [*READS[:-1], lambda message: message.open()], ids=range(len(READS)))
def test_what_was_not_read_raises_afterwards(read: Callable[[Message], object]) -> None:
    content = Gathered([(b"A", b" 1")], b"x")
    message = made(content)
    views = message.headers, message.recipients
    content.end()
    freeze(message)
    with pytest.raises(ContextError):
        read(message)
    assert "not read" in repr(views[0])
    repr(message)


def set_sender(message: Message) -> None:
    message.sender = "new@mta.example"


def set_body(message: Message) -> None:
    message.body = b"new"


def set_header(message: Message) -> None:
    message.headers["A"] = "2"


def delete_header(message: Message) -> None:
    del message.headers["A"]


EDITS: list[Callable[[Message], object]] = [
    set_sender,
    set_body,
    set_header,
    delete_header,
    lambda message: message.headers.add("B", "1"),
    lambda message: message.headers.insert(0, "B", "1"),
    lambda message: message.headers.replace("A", "2"),
    lambda message: message.headers.setdefault("B", "2"),
    lambda message: message.recipients.add("new@mta.example"),
    lambda message: message.recipients.remove("bob@mta.example"),
    lambda message: message.recipients.discard("bob@mta.example"),
]


@pytest.mark.parametrize("views_before", [False, True])
@pytest.mark.parametrize("edit", EDITS, ids=range(len(EDITS)))
def test_an_edit_that_nobody_would_send_is_refused(edit: Callable[[Message], object], views_before: bool) -> None:
    message = message_of(b"A: 1", body=b"x")
    if views_before:
        assert len(message.headers) == len(message.recipients) == 1
    freeze(message)
    with pytest.raises(ContextError, match="can no longer be changed"):
        edit(message)
    assert (message.sender, message.headers.items(), message.body) == ("ann@client.example", [("A", "1")], b"x")
    assert message.recipients == RECIPIENTS


def test_a_misspelt_attribute_is_no_edit() -> None:
    message = message_of()
    for name in ("subject", "headers", "recipients", "size"):
        with pytest.raises(AttributeError):
            setattr(message, name, "x")


def test_a_message_is_freed_at_once_when_it_is_forgotten() -> None:
    gc.collect()
    gc.disable()
    try:
        message = made(Gathered([(b"A", b" 1")], b"x"))
        message.headers["A"] = "2"
        message.recipients.add("new@mta.example")
        assert message.body
        del message
        assert not [found for found in gc.get_objects() if isinstance(found, Gathered)]
    finally:
        gc.enable()


# ---- The header fields as a mapping

DUPLICATES = (b"From: ann", b"X-Dup: 1", b"Subject: s", b"x-dup: 2", b"X-DUP: 3")


def test_the_fields_are_read_in_order_whatever_the_case() -> None:
    headers = message_of(*DUPLICATES).headers
    assert headers["FROM"] == headers.get("from") == headers.get("From", "x") == "ann"
    assert (headers["x-Dup"], headers.get_all("X-dup")) == ("1", ["1", "2", "3"])
    assert (headers.get("None"), headers.get("None", "x"), headers.get_all("None")) == (None, "x", [])
    with pytest.raises(KeyError, match="None"):
        headers["None"]
    assert "subject" in headers
    assert "None" not in headers
    assert b"Subject" not in headers
    assert len(headers) == 5
    assert list(headers) == headers.keys() == ["From", "X-Dup", "Subject", "x-dup", "X-DUP"]
    assert headers.values() == ["ann", "1", "s", "2", "3"]
    assert headers.items() == list(zip(headers.keys(), headers.values(), strict=True))
    assert repr(headers).startswith("Headers([('From', 'ann'), ")


def test_only_ascii_letters_have_a_case() -> None:
    headers = message_of(b"X-\xc3\xa4: 1", b"K: 2").headers
    assert "x-ä" in headers
    assert "X-Ä" not in headers
    assert "\u212a" not in headers  # the Kelvin sign, a K in lower case


def test_no_byte_is_lost_in_text() -> None:
    headers = message_of(b"A\xff: \xffcaf\xc3\xa9\xc3").headers
    assert headers.items() == [("A\udcff", "\udcffcafé\udcc3")]
    assert headers["a\udcff"].encode("utf-8", "surrogateescape") == b"\xffcaf\xc3\xa9\xc3"


def test_setting_keeps_the_first_and_deletes_the_others() -> None:
    headers = message_of(*DUPLICATES).headers
    headers["X-dup"] = "new"
    assert headers.items() == [("From", "ann"), ("X-Dup", "new"), ("Subject", "s")]
    headers["X-New"] = "v"
    headers["x-new"] = "w"
    assert headers.items()[2:] == [("Subject", "s"), ("X-New", "w")]
    del headers["X-NEW"]
    assert "X-New" not in headers
    with pytest.raises(KeyError, match="X-New"):
        del headers["X-New"]
    assert headers.raw == tuple((name, value.lstrip()) for name, _, value in (f.partition(b":") for f in DUPLICATES))


def test_fields_are_inserted_between_those_that_are_shown() -> None:
    headers = message_of(*DUPLICATES).headers
    del headers["X-Dup"]
    headers.insert(1, "X-B", "b")
    headers.insert(1, "X-A", "a")
    headers.insert(3, "X-C", "c")
    headers.insert(0, "X-Top", "t")
    headers.insert(99, "X-End", "e")
    headers.insert(len(headers), "x-b", "b2")
    assert headers.keys() == ["X-Top", "From", "X-A", "X-B", "X-C", "Subject", "X-End", "x-b"]
    headers.insert(0, "X-B", "b0")
    assert headers.get_all("x-b") == ["b0", "b", "b2"]
    assert headers["X-B"] == "b0"


def test_a_field_is_replaced_by_its_number_among_those_of_its_name() -> None:
    headers = message_of(*DUPLICATES).headers
    headers.insert(1, "X-Dup", "0")
    headers.replace("x-dup", "two", 3)
    headers.replace("X-Dup", None)
    assert headers.get_all("X-Dup") == ["1", "two", "3"]
    headers.replace("X-Dup", None, index=1)
    assert headers.keys() == ["From", "Subject", "x-dup", "X-DUP"]
    for name, index in (("X-Dup", 3), ("X-None", 1)):
        with pytest.raises(KeyError, match=name):
            headers.replace(name, "v", index)
    assert len(headers) == 4


def test_a_default_is_set_only_where_there_is_none() -> None:
    headers = message_of(b"Subject: s").headers
    assert headers.setdefault("SUBJECT", "x") == "s"
    assert headers.setdefault("X-New", "one\r\n two") == "one\n two"
    assert headers.keys() == ["Subject", "X-New"]


def test_a_loop_may_edit() -> None:
    message = message_of(*DUPLICATES)
    for name in message.headers:
        message.headers[name] = "v"
    for recipient in message.recipients:
        message.recipients.remove(recipient)
        message.recipients.add("new@mta.example")
    assert message.headers.keys() == ["From", "X-Dup", "Subject"]
    assert message.recipients == ["new@mta.example"]


@pytest.mark.parametrize(
    ("name", "value", "error", "text"),
    [
        ("", "v", ValueError, "cannot be the name"),
        ("A:", "v", ValueError, "cannot be the name"),
        ("A b", "v", ValueError, "cannot be the name"),
        ("Ä", "v", ValueError, "cannot be the name"),
        (b"A", "v", TypeError, "must be a str"),
        ("A", b"v", TypeError, "must be a str"),
        ("A", None, TypeError, "must be a str"),
        ("A", "a\0b", ValueError, "NUL"),
        ("A", "a\rb", ValueError, "CR"),
        ("A", "a\nBcc: b", ValueError, "line end"),
        ("A", "a\r\n", ValueError, "line end"),
    ],
)
def test_wrong_fields_are_refused_at_once(name: str, value: str, error: type[Exception], text: str) -> None:
    headers = message_of(b"X: 1", b"a: 1").headers
    with pytest.raises(error, match=text):
        headers.add(name, value)
    with pytest.raises(error, match=text):
        headers.insert(0, name, value)
    with pytest.raises(error, match=text):
        headers[name] = value
    if value is not None and name:
        with pytest.raises((error, KeyError)):
            headers.replace(name, value)
    assert headers.items() == [("X", "1"), ("a", "1")]


def test_wrong_numbers_are_refused_at_once() -> None:
    headers = message_of(b"X: 1").headers
    for index in (0, -1, "1", True):
        with pytest.raises((ValueError, TypeError), match="index"):
            headers.replace("X", "2", index)  # type: ignore[arg-type]
    for position in (-1, None, True):
        with pytest.raises((ValueError, TypeError), match="index"):
            headers.insert(position, "X", "2")  # type: ignore[arg-type]
    assert headers.items() == [("X", "1")]


def test_what_came_from_the_mta_may_be_set_again() -> None:
    """Though a handler could not have made it up."""
    headers = message_of(b"X: a\rb", b"Y: c").headers
    headers["X"] = headers["X"]
    with pytest.raises(ValueError, match="CR"):
        headers["Y"] = headers["X"]


# ---- Envelope and body


def test_the_sender_can_be_read_and_set() -> None:
    message = message_of()
    assert (message.sender.raw, message.sender.params["SIZE"]) == ("<ann@client.example>", "9")
    message.sender = "<new@mta.example>"
    assert (message.sender, message.sender.raw) == ("new@mta.example", "<new@mta.example>")
    assert message.sender.params["SIZE"] == "9"
    for null in ("", "<>"):
        message.sender = null
        assert (message.sender, message.sender.raw) == ("", "<>")
    for wrong in ("a\nb", "Ann <ann@x>", "a\0"):
        with pytest.raises(ValueError, match="address"):
            message.sender = wrong
    with pytest.raises(TypeError):
        message.sender = None  # type: ignore[assignment]
    assert message.sender == ""


def test_recipients_are_a_sequence() -> None:
    content = MemoryContent([])
    message = Message(content, SENDER, [Address("a@x"), Address("b@x"), Address("a@x")])
    recipients = message.recipients
    assert recipients is message.recipients
    assert recipients == ["a@x", "b@x", "a@x"] == list(recipients)
    assert recipients != ["a@x"]
    assert recipients != "a@x"
    assert (len(recipients), recipients[-1], recipients[1:], recipients.count("a@x")) == (3, "a@x", ["b@x", "a@x"], 2)
    assert "b@x" in recipients
    assert "<b@x>" in recipients
    assert "< B@X. >" in recipients, "in any spelling"
    assert "c@x" not in recipients
    assert None not in recipients
    recipients.remove("<a@x>")
    recipients.add("c@x", "NOTIFY=NEVER")
    recipients.add("<c@x>")
    assert recipients == ("b@x", "c@x")
    assert recipients[1].params["notify"] == "NEVER"
    assert repr(recipients) == "Recipients(['b@x', 'c@x'])"
    recipients.remove("c@x")
    recipients.discard("c@x")
    recipients.discard("nobody@x")
    with pytest.raises(ValueError, match="c@x"):
        recipients.remove("c@x")
    recipients.add("a@x")
    assert recipients == ["b@x", "a@x"]


def test_wrong_recipients_are_refused_at_once() -> None:
    recipients = message_of().recipients
    for wrong in ("", "<>", "a\nb", "A <a@x>", "a\0"):
        with pytest.raises(ValueError, match="address"):
            recipients.add(wrong)
    with pytest.raises(TypeError):
        recipients.add(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="parameters"):
        recipients.add("a@x", "A\nB")
    assert recipients == RECIPIENTS


def test_the_body_can_be_set_in_one_piece_or_in_many() -> None:
    message = message_of(body=b"old\r\n")
    message.body = (part for part in (b"one", b"", b"two"))
    assert message.body == b"onetwo"
    message.body = b""
    assert message.body == b""
    with pytest.raises(TypeError):
        message.body = "text"  # type: ignore[assignment]
    with pytest.raises(TypeError):
        message.body = [b"one", "two"]  # type: ignore[list-item]

    def failing() -> Iterator[bytes]:
        yield b"half"
        raise LookupError

    with pytest.raises(LookupError):
        message.body = failing()
    assert message.body == b""
    assert message.as_bytes() == b"\r\nold\r\n"


@pytest.mark.parametrize("read_before", [False, True])
def test_a_large_body_is_compared_without_being_loaded(read_before: bool) -> None:
    body = bytes(3_000_001)
    content = Gathered([], body, spooled=True)
    message = made(content)
    if read_before:
        assert message.body == body
    message.body = body[:-1] + b"x"
    assert message.body[-1:] == b"x"
    message.body = body
    assert message.body == body
    assert read_before or max(size for _, size in content.reads[:-1]) <= 1 << 20
    content.end()


def test_the_message_says_what_it_is() -> None:
    assert repr(message_of(body=b"x")) == "<Message from 'ann@client.example' to 1 recipients, body of 1 bytes>"


def test_a_message_of_python_s_own_can_be_opened_as_a_file() -> None:
    message = Message(MemoryContent([(b"A", b" 1")], b"text\r\n"), Address("a@x"), [Address("b@x")])
    with message.open() as file:
        assert file.read() == b"A: 1\r\n\r\ntext\r\n"
        file.close()
    assert file.closed
