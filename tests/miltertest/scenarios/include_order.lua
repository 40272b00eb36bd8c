-- SPDX-License-Identifier: GPL-3.0-or-later
-- The handlers of an included filter run after those that were registered before the inclusion, and before later ones.

local mta = connect()
expect("no reply", mta:mailfrom("<ann@client.example>"))
expect("CONTINUE", mta:rcptto("<bob@mta.example>"))
expect("450 4.7.1 come back in 5 minutes", mta:rcptto("<new@mta.example>"))
expect("CONTINUE", mta:eom())
expect({ "add_recipient <archive@mta.example>" }, mta.changes)
expect("REJECT", mta:message { sender = "<trouble@client.example>", recipient = "<eve@mta.example>" })
mta:disconnect()
