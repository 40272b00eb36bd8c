-- SPDX-License-Identifier: GPL-3.0-or-later
-- The library remembers client, HELO and envelope, without handlers for them.

local mta = connect()
expect("no reply", mta:conninfo("client.example", "192.0.2.1"))
expect("no reply", mta:helo("one.example"))
expect("no reply", mta:helo("two.example"))
expect("no reply", mta:mailfrom("<ann@client.example>", "SIZE=100", "BODY=8BITMIME"))
expect("no reply", mta:rcptto("<bob@mta.example>", "NOTIFY=NEVER"))
expect("no reply", mta:rcptto("eve@mta.example"))
expect("CONTINUE", mta:eom())

-- Nothing of a message reaches the next one.
expect("no reply", mta:mailfrom("<given-up@client.example>"))
expect("no reply", mta:rcptto("<given-up@mta.example>"))
mta:abort()
expect("no reply", mta:mailfrom("<>"))
expect("no reply", mta:rcptto('<"quoted local part"@mta.example>'))
expect("CONTINUE", mta:eom())

local other = connect()
expect("no reply", other:conninfo("localhost", "unspec"))
expect("CONTINUE", other:message { sender = "<cron@mta.example>" })
other:disconnect()
mta:disconnect()
