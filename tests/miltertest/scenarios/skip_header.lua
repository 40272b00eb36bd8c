-- SPDX-License-Identifier: GPL-3.0-or-later
-- A handler that skips hears of no more header fields of this message; the others do, and the MTA is told nothing.

local mta = connect()
for _ = 1, 2 do
  expect("no reply", mta:header("From", "ann@client.example"))
  expect("no reply", mta:header("Subject", "hello"))
  expect("no reply", mta:header("To", "bob@mta.example"))
  expect("CONTINUE", mta:eom())
  mta:abort()
end
mta:disconnect()
