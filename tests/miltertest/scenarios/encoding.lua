-- SPDX-License-Identifier: GPL-3.0-or-later
-- Any bytes pass through the filter's text unchanged, be they UTF-8 or not.

local mta = connect()
expect("no reply", mta:helo("m\xc3\xbcnchen.example"))
mta:macro("M", "i", "\xff\xfe")
expect("no reply", mta:mailfrom("<j\xf6rg@client.example>"))
expect("CONTINUE", mta:rcptto("<\xd1\x8f@mta.example>"))
expect("no reply", mta:header("Subject", "caf\xe9 \xe2\x82\xac \x80\x01"))
expect("no reply", mta:bodystring("\x80\xff\r\n"))
expect("CONTINUE", mta:eom())
expect({
  "add_header X-Value: caf\xe9 \xe2\x82\xac \x80\x01",
  "add_header X-Macro: \xff\xfe",
  "add_recipient <\xd1\x8f@mta.example>",
  "replace_sender <j\xf6rg@client.example>",
  "replace_body \x80\xff\\r\\n",
}, mta.changes)
mta:disconnect()
