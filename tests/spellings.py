# SPDX-License-Identifier: GPL-3.0-or-later
"""How a client may write one mailbox, and what only looks like it.

All of them name, or seem to name, `MAILBOX`. What the servers make of each was tried (Postfix 3.7, Sendmail
8.17), and ``tests/mta/test_spellings.py`` tries it again. `spelt` gives the same for another mailbox.
"""

import re

MAILBOX = "boss@internal.example"
STRANGER = "x@evil.test"

CASE = (
    "<boss@internal.example>",
    "<boss@INTERNAL.example>",
    "<boss@Internal.Example>",
    "<boss@internal.EXAMPLE>",
    "<boss@INTERNAL.EXAMPLE>",
    "<BOSS@internal.example>",
    "<Boss@internal.example>",
    "<bOSS@INTERNAL.EXAMPLE>",
)

FINAL_DOT = (
    "<boss@internal.example.>",
    "<boss@INTERNAL.EXAMPLE.>",
    "<boss@internal.example .>",
    "boss@internal.example.",
)

NO_BRACKETS = (
    "boss@internal.example",
    "boss@INTERNAL.example",
    "(x)boss@internal.example",
    "boss@internal.example(x)",
    '"boss"@internal.example',
    "@relay.test:boss@internal.example",
    "group:boss@internal.example;",
)

WHITE_SPACE = (
    "< boss@internal.example>",
    "<boss@internal.example >",
    "< boss@internal.example >",
    "<  boss@internal.example  >",
    "<\tboss@internal.example>",
    "<\tboss@internal.example\t>",
    "<boss @internal.example>",
    "<boss@ internal.example>",
    "<boss @ internal.example>",
    "<boss\t@\tinternal.example>",
    "<boss@internal .example>",
    "<boss@internal. example>",
    "<boss@internal . example>",
)

COMMENTS = (
    "<boss@internal.example>(x)",
    "<boss@internal.example>(@evil.test)",
    "(x)<boss@internal.example>",
    "<(x)boss@internal.example>",
    "<(x) boss@internal.example>",
    "<(boss@evil.test)boss@internal.example>",
    "<boss(x)@internal.example>",
    "<boss(@evil.test)@internal.example>",
    "<boss@(x)internal.example>",
    "<boss@internal(x).example>",
    "<boss@internal.(x)example>",
    "<boss@internal.example(x)>",
    "<boss@internal.example (x)>",
    "<boss@internal.example(@evil.test)>",
    "<boss@internal.example.(x)>",
    "<boss@internal.example(x).>",
    "<boss@internal.example(x)(y)>",
    "<boss@internal.example(a(b)c)>",
    "<boss@internal.example((x))>",
    r"<boss@internal.example(a\)b)>",
    "<boss@internal.example(>)>",
    "<boss@internal.example()>",
    "<boss (x) @ (y) internal.example>",
)

QUOTES = (
    '<"boss"@internal.example>',
    '<"BOSS"@internal.example>',
    '<"boss"@INTERNAL.EXAMPLE>',
    '<"boss"@internal.example.>',
    '<"boss" @internal.example>',
    '< "boss" @ internal.example >',
    '<"boss"(x)@internal.example>',
    '<boss@"internal.example">',
    '<boss@"internal".example>',
    '<boss@"internal"."example">',
)

ROUTES = (
    "<@relay.test:boss@internal.example>",
    "<@relay.test,@other.test:boss@internal.example>",
    "<@relay.test, @other.test: boss@internal.example>",
    "<@relay.test :boss@internal.example>",
    "<@relay.test: boss@internal.example>",
    "< @relay.test:boss@internal.example >",
    "<@RELAY.test:boss@INTERNAL.example.>",
    "<@relay.test.:boss@internal.example>",
    "<@[192.0.2.1]:boss@internal.example>",
    "<@a@b:boss@internal.example>",
    '<@relay.test:"boss"@internal.example>',
    "<@internal.example:boss@internal.example>",
    "<@relay.test:(x)boss@internal.example>",
    "<@relay.test(x):boss@internal.example>",
)

AROUND = (
    "<<boss@internal.example>>",
    "<Boss <boss@internal.example>>",
    "<x@evil.test <boss@internal.example>>",
    '""<boss@internal.example>',
    "<boss@internal.example>,",
    "<boss@internal.example>;",
    "<boss@internal.example;>",
)
"""What stands around an address in a header field; both servers read it in the envelope, too."""

DELIVERED = (*CASE, *FINAL_DOT, *NO_BRACKETS, *WHITE_SPACE, *COMMENTS, *QUOTES, *ROUTES, *AROUND)
"""Both servers deliver them to `MAILBOX`, and take them for it as a sender."""

QUOTED_AS_A_WHOLE = (
    '<"boss@internal.example">',
    '"boss@internal.example"',
)
"""Both servers deliver them to `MAILBOX`. As a sender Sendmail takes them for somebody of its own domain."""

REWRITTEN = (
    "<boss%internal.example>",
    "<internal.example!boss>",
    "<INTERNAL.example!boss>",
)
"""Both servers deliver them to `MAILBOX` as long as their configuration does not forbid it."""

ROUTED = (
    "<boss%internal.example@mta.example>",
    "<internal.example!boss@mta.example>",
    '<"boss@internal.example"@mta.example>',
    "<boss@internal.example@mta.example>",
    "<boss>",
)
"""Where ``mta.example`` is a server's own domain, it may deliver them to `MAILBOX`."""

REWRITTEN_BY_POSTFIX = ('<"@evil.test:boss"@internal.example>',)
"""Postfix takes away a route even if it is in quotes. To Sendmail it is the name of somebody else."""

DELIVERED_BY_POSTFIX = (
    r'<"b\oss"@internal.example>',
    r'<"\b\o\s\s"@internal.example>',
    r"<b\oss@internal.example>",
    r"<\boss@internal.example>",
    r"<bos\s@internal.example>",
    r"<boss@internal\.example>",
    r"<boss@\internal.example>",
    r"<boss\@internal.example>",
    "<@:boss@internal.example>",
    "<@relay.test,:boss@internal.example>",
    "<@relay.test,,@b.test:boss@internal.example>",
    "<,@relay.test:boss@internal.example>",
    "<,boss@internal.example>",
    "<;boss@internal.example>",
    "<boss@internal.example,>",
    "<boss@internal.example@>",
    "<boss@internal.example>>",
    "boss@internal.example>",
    "<group:boss@internal.example;>",
    "<group: boss@internal.example;>",
)
"""Sendmail refuses these, or delivers them to somebody else."""

DELIVERED_BY_SENDMAIL = (
    "<boss@internal.example..>",
    '<"bo"ss@internal.example>',
    '<bo"ss"@internal.example>',
    '<"bo""ss"@internal.example>',
    '<b"o"s"s"@internal.example>',
    '<""boss@internal.example>',
    '<boss""@internal.example>',
    '<"" boss@internal.example>',
    '<boss@""internal.example>',
    '<boss@internal.example"">',
    "<<<boss@internal.example>>>",
    "<boss@internal.example>NOTIFY=NEVER",
    "<boss@internal.example>junk",
    "<boss@internal.example>.",
    '<boss@internal.example>""',
    "<boss@internal.example>@evil.test",
    "<boss@internal.example\x0b>",
    "<boss@internal.example\x0c>",
    "<\x0cboss@internal.example>",
)
"""Postfix refuses these, or delivers them to somebody else."""

FOLDED = (
    "<BOſS@internal.example>",
    "<boſſ@internal.example>",
)
"""Postfix finds the aliases of `MAILBOX` for them, since a long s is one in upper case. They need SMTPUTF8."""

MAPPED = (
    "<boss@ｉnternal.example>",
    "<boss@INTERNAL.ｅxample>",
    "<boss@internal．example>",
    "<boss@internal。example>",
    "<boss@intern\u00adal.example>",
)
"""Their domain is that of `MAILBOX` in DNS (RFC 3490, section 4), which Postfix asks. They need SMTPUTF8."""

NULL = (
    "<>",
    "< >",
    "<  >",
    "<\t>",
    "<(x)>",
    "<>(x)",
    "(x)<>",
    "<()>",
    "<( )>",
    "< (x) >",
    "<(>)>",
    "<>()",
    "<(ann@client.example)>",
    "<>(ann@client.example)",
    "<<>>",
    "< <> >",
    "<x<>>",
    "x<>",
    "<;>",
    "<>;",
    "<>,",
)
"""Both servers take them for the null sender of a bounce."""

LOOKALIKES = (
    "<boss@internal.example.evil.test>",
    "<boss@internal.example.evil.test.>",
    "<boss@notinternal.example>",
    "<boss@evil-internal.example>",
    "<boss@internal-example>",
    "<boss@internalxexample>",
    "<boss@internal.example-evil.test>",
    "<boss@internal.exampl>",
    "<boss@example>",
    "<boss@xn--internal.example>",
    '<"boss@internal.example"@evil.test>',
    '<"boss@internal.example" @evil.test>',
    '<"boss@internal.example."@evil.test>',
    '<"@internal.example"@evil.test>',
    '<"x@internal.example"@evil.test>',
    '<"<boss@internal.example>"@evil.test>',
    '<"boss@internal.example>"@evil.test>',
    '<"boss@internal.example>(x)"@evil.test>',
    r'<"x\"@internal.example"@evil.test>',
    '<"x(@internal.example"@evil.test>',
    '<"(x"@evil.test(boss@internal.example)>',
    '<x"@internal.example"@evil.test>',
    '<"x"@evil.test(@internal.example)>',
    "<boss@internal.example@evil.test>",
    r"<boss\@internal.example@evil.test>",
    "<@internal.example:x@evil.test>",
    "<@internal.example,@internal.example:x@evil.test>",
    "<@internal.example, @internal.example: x@evil.test>",
    "<@boss@internal.example:x@evil.test>",
    '<@internal.example:"boss@internal.example"@evil.test>',
    "@internal.example:x@evil.test",
    "<@evil.test:x@evil.test(@internal.example)>",
    "<@(:boss@internal.example)evil.test:x@evil.test>",
    "<x@evil.test(@internal.example)>",
    "<x(@internal.example)@evil.test>",
    "<x@evil.test(boss@internal.example)>",
    "<(boss@internal.example)x@evil.test>",
    "<x(boss@internal.example)@evil.test>",
    "<x@(boss@internal.example)evil.test>",
    "<x@evil(boss@internal.example).test>",
    "<x@evil.test (boss@internal.example)>",
    "<x@evil.test>(boss@internal.example)",
    "<x@evil.test>(<boss@internal.example>)",
    "(boss@internal.example)<x@evil.test>",
    "(<boss@internal.example>)<x@evil.test>",
    "x@evil.test(@internal.example)",
    "(@internal.example)x@evil.test",
    r"<x@evil.test(a\)@internal.example)>",
    "<x@evil.test(a(b)@internal.example)>",
    "<x@evil.test(>)(@internal.example>",
    "<x@evil.test(@internal.example>",
    "<boss@internal.example <x@evil.test>>",
    "<boss@internal.example<x@evil.test>>",
    "boss@internal.example<x@evil.test>",
    '"boss@internal.example"<x@evil.test>',
    '<"boss@internal.example"<x@evil.test>>',
    "<x@evil.test>boss@internal.example",
    "<x@evil.test>@internal.example",
    "<x@evil.test>.internal.example",
    "group:x@evil.test;(boss@internal.example)",
    "<boss%internal.example@evil.test>",
    "<evil.test!boss>",
    "<internal.example!boss@evil.test>",
    "<boss=internal.example@evil.test>",
    "<boss@[internal.example]>",
    r"<boss@internal.example\.evil.test>",
    '<boss@"internal.example".evil.test>',
    '<boss@"internal.example>"@evil.test>',
    '<"boss"@"evil.test">',
    "<boss@internal.example|@evil.test>",
    "<boss@internal.example/@evil.test>",
    "<boss@internal.example%evil.test>",
    "<boss@internal.example:@evil.test>",
    "<boss@internal.example:x@evil.test>",
    "<boss@internal.example\x01@evil.test>",
    "<'boss@internal.example'@evil.test>",
    "<`boss@internal.example`@evil.test>",
    '<"boss"@internal.example"@evil.test">',
    "<x@evil.test>NOTIFY=NEVER,boss@internal.example",
)
"""No server takes one of these for somebody at the domain of `MAILBOX`: it refuses it, or delivers it elsewhere."""

NEIGHBOURS = (
    "<xboss@internal.example.>",
    "<bossx@internal.example>",
    "<boss+x@internal.example>",
    "<bo.ss@internal.example>",
    '<"boss "@internal.example>',
    '<" boss"@internal.example>',
    '<"bo ss"@internal.example>',
    '<"boss@evil.test"@internal.example>',
    "<'boss'@internal.example>",
    "<boss%evil.test@internal.example>",
    "<evil.test!boss@internal.example>",
    "<mailto:boss@internal.example>",
    "<relay.test:boss@internal.example>",
    "<.boss@internal.example>",
    "<boss.@internal.example>",
)
"""Both servers deliver them to the domain of `MAILBOX`, and to somebody else there."""


def spelt(spelling: str, mailbox: str) -> str:
    """A spelling from above, of another mailbox whose domain has two labels: each word as it stands there."""
    local, _, domain = mailbox.partition("@")
    words = dict(zip(("boss", "internal", "example"), (local, *domain.split(".", 1)), strict=True))
    return re.sub(
        "boss|internal|example", lambda match: _like(match[0], words[match[0].lower()]), spelling, flags=re.I | re.A
    )


def _like(pattern: str, word: str) -> str:
    if pattern.isupper():
        return word.upper()
    if pattern.istitle():
        return word.title()
    return word if pattern.islower() else word.swapcase()
