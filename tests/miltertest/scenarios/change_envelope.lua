-- SPDX-License-Identifier: GPL-3.0-or-later
-- The changes of sender and recipients arrive, as addresses in angle brackets.
-- miltertest has no check of its own for a changed sender and for recipients with parameters.

local mta = connect()

local function sender_of(sender)
  expect("ACCEPT", mta:message { sender = sender })
  return mta.changes[1]
end

expect("replace_sender <new@client.example>", sender_of("<plain@client.example>"))
expect("replace_sender <new@client.example>", sender_of("<with-brackets@client.example>"))
expect("replace_sender <new@client.example> RET=HDRS ENVID=42", sender_of("<with-parameters@client.example>"))
expect("replace_sender <>", sender_of("<bounce@client.example>"))

-- A recipient is removed in the form in which the client gave it, which is what Sendmail compares.
expect("no reply", mta:mailfrom("<ann@client.example>"))
expect("no reply", mta:rcptto("<bob@mta.example>", "NOTIFY=FAILURE"))
expect("no reply", mta:rcptto("bare@mta.example"))
expect("ACCEPT", mta:eom())
expect({
  "replace_sender <new@client.example>",
  "add_recipient <archive@mta.example>",
  "add_recipient <boss@mta.example>",
  "add_recipient <quiet@mta.example> with NOTIFY=NEVER",
  "remove_recipient <bob@mta.example>",
  "remove_recipient bare@mta.example",
  "remove_recipient <Stranger@MTA.example>",
  "remove_recipient <friend@mta.example>",
}, mta.changes)

expect(true, mt.eom_check(mta.handle, MT_RCPTADD, "<archive@mta.example>"))
expect(true, mt.eom_check(mta.handle, MT_RCPTADD, "<boss@mta.example>"))
expect(false, mt.eom_check(mta.handle, MT_RCPTADD, "<quiet@mta.example>"))
expect(true, mt.eom_check(mta.handle, MT_RCPTDELETE, "<bob@mta.example>"))
mta:disconnect()
