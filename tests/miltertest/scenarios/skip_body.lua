-- SPDX-License-Identifier: GPL-3.0-or-later
-- The MTA is told to skip the rest of a body once all handlers have; a handler that has skipped hears no more of it.

local mta = connect()
for _ = 1, 2 do -- the next message begins anew
  expect("CONTINUE", mta:bodystring("one"))
  expect("SKIP", mta:bodystring("two"))
  expect("CONTINUE", mta:eom())
  mta:abort()
end

-- An MTA that sends the rest all the same.
expect("CONTINUE", mta:bodystring("one"))
expect("SKIP", mta:bodystring("two"))
expect("SKIP", mta:bodystring("three"))
expect("CONTINUE", mta:eom())
mta:disconnect()

-- An MTA that does not know of SKIP.
local old = connect { steps = 0xfffff & ~SMFIP_SKIP }
expect("CONTINUE", old:bodystring("one"))
expect("CONTINUE", old:bodystring("two"))
expect("CONTINUE", old:bodystring("three"))
expect("CONTINUE", old:eom())
old:disconnect()
