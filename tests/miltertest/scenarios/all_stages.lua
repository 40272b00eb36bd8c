-- SPDX-License-Identifier: GPL-3.0-or-later
-- Each stage reaches its handler, with its arguments, and is answered.

local mta = connect()
expect("CONTINUE", mta:conninfo("client.example.com", "123.123.123.123"))
expect("CONTINUE", mta:helo("mail.example.com"))
expect("CONTINUE", mta:unknown("HELP me"))

expect("CONTINUE", mta:mailfrom("<from@example.com>", "SIZE=2048", "SMTPUTF8"))
expect("CONTINUE", mta:rcptto("<to1@example.com>", "NOTIFY=NEVER"))
expect("CONTINUE", mta:rcptto("<to2@example.com>"))
expect("CONTINUE", mta:data())
expect("no reply", mta:header("From", "from@example.com"))
expect("no reply", mta:header("Subject", "folded\n\tonce"))
expect("no reply", mta:header("X-Empty", ""))
expect("CONTINUE", mta:eoh())
expect("CONTINUE", mta:bodystring("Hello.\r\n"))
expect("CONTINUE", mta:bodystring("Good bye.\r\n"))
expect("CONTINUE", mta:eom())
expect({}, mta.changes)

expect("CONTINUE", mta:mailfrom("<>"))
mta:abort()
mta:disconnect()

local ipv6 = connect()
expect("CONTINUE", ipv6:conninfo("[2001:db8::5]", "2001:db8::5"))
ipv6:disconnect()

local elsewhere = connect()
expect("CONTINUE", elsewhere:conninfo("localhost", "unspec"))
elsewhere:disconnect()
