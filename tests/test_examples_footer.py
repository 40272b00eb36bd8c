# SPDX-License-Identifier: GPL-3.0-or-later
"""examples/footer.py: whatever the message, its readers see the text and the footer, and nothing else is changed."""

import base64
import binascii
import email
from email import policy
from email.message import EmailMessage
from functools import partial

import pytest

from examples.footer import Settings, filter_with
from milter.testing import Envelope, Message
from tests.conftest import Serve
from tests.example_filters import delivered, field, send

FOOTER = Settings("-- \nExample Ltd\n")


def parsed(message: Message) -> EmailMessage:
    return email.message_from_bytes(message.as_bytes(), policy=policy.default)


def footed(serve: Serve, content: bytes | str, settings: Settings = FOOTER) -> Message:
    return delivered(send(serve(filter_with(settings)), content))


def test_plain_text_gets_the_footer_after_an_empty_line(serve: Serve) -> None:
    message = footed(serve, "Subject: hello\n\nHi.\n")
    assert message.body == b"Hi.\r\n\r\n-- \r\nExample Ltd\r\n"
    assert [header.raw for header in message.headers] == ["Subject: hello", "X-Footer: added"]


def test_an_empty_message_gets_it_too(serve: Serve) -> None:
    assert footed(serve, "Subject: hello\n\n").body == b"\r\n-- \r\nExample Ltd\r\n"


def test_html_gets_it_within_the_body_with_its_characters_escaped(serve: Serve) -> None:
    message = footed(
        serve, "Content-Type: text/html\n\n<html><BODY>Hi.</BODY></html>\n", Settings("Müller & Söhne\nBerlin")
    )
    markup = b"\r\n<p>M&#252;ller &amp; S&#246;hne<br>\r\nBerlin</p>\r\n"
    assert message.body == b"<html><BODY>Hi." + markup + b"</BODY></html>\r\n"


def test_html_without_an_end_gets_it_at_its_end(serve: Serve) -> None:
    message = footed(serve, "Content-Type: text/html\n\n<b>Hi.</b>\n", Settings("", html="<i>Bye.</i>"))
    assert message.body == b"<b>Hi.</b>\r\n\r\n<i>Bye.</i>\r\n"


ALTERNATIVE = """\
MIME-Version: 1.0
Content-Type: multipart/mixed; boundary=outer

preamble
--outer
Content-Type: multipart/alternative;
  boundary="in ner"

--in ner
Content-Type: text/plain; charset=utf-8

Hi.
--in ner
Content-Type: text/html; charset=utf-8

<p>Hi.</p></body>
--in ner
Content-Type: text/calendar

BEGIN:VCALENDAR
--in ner--
--outer
Content-Type: text/plain; name=notes.txt
content-disposition:   ATTACHMENT; filename=notes.txt

Notes.	{SPACE}
--outer--
epilogue
""".replace("{SPACE}", " ")


def test_both_texts_of_an_alternative_get_it_and_no_other_byte_changes(serve: Serve) -> None:
    message = footed(serve, ALTERNATIVE)
    expected = ALTERNATIVE.partition("\n\n")[2].replace("\n", "\r\n")
    expected = expected.replace("Hi.\r\n--in", "Hi.\r\n\r\n-- \r\nExample Ltd\r\n\r\n--in")
    expected = expected.replace("</body>", "\r\n<p>-- <br>\r\nExample Ltd</p>\r\n</body>")
    assert message.body.decode() == expected


def test_a_part_that_ends_where_the_delimiter_begins_gets_a_line_end(serve: Serve) -> None:
    message = parsed(footed(serve, ALTERNATIVE))
    text = message.get_body(("plain",))
    assert text is not None
    assert text.get_content() == "Hi.\r\n\r\n-- \r\nExample Ltd\r\n"


@pytest.mark.parametrize("boundary", ["b", "a'()+_,-./:=?"])
def test_empty_parts_and_odd_boundaries_are_no_trouble(serve: Serve, boundary: str) -> None:
    parts = f"--{boundary}\n\nHi.\n--{boundary}\n--{boundary}\n\n\n--{boundary}--"
    message = footed(serve, f'Content-Type: multipart/mixed; boundary="{boundary}"\n\n{parts}\n')
    expected = parts.replace("Hi.\n", "Hi.\n\n-- \nExample Ltd\n\n", 1).replace("\n", "\r\n") + "\r\n"
    assert message.body.decode() == expected


def test_a_charset_that_has_the_characters_stays(serve: Serve) -> None:
    content = "Content-Type: text/plain; charset=iso-8859-1\nContent-Transfer-Encoding: 8bit\n\nGrüße\n"
    message = footed(serve, content.encode("latin-1"), Settings("Müller\n"))
    assert message.body == "Grüße\r\n\r\nMüller\r\n".encode("latin-1")
    assert field(message, "Content-Type") == "text/plain; charset=iso-8859-1"


def test_a_charset_without_the_characters_becomes_utf_8(serve: Serve) -> None:
    content = "Content-Type: text/plain; charset=iso-8859-1; format=fixed\nContent-Transfer-Encoding: 8bit\n\nGrüße\n"
    message = footed(serve, content.encode("latin-1"), Settings("5 €\n"))
    assert message.body == "Grüße\r\n\r\n5 €\r\n".encode()
    assert parsed(message).get_content() == "Grüße\r\n\r\n5 €\r\n"
    assert field(message, "Content-Type") == 'text/plain; charset="utf-8"; format="fixed"'


def test_a_long_line_is_encoded(serve: Serve) -> None:
    message = footed(serve, "From: ann@client.example\n\nHi.\n", Settings("x" * 999))
    assert field(message, "Content-Transfer-Encoding") == "quoted-printable"
    assert max(map(len, message.body.split(b"\r\n"))) <= 76


def test_the_last_end_of_an_html_body_counts(serve: Serve) -> None:
    message = footed(serve, "Content-Type: text/html\n\n<!-- </body> -->Hi.</body>\n", Settings("", html="Bye."))
    assert message.body == b"<!-- </body> -->Hi.\r\nBye.\r\n</body>\r\n"


def test_plain_ascii_gets_a_footer_that_is_not(serve: Serve) -> None:
    message = footed(serve, "From: ann@client.example\n\nHi = hi.\n", Settings("Grüße\n"))
    assert parsed(message).get_content() == "Hi = hi.\r\n\r\nGrüße\r\n"
    assert message.body.isascii()
    assert field(message, "Content-Transfer-Encoding") == "quoted-printable"
    assert field(message, "MIME-Version") == "1.0"


def test_the_part_alone_changes_its_charset(serve: Serve) -> None:
    content = "Content-Type: multipart/mixed; boundary=b\n\n--b\nX-One: as  it\n is\n\nHi.\n--b\n\nNotes\n--b--\n"
    message = footed(serve, content, Settings("Grüße\n"))
    first, second = parsed(message).iter_parts()
    assert (first.get_content(), second.get_content()) == ("Hi.\r\n\r\nGrüße\r\n", "Notes")
    assert b"X-One: as  it\r\n is\r\n" in message.body
    assert [header.name for header in message.headers] == ["Content-Type", "X-Footer"]


@pytest.mark.parametrize("encoding", ["base64", "quoted-printable"])
@pytest.mark.parametrize("charset", ["utf-8", "iso-8859-15", "iso-2022-jp"])
def test_encoded_text_stays_encoded(serve: Serve, encoding: str, charset: str) -> None:
    text = "日本語 text\r\n" if charset == "iso-2022-jp" else f"long line {'x' * 200} = ü\r\n"
    encode = base64.encodebytes if encoding == "base64" else partial(binascii.b2a_qp, istext=True)
    head = f"Content-Type: text/plain; charset={charset}\nContent-Transfer-Encoding: {encoding}\n\n"
    message = footed(serve, head.encode() + encode(text.encode(charset)))
    assert parsed(message).get_payload(decode=True) == f"{text}\r\n-- \r\nExample Ltd\r\n".encode(charset)
    assert field(message, "Content-Transfer-Encoding") == encoding
    assert max(map(len, message.body.split(b"\r\n"))) <= 76


def test_utf_16_becomes_base64(serve: Serve) -> None:
    head = b"Content-Type: text/plain; charset=utf-16-le\nContent-Transfer-Encoding: quoted-printable\n\n"
    body = binascii.b2a_qp("Hi.".encode("utf-16-le"), istext=False) + b"=\n"
    message = footed(serve, head + body)
    assert parsed(message).get_payload(decode=True) == "Hi.\r\n\r\n-- \r\nExample Ltd\r\n".encode("utf-16-le")
    assert field(message, "Content-Transfer-Encoding") == "base64"


def test_bytes_of_no_charset_survive(serve: Serve) -> None:
    assert footed(serve, b"Subject: x\nContent-Transfer-Encoding: 8bit\n\n\xff\xfe\n").body == (
        b"\xff\xfe\r\n\r\n-- \r\nExample Ltd\r\n"
    )


def test_flowing_text_does_not_flow_into_the_footer(serve: Serve) -> None:
    content = "Content-Type: text/plain; format=flowed\n\nA paragraph that \n"
    message = footed(serve, content, Settings("-- \n> Example \nFrom us \n done\n"))
    assert message.body == b"A paragraph that \r\n\r\n-- \r\n > Example\r\n From us\r\n  done\r\n"


def nested(depth: int) -> bytes:
    content = b"Content-Type: text/plain\n\nHi.\n"
    for level in range(depth):
        content = b"Content-Type: multipart/mixed; boundary=b%d\n\n--b%d\n%b--b%d--\n" % (level, level, content, level)
    return content


def of_parts(count: int) -> bytes:
    return b"Content-Type: multipart/alternative; boundary=b\n\n" + b"--b\n\nHi.\n" * count + b"--b--\n"


LEFT_ALONE = {
    "nested too deeply": nested(500),
    "too many parts": of_parts(1001),
    "multipart/signed": b"Content-Type: multipart/signed; boundary=b\n\n--b\n\nHi.\n--b\n\nsig\n--b--\n",
    "inside": (
        b"Content-Type: multipart/mixed; boundary=a\n\n--a\n\nHi.\n--a\n"
        b"Content-Type: multipart/signed; boundary=b\n\n--b\n\nHi.\n--b--\n--a--\n"
    ),
    "multipart/encrypted": b"Content-Type: multipart/encrypted; boundary=b\n\n--b\n\nHi.\n--b--\n",
    "S/MIME": b"Content-Type: application/pkcs7-mime\n\nMIAG\n",
    "PGP": b"Subject: x\n\n-----BEGIN PGP SIGNED MESSAGE-----\n\nHi.\n",
    "DKIM": b"DKIM-Signature: v=1\n\nHi.\n",
    "image": b"Content-Type: image/png\nContent-Transfer-Encoding: base64\n\nAAAA\n",
    "attachment": b"Content-Disposition: attachment\n\nHi.\n",
    "no boundary": b"Content-Type: multipart/mixed\n\nHi.\n",
    "cut short": b"Content-Type: multipart/mixed; boundary=b\n\n--b\n\nHi.\n",
    "broken base64": b"Content-Transfer-Encoding: base64\n\nA===B\n",
    "strange base64": b"Content-Transfer-Encoding: base64\n\nSG!ku\n",
    "escapes that say nothing": b"Content-Type: text/plain; charset=iso-2022-jp\n\n\x1b$B\x1b(BHi.\n",
    "stray bytes in a type": b'Content-Type: multipart/mixed; boundary="\xff\n b"\n\n--b\n\nHi.\n--b--\n',
    "an empty part": b"Content-Type: multipart/mixed; boundary=b\n\n--b\n--b--\n",
    "unknown encoding": b"Content-Transfer-Encoding: x-uuencode\n\nHi.\n",
    "unknown charset": b"Content-Type: text/plain; charset=x-nobody\n\nHi.\n",
    "two part headers": b"Content-Type: multipart/mixed; boundary=b\n\n--b\nX: y\n--b--\n",
}


@pytest.mark.parametrize("content", LEFT_ALONE.values(), ids=LEFT_ALONE)
def test_what_is_sealed_or_cannot_be_understood_is_left_alone(serve: Serve, content: bytes) -> None:
    message = footed(serve, content)
    reason = field(message, "X-Footer")
    assert reason is not None
    assert reason.startswith("none (")
    assert message.body == Message.parse(content).body
    assert message.headers[:-1] == Message.parse(content).headers


@pytest.mark.parametrize("content", [nested(50), of_parts(1000)], ids=["nested", "many parts"])
def test_large_messages_are_no_trouble(serve: Serve, content: bytes) -> None:
    assert field(footed(serve, content), "X-Footer") == "added"


def test_bytes_that_nobody_knows_are_not_made_utf_8(serve: Serve) -> None:
    message = footed(serve, b"Subject: x\n\n\xff\n", Settings("Grüße\n"))
    assert field(message, "X-Footer") == "none (text that is not of its charset)"


def test_dkim_is_broken_where_that_is_wanted(serve: Serve) -> None:
    message = footed(serve, LEFT_ALONE["DKIM"], Settings("Bye.\n", break_dkim=True))
    assert message.body == b"Hi.\r\n\r\nBye.\r\n"


def test_a_message_that_has_a_footer_gets_no_second_one(serve: Serve) -> None:
    peer = serve(filter_with(FOOTER))
    once = delivered(send(peer, "Subject: x\n\nHi.\n"))
    twice = delivered(send(peer, once.as_bytes()))
    assert twice == once


def test_only_mail_of_the_named_domains_gets_one(serve: Serve) -> None:
    peer = serve(filter_with(Settings("Bye.\n", domains=frozenset({"example.org"}))))
    foreign = delivered(send(peer, "Subject: x\n\nHi.\n"))
    own = delivered(send(peer, "Subject: x\n\nHi.\n", Envelope.of("ann@Example.ORG", "bob@mta.example")))
    assert (foreign.body, own.body) == (b"Hi.\r\n", b"Hi.\r\n\r\nBye.\r\n")


def test_settings_come_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("footer") / "footer.txt"
    path.write_text("Grüße\n", "utf-8")
    monkeypatch.setenv("FOOTER_FILE", str(path))
    monkeypatch.setenv("FOOTER_DOMAINS", "Example.org example.net")
    monkeypatch.setenv("FOOTER_BREAK_DKIM", "yes")
    assert Settings.from_environment() == Settings(
        "Grüße\n", domains=frozenset({"example.org", "example.net"}), break_dkim=True
    )
