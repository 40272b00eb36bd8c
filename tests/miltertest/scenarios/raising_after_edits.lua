-- SPDX-License-Identifier: GPL-3.0-or-later
-- A message half edited passes as it came, or not at all; the next one is edited.

local CHANGES = { "add_recipient <archive@mta.example>", "add_header X-Scanned:  clean", "replace_body new\\r\\n" }
local ANSWERS = { reply = "451 4.3.0 out of order" }

local mta = connect()
for _, sender in ipairs { "ann", "poison", "poison", "ann" } do
  local fails = sender == "poison"
  local answer = mta:message { sender = "<" .. sender .. "@client.example>" }
  expect(fails and (ANSWERS[case] or case:upper()) or "CONTINUE", answer)
  expect(fails and {} or CHANGES, mta.changes)
end
mta:disconnect()
