-- SPDX-License-Identifier: GPL-3.0-or-later
-- A message is put into quarantine, for a reason; the verdict remains another matter.

local mta = connect()
expect("ACCEPT", mta:message { sender = "<suspect@client.example>" })
expect({ "quarantine looks 100% suspicious" }, mta.changes)
expect(true, mt.eom_check(mta.handle, MT_QUARANTINE, "looks 100% suspicious"))
expect("ACCEPT", mta:message())
expect({}, mta.changes)
expect(false, mt.eom_check(mta.handle, MT_QUARANTINE))
mta:disconnect()
