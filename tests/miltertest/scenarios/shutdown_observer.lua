-- SPDX-License-Identifier: GPL-3.0-or-later
-- An observer raises: the filter stops, but not before the open connection has ended, whose message fails for now.

local mta = connect()
expect("no reply", mta:mailfrom("<ann@client.example>"))
expect("no reply", mta:header("X-Trouble", "here it is"))
expect("no reply", mta:header("Subject", "hello"))
expect("TEMPFAIL", mta:eom())
mta:disconnect()
