-- SPDX-License-Identifier: GPL-3.0-or-later
-- A handler raises at the stage `case`: the client shall try again, and the next message is all right.

local mta = connect()
expect("TEMPFAIL", mta:up_to(answered_at(case)))
if case ~= "connect" then
  mta:abort()
  expect("CONTINUE", mta:up_to(case == "helo" and "eom" or answered_at(case)))
  expect("CONTINUE", mta:message())
end
mta:disconnect()

local other = connect()
expect("CONTINUE", other:up_to(answered_at(case)))
expect("CONTINUE", other:message())
other:disconnect()
