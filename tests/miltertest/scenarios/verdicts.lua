-- SPDX-License-Identifier: GPL-3.0-or-later
-- The verdicts that mean something at the stage `case`, and what becomes of the message.

local VERDICTS = {
  connect = { "CONTINUE", "ACCEPT", "REJECT", "TEMPFAIL" },
  helo = { "CONTINUE", "ACCEPT", "REJECT", "TEMPFAIL" },
  mail = { "CONTINUE", "ACCEPT", "REJECT", "TEMPFAIL", "DISCARD" },
  rcpt = { "CONTINUE", "ACCEPT", "REJECT", "TEMPFAIL", "DISCARD" },
  data = { "CONTINUE", "ACCEPT", "REJECT", "TEMPFAIL", "DISCARD" },
  header = { "CONTINUE", "ACCEPT", "REJECT", "TEMPFAIL", "DISCARD", "SKIP" },
  eoh = { "CONTINUE", "ACCEPT", "REJECT", "TEMPFAIL", "DISCARD" },
  body = { "CONTINUE", "ACCEPT", "REJECT", "TEMPFAIL", "DISCARD", "SKIP" },
  eom = { "CONTINUE", "ACCEPT", "REJECT", "TEMPFAIL", "DISCARD" },
  unknown = { "CONTINUE", "REJECT", "TEMPFAIL" },
}

-- Sendmail answers a SKIP in the header by leaving out the body, so it is told to continue.
local function answer_of(verdict)
  return case == "header" and verdict == "SKIP" and "CONTINUE" or verdict
end

for _, verdict in ipairs(VERDICTS[case]) do
  local mta = connect()
  expect(answer_of(verdict), mta:up_to(answered_at(case), verdict))
  if case ~= "connect" and case ~= "helo" then
    -- The MTA gives up the message; the next one on the same connection meets the same verdict.
    mta:abort()
    expect(answer_of(verdict), mta:up_to(answered_at(case)))
    mta:abort()
  end
  mta:disconnect()
end
