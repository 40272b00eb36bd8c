-- SPDX-License-Identifier: GPL-3.0-or-later
-- An unknown command may come at any time; it is refused in any case, and the message goes on.

local mta = connect()
expect("CONTINUE", mta:unknown("HELP me"))
expect("no reply", mta:helo("client.example"))
expect("REJECT", mta:unknown("DEBUG"))
expect("no reply", mta:mailfrom("<ann@client.example>"))
expect("421 4.7.0 this is no web server", mta:unknown("GET / HTTP/1.1"))
expect("REJECT", mta:unknown("DEBUG"))
expect("no reply", mta:rcptto("<bob@mta.example>"))
expect("TEMPFAIL", mta:unknown("LATER on"))
expect("no reply", mta:rcptto("<eve@mta.example>"))
expect("CONTINUE", mta:eom())
expect("CONTINUE", mta:unknown("HELP me"))
expect("no reply", mta:mailfrom("<given-up@client.example>"))
mta:abort()
expect("CONTINUE", mta:unknown("HELP me"))
mta:disconnect()
