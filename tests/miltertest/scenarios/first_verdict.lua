-- SPDX-License-Identifier: GPL-3.0-or-later
-- The handlers of a stage run in their order until one gives a verdict other than CONTINUE, which is that of all.

local mta = connect()
expect("no reply", mta:mailfrom("<ann@client.example>"))
expect("REJECT", mta:rcptto("<nobody@mta.example>"))
expect("550 5.1.1 moved", mta:rcptto("<moved@mta.example>"))
expect("CONTINUE", mta:rcptto("<bob@mta.example>"))
expect("ACCEPT", mta:eom())
expect({ "add_header X-First: 1", "add_header X-Second: 2" }, mta.changes)
mta:disconnect()
