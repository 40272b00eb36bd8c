-- SPDX-License-Identifier: GPL-3.0-or-later
-- A message that was begun and not decided is given up once, however often the MTA says so.

local mta = connect()
expect("no reply", mta:helo("client.example"))
mta:abort() -- nothing to give up
expect("CONTINUE", mta:mailfrom("<1@client.example>"))
mta:abort()
mta:abort()

expect("CONTINUE", mta:mailfrom("<2@client.example>"))
expect("no reply", mta:rcptto("<bob@mta.example>"))
expect("no reply", mta:rcptto("<eve@mta.example>"))
expect("no reply", mta:unknown("HELP"))
mta:abort()
expect("no reply", mta:unknown("HELP"))

-- Postfix says ABORT after the end of a message too.
expect("CONTINUE", mta:message { sender = "<3@client.example>" })
mta:abort()
mta:abort()
expect("TEMPFAIL", mta:message { sender = "<later@client.example>" })
mta:abort()

expect("REJECT", mta:mailfrom("<refused@client.example>"))
mta:abort()

-- Another message or a HELO begins, and nobody said ABORT.
expect("CONTINUE", mta:mailfrom("<6@client.example>"))
expect("CONTINUE", mta:mailfrom("<7@client.example>"))
expect("no reply", mta:rcptto("<bob@mta.example>"))
expect("no reply", mta:helo("client.example"))
expect("CONTINUE", mta:message { sender = "<8@client.example>" })
mta:disconnect()

-- An MTA that goes away, in a message or after it.
local rude = connect()
expect("CONTINUE", rude:mailfrom("<4@client.example>"))
expect("no reply", rude:rcptto("<bob@mta.example>"))
rude:disconnect(false)

local polite = connect()
expect("CONTINUE", polite:message { sender = "<5@client.example>" })
polite:disconnect()
