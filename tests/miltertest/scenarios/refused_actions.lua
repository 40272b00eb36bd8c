-- SPDX-License-Identifier: GPL-3.0-or-later
-- Nothing is sent of a change that would break the message, comes too early, or was not granted.

local mta = connect()
expect("CONTINUE", mta:message())
expect({}, mta.changes)
mta:disconnect()

local stingy = connect { actions = SMFIF_ADDRCPT }
expect("ADDRCPT", stingy:actions())
expect("CONTINUE", stingy:message { sender = "<ungranted@client.example>" })
expect({ "add_recipient <new@mta.example>" }, stingy.changes)
stingy:disconnect()
