# SPDX-License-Identifier: GPL-3.0-or-later
"""Input that is made to keep a filter busy: what does it cost when there is twice as much of it?

    python -m benchmarks.linear [name …]

prints for each kind of input the time that it took, and how many times as long twice and four times as much took. 2 is
linear, 4 is quadratic. A ratio of two times within one run says something on a busy machine, too, a time does not.

tests/test_linear.py counts steps of Python for the same inputs. What it cannot see is the work that a single step does
in C, such as a search; that is what this program is for.
"""

import base64
import contextlib
import io
import sys
import time
import zipfile
from collections.abc import Callable, Iterable
from email.message import EmailMessage
from typing import Any, NamedTuple, cast

from examples import attachments, footer
from milter import Address, Context, EomContext, Message
from milter.context import Conversation, Transaction
from milter.edits import Numbering, changes
from milter.message import MemoryContent

Act = Callable[[Any], object]


class Case(NamedTuple):
    make: Callable[[int], Any]
    """The input of a size."""
    act: Act
    """What is measured."""
    size: int = 2000


# ---- Messages that are parsed


def message(fields: Iterable[tuple[bytes, bytes]] = (), body: bytes = b"", recipients: int = 1) -> Message:
    addresses = [Address(f"user{number}@mta.example") for number in range(recipients)]
    return Message(MemoryContent([(name, b" " + value) for name, value in fields], body), Address(""), addresses)


def field(name: bytes, before: bytes, repeated: bytes, after: bytes = b"") -> Callable[[int], Message]:
    """A message with a field that has something so many times."""
    return lambda size: message([(name, before + repeated * size + after)])


def parts(head: bytes, part: bytes, end: bytes = b"") -> Callable[[int], Message]:
    """A message of many parts."""
    return lambda size: message([(b"Content-Type", head)], part * size + end)


def encoded(encoding: bytes, repeated: bytes, before: bytes = b"") -> Callable[[int], Message]:
    """A message in a transfer encoding."""
    return lambda size: message([(b"Content-Transfer-Encoding", encoding)], before + repeated * size)


def nested(kind: bytes) -> Callable[[int], Message]:
    """Parts in parts."""

    def make(size: int) -> Message:
        levels = [
            b"--b%d\r\nContent-Type: %b; boundary=b%d\r\n\r\n" % (level, kind, level + 1) for level in range(size)
        ]
        return message([(b"Content-Type", b"%b; boundary=b0" % kind)], b"".join(levels) + b"text\r\n" * size)

    return make


def read_all(received: Message) -> None:
    """What filters ask a message for."""
    email = received.email()
    for part in email.walk():
        assert isinstance(part, EmailMessage)
        part.items(), part.get_content_type(), part.get_content_charset(), part.get_filename(), part.get_params()
        part.get_boundary(), part.is_attachment(), part.get_content_disposition(), part.get_payload(decode=True)
        for name in ("From", "Subject", "Date", "Message-ID", "References", "Received"):
            part.get_all(name)
        if not part.is_multipart():
            part.get_payload()
            if part.get_content_maintype() == "text":
                part.get_content()
    email.get_body(), list(email.iter_attachments()) if email.get_content_maintype() == "multipart" else ()
    bytes(email), email.as_string()


MIXED = b"multipart/mixed; boundary=a"
PARSED = {
    "comments": field(b"From", b"", b"(a)"),
    "comments in one": field(b"To", b"(", b",(a)"),
    "comments with spaces": field(b"From", b"", b"(a) "),
    "open comments": field(b"From", b"", b"("),
    "commas": field(b"To", b"a@b", b", 1"),
    "addresses": field(b"To", b"", b"a <a@b>, "),
    "quotes": field(b"To", b"", b'"a" '),
    "open quote": field(b"From", b'"', b"\\a"),
    "route": field(b"From", b"<", b"@a,"),
    "stray bytes": field(b"To", b"", b"\xff "),
    "encoded words": field(b"Subject", b"", b"=?utf-8?q?a?= "),
    "encoded words without spaces": field(b"Subject", b"", b"=?utf-8?q?a?="),
    "open encoded words": field(b"Subject", b"", b"=?utf-8?q?"),
    "words": field(b"Subject", b"", b"a "),
    "ids": field(b"References", b"", b"<a@b> "),
    "id": field(b"Message-ID", b"<", b"(a)"),
    "received": field(b"Received", b"", b"from a by b; "),
    "date": field(b"Date", b"Mon, 1 ", b"1 "),
    "semicolons": field(b"Content-Type", b"text/plain", b";"),
    "semicolons with spaces": field(b"Content-Type", b"text/plain", b"; "),
    "semicolons in a quote": field(b"Content-Disposition", b'attachment; a="', b";"),
    "parameters": field(b"Content-Type", b"text/plain", b"; a=b"),
    "continuations": field(b"Content-Disposition", b"attachment", b"; filename*0*=a"),
    "numbered continuations": lambda size: message(
        [(b"Content-Disposition", b"attachment" + b"".join(b"; filename*%d=a" % number for number in range(size)))]
    ),
    "equal signs": field(b"Content-Type", b"text/plain; a=", b"="),
    "transfer encoding": field(b"Content-Transfer-Encoding", b"", b"(a)"),
    "version": field(b"MIME-Version", b"1.0", b"(a)"),
    "folds": field(b"Subject", b"a", b"\n b"),
    "a word": field(b"Subject", b"", b"\xff"),
    "fields": lambda size: message([(b"X-A", b"a")] * size),
    "fields of all names": lambda size: message([(b"X-%d" % number, b"a") for number in range(size)]),
    "long fields": lambda size: message([(b"From", b"(a)" * 300)] * (size // 100)),
    "fields and parts": lambda size: message(
        [*([(b"X-A", b"a")] * size), (b"Content-Type", MIXED)], b"--a\r\n\r\n" * size
    ),
    "parts with a long container": lambda size: message(
        [(b"Content-Type", b"multipart/mixed; boundary=a" + b"; " * 2000)], b"--a\r\n\r\n" * size
    ),
    "parts": parts(MIXED, b"--a\r\n\r\n"),
    "parts with fields": parts(MIXED, b"--a\r\nContent-Type: text/plain; name=a\r\n\r\na\r\n"),
    "parts of type digest": parts(b"multipart/digest; boundary=a", b"--a\r\n\r\nA: b\r\n\r\na\r\n"),
    "related parts": parts(b"multipart/related; boundary=a; start=b", b"--a\r\nContent-ID: b\r\n\r\n"),
    "boundaries": parts(MIXED, b"--a\r\n"),
    "half boundaries": parts(MIXED, b"--", b"\r\n"),
    "blocks of a delivery status": parts(b"message/delivery-status", b"A: b\r\n\r\n"),
    "empty lines of a delivery status": parts(b"message/delivery-status", b"\r\n"),
    "messages in messages": parts(b"message/rfc822", b"Content-Type: message/rfc822\r\n\r\n"),
    "parts in parts": nested(b"multipart/mixed"),
    "alternatives in alternatives": nested(b"multipart/alternative"),
    "carriage returns": parts(MIXED, b"\r"),
    "lines": parts(b"text/plain; charset=none", b"\xff\r\n"),
    "no empty line": parts(b"text/plain", b"A\r\n"),
    "punycode": parts(b"text/plain; charset=punycode", b"a-b"),
    "utf-7": parts(b"text/plain; charset=utf-7", b"+AGE-"),
    "uuencode": lambda size: message(
        [(b"Content-Transfer-Encoding", b"x-uuencode")], b"begin 644 a\r\n" + b"!\r\n" * size
    ),
    "begins of uuencode": lambda size: message([(b"Content-Transfer-Encoding", b"uue")], b"begin a\r\n" * size),
    "broken base64": lambda size: message([(b"Content-Transfer-Encoding", b"base64")], b"=a=\r\n" * size),
    "quoted-printable": lambda size: message([(b"Content-Transfer-Encoding", b"quoted-printable")], b"= \r\n=4" * size),
}


# ---- Edits


def tagged(size: int) -> Message:
    return message([(b"X-Spam", b"%d" % number) for number in range(size)])


def changed(received: Message, numbering: Numbering = Numbering.SENDMAIL) -> None:
    changes(received, lambda: numbering)


def delete(received: Message) -> None:
    del received.headers["X-Spam"]
    changed(received)


def replace_all(received: Message) -> None:
    for index in range(len(received.headers)):
        received.headers.replace("X-Spam", "new", index + 1)
    changed(received)


def delete_from_the_top(received: Message) -> None:
    while "X-Spam" in received.headers:
        received.headers.replace("X-Spam", None)
    changed(received)


def delete_from_the_bottom(received: Message) -> None:
    while received.headers:
        received.headers.replace("X-Spam", None, len(received.headers))
    changed(received)


def rename(received: Message) -> None:
    for name, value in received.headers.items():
        received.headers.replace(name, None)
        received.headers.add("X-New", value)
    changed(received)


def insert_above(received: Message) -> None:
    for _ in range(len(received.headers)):
        received.headers.insert(0, "X-Spam", "v")
    changed(received)


def insert_below(received: Message) -> None:
    for _ in range(len(received.headers)):
        received.headers.insert(len(received.headers), "X-Spam", "v")
    changed(received)


def look_up_and_set(received: Message) -> None:
    headers = received.headers
    for name in headers:
        if name in headers and headers.get(name) and headers.setdefault(name, "v"):
            headers[name] = "new"
    headers["X-Spam"] = "one"
    headers.get_all("X-Spam")
    changed(received)


def make_and_delete(received: Message) -> None:
    for number in range(len(received.headers)):
        received.headers.add("X-New", str(number))
    del received.headers["X-New"]
    changed(received)


def empty_all(received: Message) -> None:
    for name in received.headers:
        received.headers[name] = ""
    changed(received)


def add_recipients(received: Message) -> None:
    for number in range(len(received.recipients)):
        received.recipients.add(f"new{number}@mta.example")
    changed(received)


def remove_recipients(received: Message) -> None:
    for recipient in received.recipients:
        received.recipients.remove(recipient)
        received.recipients.discard(recipient)
    for number in range(len(received.recipients)):
        received.recipients[number]
    changed(received)


def remove_and_add_recipients(received: Message) -> None:
    for recipient in received.recipients:
        received.recipients.remove(recipient)
        received.recipients.add(recipient)
    changed(received)


def remove_spellings(received: Message) -> None:
    for recipient in received.recipients:
        received.recipients.remove(str(recipient))
        len(received.recipients)
        with contextlib.suppress(ValueError):
            received.recipients.remove("other@mta.example")
    changed(received)


def set_body(received: Message) -> None:
    received.body = [b"a\r\n"] * received.size
    changed(received)


def named(size: int) -> Message:
    return message([(b"X-%d" % number, b"v") for number in range(size)])


def addressed(size: int) -> Message:
    return message(recipients=size)


def spelt(size: int) -> list[Address]:
    """One mailbox, in that many spellings."""
    letters = "abcdefghijklmnop"
    return [
        Address.from_arguments(
            ["".join(c.upper() if number >> place & 1 else c for place, c in enumerate(letters)) + "@mta.example"]
        )
        for number in range(size)
    ]


def addressed_to_one(size: int) -> Message:
    return Message(MemoryContent([], b""), Address(""), spelt(size))


EDITED = {
    "delete": Case(tagged, delete),
    "replace all": Case(tagged, replace_all),
    "delete from the top": Case(tagged, delete_from_the_top),
    "delete from the bottom": Case(tagged, delete_from_the_bottom),
    "rename": Case(tagged, rename),
    "rename all names": Case(named, rename),
    "insert above": Case(tagged, insert_above),
    "insert below": Case(tagged, insert_below),
    "look up and set": Case(tagged, look_up_and_set),
    "look up and set all names": Case(named, look_up_and_set),
    "make and delete": Case(tagged, make_and_delete),
    "empty all": Case(named, empty_all),
    "add recipients": Case(addressed, add_recipients),
    "remove recipients": Case(addressed, remove_recipients),
    "remove and add recipients": Case(addressed, remove_and_add_recipients),
    "remove spellings": Case(addressed_to_one, remove_spellings),
    "body in pieces": Case(tagged, set_body),
}

# ---- What a context tells


class Silent:
    """As much of a call as a context needs, to remove recipients."""

    def remove_recipient(self, address: bytes) -> None: ...


def at_rcpt(recipients: list[Address]) -> None:
    """At each recipient look at those before it."""
    conversation = Conversation(1, None, None)
    transaction = conversation.transaction = Transaction(Address(""))
    context: Context[Any, Any] = Context(conversation, cast(Any, Silent()))
    for recipient in recipients:
        if len(context.recipients) > 3:
            context.recipients[0], context.recipients[-1], context.recipients[1:3], next(iter(context.recipients))
        transaction.recipients.append(recipient)


def at_end(recipients: list[Address], texts: Iterable[str]) -> None:
    """Remove recipients by a text."""
    conversation = Conversation(1, None, None)
    transaction = conversation.transaction = Transaction(Address(""))
    transaction.recipients += recipients
    context: EomContext[Any, Any] = EomContext(conversation, cast(Any, Silent()))
    for text in texts:
        context.remove_recipient(text)


TOLD = {
    "recipients at RCPT": Case(spelt, at_rcpt),
    "remove each by its text": Case(spelt, lambda recipients: at_end(recipients, map(str, recipients))),
    "remove each by another text": Case(
        spelt, lambda recipients: at_end(recipients, (recipient.canonical for recipient in recipients))
    ),
    "parameters of a recipient": Case(
        lambda size: Address.from_arguments(["bob@mta.example", *(f"A{number}=b" for number in range(size))]),
        lambda recipient: [recipient.params[name] for name in recipient.params if name in recipient.params],
    ),
}

# ---- The examples that parse


def look_for_attachments(received: Message) -> None:
    settings = attachments.Settings(refuse_unreadable=False)
    for file in attachments.files(received.email(), attachments.Budget()):
        attachments.refused(file, settings)


def add_a_footer(received: Message) -> None:
    settings = footer.Settings("-- \nA footer that is not ASCII: ä\n")
    with contextlib.suppress(footer.LeftAlone):
        footer.with_footer(footer.Part.of(received.as_bytes()), settings).as_bytes()


def first_part(before: bytes, repeated: bytes) -> Callable[[int], Message]:
    """A message whose first part has a field with something so many times."""
    return lambda size: message(
        [(b"Content-Type", MIXED)], b"--a\r\n" + before + repeated * size + b"\r\n\r\ntext\r\n--a--\r\n"
    )


def archive(size: int) -> Message:
    """Of many files, with an archive in it."""
    inner, outer = io.BytesIO(), io.BytesIO()
    for file in (inner, outer):
        with zipfile.ZipFile(file, "w") as opened:
            for number in range(size):
                opened.writestr(f"{number}.eml" if number % 10 == 0 else f"{number}", b"A: b\r\n\r\n")
            opened.writestr("a.zip", inner.getvalue())
    fields = [(b"Content-Type", b"application/zip"), (b"Content-Transfer-Encoding", b"base64")]
    return message(fields, base64.encodebytes(outer.getvalue()))


EXAMPLES = {
    **{f"attachments: {name}": Case(make, look_for_attachments) for name, make in PARSED.items()},
    **{f"footer: {name}": Case(make, add_a_footer) for name, make in PARSED.items()},
    "attachments: names": Case(first_part(b"Content-Type: a; ", b"name "), look_for_attachments),
    "attachments: open names": Case(first_part(b"Content-Type: a; ", b'name="'), look_for_attachments),
    "attachments: encoded names": Case(first_part(b"Content-Type: a; name=", b"=?utf-8?q?a?= "), look_for_attachments),
    "attachments: archive": Case(archive, look_for_attachments, 300),
    "footer: words": Case(first_part(b"X: ", b"a "), add_a_footer),
    "footer: stray bytes": Case(first_part(b"X: ", b"\xff "), add_a_footer),
    "footer: body ends": Case(parts(b"text/html", b"</body "), add_a_footer),
    "footer: spaces": Case(parts(b"text/html", b"</body>" + b" " * 9), add_a_footer),
}

CASES = {**{name: Case(make, read_all) for name, make in PARSED.items()}, **EDITED, **TOLD, **EXAMPLES}


def seconds(case: Case, size: int) -> float:
    """Of this process, the least of three."""
    times = []
    for _ in range(3):
        value = case.make(size)
        start = time.process_time()
        case.act(value)
        times.append(time.process_time() - start)
    return min(times)


def main(names: list[str]) -> None:
    print(f"{'':36}{'milliseconds':>14}{'twice':>8}{'4 times':>9}")
    for name in names or CASES:
        first, second, third = (seconds(CASES[name], factor * 10 * CASES[name].size) for factor in (1, 2, 4))
        print(f"{name:36}{first * 1000:14.1f}{second / first:8.1f}{third / first:9.1f}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
