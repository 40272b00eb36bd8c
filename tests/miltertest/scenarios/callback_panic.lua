-- SPDX-License-Identifier: GPL-3.0-or-later
-- The handler of the second message raises: that message fails for now, and the filter ends by itself.

local mta = connect()
expect("no reply", mta:conninfo("client.example", "192.0.2.1"))
expect("CONTINUE", mta:message { sender = "<first@client.example>" })
expect("TEMPFAIL", mta:mailfrom("<second@client.example>"))
mta:disconnect()
