# SPDX-License-Identifier: GPL-3.0-or-later
"""examples/attachments.py: programs do not get through, however they are called and wherever they lie."""

import base64
import io
import zipfile
from collections.abc import Callable, Mapping
from email.message import EmailMessage

import pytest

from examples import attachments
from examples.attachments import Settings, filter_with
from milter.testing import Outcome
from tests.conftest import Serve
from tests.example_filters import delivered, field, refusal, send

PROGRAM = b"MZ\x90\0" + b"\0" * 60 + b"PE\0\0"


def message_with(disposition: str, content: bytes = b"text", type: str = "application/octet-stream") -> bytes:
    """A message with one attachment; its header fields exactly as given."""
    return (
        (
            f"Subject: x\nMIME-Version: 1.0\nContent-Type: multipart/mixed; boundary=b\n\n--b\n\nHi.\n--b\n"
            f"Content-Type: {type}\nContent-Disposition: {disposition}\nContent-Transfer-Encoding: base64\n\n"
        ).encode()
        + base64.encodebytes(content)
        + b"--b--\n"
    )


def named(name: str, content: bytes = b"text") -> bytes:
    return message_with(f'attachment; filename="{name}"', content)


def zipped(files: Mapping[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return file.getvalue()


def forwarded(content: bytes) -> bytes:
    return (
        b"Subject: fwd\nMIME-Version: 1.0\nContent-Type: multipart/mixed; boundary=f\n\n--f\n"
        b"Content-Type: message/rfc822\n\n" + content + b"\n--f--\n"
    )


NESTED = zipped({"one.zip": zipped({"two.zip": zipped({"dir/run.scr": b""})})})
BEYOND_LIMITS = {
    "too many parts": forwarded(b"A: b\n\n")[:-5] + b"--f\n\n\n" * 1200 + named("setup.exe"),
    "a field that is too long": message_with("attachment; x=" + "y " * 5000 + "; filename*=utf-8''setup.e%78e"),
    "too deep": b"".join(
        b"Content-Type: multipart/mixed; boundary=b%d\n\n--b%d\n" % (level, level) for level in range(30)
    )
    + named("setup.exe"),
}
REFUSED = {
    "name": named("setup.exe"),
    "case": named("SETUP.ExE"),
    "two extensions": named("invoice.pdf.js"),
    "dots and spaces at the end": named("setup.exe. . "),
    "right-to-left override": named("gpj.\u202eexe"),
    "wide letters": named("setup.ｅｘｅ"),
    "RFC 2231": message_with("attachment; filename*=utf-8''%73etup.e%78e"),
    "RFC 2231, continued": message_with("attachment; filename*0*=utf-8''s%65tup; filename*1=.e; filename*2*=%78e"),
    "RFC 2047": named("=?utf-8?B?c2V0dXAuZXhl?="),
    "RFC 2047, not quoted": message_with("attachment; filename==?utf-8?B?c2V0dXAuZXhl?="),
    "RFC 2047, in pieces": named("=?utf-8?Q?setup?= =?utf-8?Q?=2Eexe?="),
    "RFC 2047, of the older name": message_with(
        "attachment", type="application/octet-stream; name==?utf-8?B?c2V0dXAuZXhl?="
    ),
    "two names": message_with("attachment; filename=a.txt; filename=b.exe"),
    "two names, one by RFC 2231": message_with("attachment; filename*=utf-8''a.txt; filename=b.exe"),
    "two fields": message_with("attachment; filename=a.txt", type="application/octet-stream; name=b.exe"),
    "spaces without quotes": message_with("attachment; filename=my setup.exe"),
    "no semicolon": message_with("attachment filename=setup.exe"),
    "no second quote": message_with('attachment; filename="setup.exe'),
    "spaces around": message_with('attachment; FileName =\n "setup.exe"'),
    "inline": message_with("inline; filename=setup.exe"),
    "older name": message_with("attachment", type="application/octet-stream; name=setup.exe"),
    "type": message_with("attachment; filename=x", type="Application/X-MSDownload"),
    "content": named("holiday.jpg", PROGRAM),
    "zip": named("a.zip", zipped({"readme.txt": b"", "run.exe": b""})),
    "zip by another name": named("a.dat", zipped({"run.exe": b""})),
    "zip in a zip in a zip": named("a.zip", NESTED),
    "message in a message": forwarded(forwarded(named("setup.exe"))),
    "message as a file": named("mail.eml", named("setup.exe")),
    "message in a zip": named("a.zip", zipped({"mail.eml": named("setup.exe")})),
    "the message itself": b"Subject: x\nContent-Type: application/octet-stream; name=a.vbs\n\nMsgBox\n",
}


@pytest.mark.parametrize("content", REFUSED.values(), ids=REFUSED)
def test_programs_are_refused(serve: Serve, content: bytes) -> None:
    transcript = send(serve(filter_with(Settings())), content)
    assert transcript.outcome is Outcome.REJECTED
    assert "are not accepted here" in refusal(transcript)


PASSED = {
    "plain": b"Subject: setup.exe\n\nsetup.exe\n",
    "picture": named("exe.jpg", b"MZ is how it begins"),
    "no extension": named("exe"),
    "zip": named("a.zip", zipped({"exe/readme.txt": PROGRAM, "inner.zip": zipped({"b.txt": b""})})),
    "message": forwarded(named("a.pdf")),
}


@pytest.mark.parametrize("content", PASSED.values(), ids=PASSED)
def test_other_attachments_pass_untouched(serve: Serve, content: bytes) -> None:
    message = delivered(send(serve(filter_with(Settings())), content))
    assert field(message, "Subject") in ("x", "fwd", "setup.exe")
    assert message.body == content.partition(b"\n\n")[2].replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")


def test_the_refusal_names_the_file_in_ascii(serve: Serve) -> None:
    transcript = send(serve(filter_with(Settings())), named("Übung%.exe"))
    assert refusal(transcript).endswith("attachments that end in .exe are not accepted here: ?bung%%.exe")


def bomb(monkeypatch: pytest.MonkeyPatch) -> bytes:
    monkeypatch.setattr(attachments, "MOST_BYTES", 1000)
    return zipped({"inner.zip": b"\0" * 100_000})


def several(monkeypatch: pytest.MonkeyPatch) -> bytes:
    """None of them is too large by itself."""
    monkeypatch.setattr(attachments, "MOST_BYTES", 1000)
    return zipped({f"{number}.zip": zipped({"a.txt": b""}) for number in range(50)})


def many(monkeypatch: pytest.MonkeyPatch) -> bytes:
    monkeypatch.setattr(attachments, "MOST_ENTRIES", 3)
    return zipped({str(number): b"" for number in range(4)})


def many_in_all(monkeypatch: pytest.MonkeyPatch) -> bytes:
    monkeypatch.setattr(attachments, "MOST_ENTRIES", 6)
    return zipped({f"{number}.zip": zipped({"a": b"", "b": b""}) for number in range(3)})


def deep(monkeypatch: pytest.MonkeyPatch) -> bytes:
    content = zipped({"readme.txt": b""})
    for _ in range(attachments.DEEPEST):
        content = zipped({"inner.zip": content})
    return content


def encrypted(monkeypatch: pytest.MonkeyPatch) -> bytes:
    content = bytearray(zipped({"inner.zip": zipped({"a.txt": b""})}))
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(signature) + offset] |= 1
    return bytes(content)


def broken(monkeypatch: pytest.MonkeyPatch) -> bytes:
    return zipped({"readme.txt": b"text"})[:-10]


def no_zip(monkeypatch: pytest.MonkeyPatch) -> bytes:
    """Something that begins otherwise; a program that goes by the name may find an archive in it."""
    return b"text"


UNREADABLE = {
    bomb: "inner.zip is too large",
    several: "9.zip is too large",
    many: "a.zip has 4 files",
    many_in_all: "1.zip has 2 files",
    deep: "messages and archives are nested too deeply",
    encrypted: "inner.zip: File <ZipInfo filename='inner.zip'",
    broken: "a.zip: File is not a zip file",
    no_zip: "a.zip: File is not a zip file",
}


@pytest.mark.parametrize(("make", "reason"), UNREADABLE.items())
def test_an_archive_that_cannot_be_looked_into_is_refused(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, make: Callable[[pytest.MonkeyPatch], bytes], reason: str
) -> None:
    content = named("a.zip", make(monkeypatch))
    closed = send(serve(filter_with(Settings())), content)
    assert f"an attachment cannot be checked: {reason}" in refusal(closed)


def test_an_archive_that_cannot_be_looked_into_may_pass(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = send(serve(filter_with(Settings(refuse_unreadable=False))), named("a.zip", broken(monkeypatch)))
    assert opened.outcome is Outcome.ACCEPTED


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_no_broken_archive_is_an_error_of_the_filter(method: int) -> None:
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w", method) as archive:
        archive.writestr("mail.eml", b"Subject: x\n\nHi.\n" * 9)
        archive.writestr("inner.zip", zipped({"a.txt": b"text"}))
    content = inner.getvalue()
    obstacles = 0
    for place in range(len(content)):
        for byte in (b"\0", b"\x10", b"\xff"):
            broken = attachments.File(("a.zip",), content=content[:place] + byte + content[place + 1 :])
            found = attachments.or_obstacle(broken, attachments.archived(broken, attachments.Budget(), 1))
            obstacles += any(file.obstacle for file in found)
    assert obstacles


@pytest.mark.parametrize(
    "before",
    [b"PK, but no zip file", zipped({"broken.zip": b"PK", "setup.exe": b""})],
    ids=["an attachment", "a file in the archive"],
)
def test_behind_something_unreadable_a_program_is_found_all_the_same(serve: Serve, before: bytes) -> None:
    both = named("a.zip", before).replace(
        b"--b--\n", b"--b\nContent-Disposition: attachment; filename=x.exe\n\n--b--\n"
    )
    assert "attachments that end in .exe" in refusal(send(serve(filter_with(Settings(refuse_unreadable=False))), both))


def test_messages_nested_too_deeply_are_refused(serve: Serve) -> None:
    content = b"Subject: x\n\nHi.\n"
    for _ in range(attachments.DEEPEST + 1):
        content = named("mail.eml", content)
    assert "nested too deeply" in refusal(send(serve(filter_with(Settings())), content))


def test_one_may_choose_what_is_refused(serve: Serve) -> None:
    peer = serve(filter_with(Settings(frozenset({"pdf"}), frozenset({"text/html"}))))
    assert send(peer, named("setup.exe")).outcome is Outcome.ACCEPTED
    assert send(peer, named("a.pdf")).outcome is Outcome.REJECTED
    assert send(peer, message_with("inline", b"<p>", "text/html")).outcome is Outcome.REJECTED


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTACHMENTS_EXTENSIONS", "EXE js")
    monkeypatch.setenv("ATTACHMENTS_TYPES", "text/html")
    monkeypatch.setenv("ATTACHMENTS_ON_UNREADABLE", "accept")
    expected = Settings(frozenset({"exe", "js"}), frozenset({"text/html"}), refuse_unreadable=False)
    assert Settings.from_environment() == expected


def test_what_the_email_package_makes_is_read(serve: Serve) -> None:
    message = EmailMessage()
    message.set_content("Hi.")
    message.add_attachment(b"", maintype="application", subtype="zip", filename="Präsentation.exe")
    assert send(serve(filter_with(Settings())), bytes(message)).outcome is Outcome.REJECTED


@pytest.mark.parametrize("content", BEYOND_LIMITS.values(), ids=BEYOND_LIMITS)
def test_what_is_beyond_the_limits_of_parsing_is_no_way_around(serve: Serve, content: bytes) -> None:
    assert "an attachment cannot be checked" in refusal(send(serve(filter_with(Settings())), content))
