-- SPDX-License-Identifier: GPL-3.0-or-later
-- A new body arrives in the parts in which it was given.

local mta = connect()

local function change(kind, verdict)
  expect(verdict, mta:message { sender = "<" .. kind .. "@client.example>" })
  return mta.changes
end

expect({ "replace_body all at once\\r\\n" }, change("bytes", "ACCEPT"))
expect(true, mt.eom_check(mta.handle, MT_BODYCHANGE, "all at once\r\n"))
expect({ "replace_body first\\r\\n", "replace_body second\\r\\n" }, change("iterable", "ACCEPT"))
expect({ "replace_body one\\r\\n", "replace_body two\\r\\n" }, change("pieces", "ACCEPT"))
expect({ "replace_body one\\r\\n", "replace_body two\\r\\n" }, change("both", "ACCEPT"))
expect({ "replace_body " }, change("empty", "ACCEPT"))
expect({ "replace_body " }, change("empty-iterable", "ACCEPT"))
expect({ "replace_body a\0b\\r\\n" }, change("nul", "ACCEPT"))
expect({}, change("untouched", "ACCEPT"))

-- A second body would be appended to the first.
expect({ "replace_body one\\r\\n" }, change("twice", "ACCEPT"))

-- Postfix fails a message whose new body is interrupted, and half a body must never be delivered.
expect({ "replace_body one\\r\\n", "add_header X-Between: the halves" }, change("halves", "TEMPFAIL"))
expect({ "replace_body first\\r\\n" }, change("interrupted", "TEMPFAIL"))

expect({ "replace_body all at once\\r\\n" }, change("bytes", "ACCEPT"))
mta:disconnect()
