-- SPDX-License-Identifier: GPL-3.0-or-later
-- The state of the session lasts from connect to close; that of a message until the message ends, however it does.

local mta = connect()
expect("CONTINUE", mta:conninfo("client.example", "192.0.2.1"))
expect("CONTINUE", mta:mailfrom("<ann@client.example>"))
expect("CONTINUE", mta:rcptto("<bob@mta.example>"))
expect("REJECT", mta:rcptto("<nobody@mta.example>"))
expect("no reply", mta:bodystring("12345"))
expect("no reply", mta:bodystring("123"))
expect("CONTINUE", mta:eom())

-- Nothing is left over after an end, an abort, a HELO or the beginning of another message.
expect("CONTINUE", mta:mailfrom("<ann@client.example>"))
expect("CONTINUE", mta:rcptto("<carl@mta.example>"))
mta:abort()
expect("CONTINUE", mta:message { recipient = "<dora@mta.example>" })
expect("CONTINUE", mta:mailfrom("<ann@client.example>"))
expect("CONTINUE", mta:rcptto("<eve@mta.example>"))
mta:abort()
expect("no reply", mta:helo("client.example"))
expect("CONTINUE", mta:message { recipient = "<fred@mta.example>" })

-- Another connection has a state of its own, and the first one keeps its.
local other = connect()
expect("CONTINUE", other:conninfo("other.example", "192.0.2.2"))
expect("CONTINUE", other:mailfrom("<zoe@other.example>"))
expect("CONTINUE", other:rcptto("<bob@mta.example>"))
expect("CONTINUE", mta:mailfrom("<ann@client.example>"))
expect("CONTINUE", other:eom())
expect("CONTINUE", mta:rcptto("<gus@mta.example>"))
expect("CONTINUE", mta:eom())
other:disconnect()
expect("CONTINUE", mta:message { recipient = "<hal@mta.example>" })

-- An MTA that goes away in the middle of a message.
expect("CONTINUE", mta:mailfrom("<ann@client.example>"))
mta:disconnect(false)
