-- SPDX-License-Identifier: GPL-3.0-or-later
-- A header field is added at the end of the message.

local mta = connect()
expect("ACCEPT", mta:eom())
expect(true, mt.eom_check(mta.handle, MT_HDRADD, "X-Greeting", "hello, world"))
expect({ "add_header X-Greeting: hello, world" }, mta.changes)
mta:disconnect()
