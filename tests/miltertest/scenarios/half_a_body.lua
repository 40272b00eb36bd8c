-- SPDX-License-Identifier: GPL-3.0-or-later
-- A message of which half a new body was sent does not pass, not even with a policy that accepts.

local mta = connect()
expect("ACCEPT", mta:message())
expect({}, mta.changes)
expect("TEMPFAIL", mta:message { sender = "<body@client.example>" })
expect({ "replace_body first\\r\\n" }, mta.changes)
mta:disconnect()
