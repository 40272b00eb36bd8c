-- SPDX-License-Identifier: GPL-3.0-or-later
-- After an observer has raised, the next stage that replies says so, without asking its own handlers.

local FAILURE = "451 4.3.0 the filter is out of order"

local mta = connect()
expect("no reply", mta:mailfrom("<trouble@client.example>"))
expect(FAILURE, mta:rcptto("<bob@mta.example>"))
expect(FAILURE, mta:rcptto("<eve@mta.example>"))
mta:abort()
expect("CONTINUE", mta:message())
expect({ "add_header X-Mark: checked" }, mta.changes)

-- An MTA that goes on in spite of it.
expect("no reply", mta:mailfrom("<trouble@client.example>"))
expect(FAILURE, mta:rcptto("<bob@mta.example>"))
expect(FAILURE, mta:eoh())
expect("CONTINUE", mta:message())

-- An MTA that gives up before it could be told.
expect("no reply", mta:mailfrom("<trouble@client.example>"))
mta:abort()
expect("CONTINUE", mta:message())
mta:disconnect()
