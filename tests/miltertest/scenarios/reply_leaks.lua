-- SPDX-License-Identifier: GPL-3.0-or-later
-- The text of a reply belongs to one command: later refusals do not inherit it.

local mta = connect()
expect("no reply", mta:mailfrom("<spammer@client.example>"))
expect("550 5.1.1 nobody of that name", mta:rcptto("<text@mta.example>"))
expect("REJECT", mta:rcptto("<no@mta.example>"))
expect("450 4.2.1 not today", mta:rcptto("<later@mta.example>"))
expect("REJECT", mta:rcptto("<no@mta.example>"))
expect("TEMPFAIL", mta:rcptto("<not-now@mta.example>"))
expect("550 5.1.1 nobody of that name", mta:rcptto("<text@mta.example>"))
expect("TEMPFAIL", mta:rcptto("<not-now@mta.example>"))
expect("CONTINUE", mta:rcptto("<bob@mta.example>"))
expect("REJECT", mta:data())
mta:abort()

expect("no reply", mta:mailfrom("<ann@client.example>"))
expect("450 4.2.1 not today", mta:rcptto("<later@mta.example>"))
mta:abort()
expect("no reply", mta:mailfrom("<ann@client.example>"))
expect("TEMPFAIL", mta:rcptto("<not-now@mta.example>"))
mta:disconnect()
