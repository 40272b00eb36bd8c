-- SPDX-License-Identifier: GPL-3.0-or-later
-- A filter that is told to stop goes on with the open connection until it ends, and then ends by itself.

local mta = connect()
expect("no reply", mta:mailfrom("<ann@client.example>"))
expect("CONTINUE", mta:rcptto("<bob@mta.example>"))
expect("CONTINUE", mta:eom())
expect({ "add_header X-Mark: checked" }, mta.changes)
mta:disconnect()
