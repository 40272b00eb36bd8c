-- SPDX-License-Identifier: GPL-3.0-or-later
-- An observer raises at the stage `case`: the message is not accepted by accident, but fails for now at its end.

local mta = connect()
if case == "unknown" then
  -- In the middle of a message, which it then concerns.
  expect("no reply", mta:up_to("rcpt"))
  expect("no reply", mta:unknown("HELP"))
  expect("TEMPFAIL", mta:eom())
else
  expect(case == "eom" and "TEMPFAIL" or "no reply", mta:up_to(case))
  if case ~= "eom" then expect("TEMPFAIL", mta:eom()) end
end

-- What was missed at the connection's beginning is missing for each of its messages; else the next one is all right.
local for_all = case == "connect" or case == "helo"
expect(for_all and "TEMPFAIL" or "CONTINUE", mta:message())
mta:disconnect()

local other = connect()
expect("CONTINUE", other:up_to("eom"))
other:disconnect()
