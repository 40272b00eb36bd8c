-- SPDX-License-Identifier: GPL-3.0-or-later
-- Edits are sent with a verdict that accepts the message, and with no other; one message does not concern the next.

local CHANGES = {
  "replace_sender <new@client.example>",
  "add_recipient <archive@mta.example>",
  "add_header X-Scanned:  clean",
  "replace_header 1 Subject:  new",
  "replace_body new\\r\\n",
}

local mta = connect()

local function answer_to(verdict)
  expect("no reply", mta:mailfrom("<" .. verdict .. "@client.example>"))
  expect("CONTINUE", mta:rcptto("<bob@mta.example>"))
  expect("REJECT", mta:rcptto("<nobody@mta.example>"))
  expect("CONTINUE", mta:rcptto("<eve@mta.example>"))
  expect("no reply", mta:header("Subject", "old"))
  expect("no reply", mta:bodystring("old\r\n"))
  return mta:eom()
end

for _, verdict in ipairs { "CONTINUE", "REJECT", "ACCEPT", "TEMPFAIL", "DISCARD", "CONTINUE" } do
  expect(verdict, answer_to(verdict))
  local accepts = verdict == "CONTINUE" or verdict == "ACCEPT"
  expect(accepts and CHANGES or {}, mta.changes)
end

expect("554 5.7.1 100%% spam", answer_to("REPLY"))
expect({}, mta.changes)
expect("ACCEPT", answer_to("ACCEPT"))
expect(CHANGES, mta.changes)
mta:disconnect()
