-- SPDX-License-Identifier: GPL-3.0-or-later
-- The policy `case` answers for handlers that raise.

local ANSWERS = {
  tempfail = "TEMPFAIL",
  reject = "REJECT",
  accept = "ACCEPT",
  continue = "CONTINUE",
  reply = "554 5.3.0 the filter is 100%% broken",
}
local answer = ANSWERS[case]

local mta = connect()
-- An unknown command cannot be accepted: Postfix panics.
expect(answer == "ACCEPT" and "CONTINUE" or answer, mta:up_to("unknown"))
mta:abort()

expect(answer, mta:mailfrom("<mail@client.example>"))
mta:abort()
expect(answer, mta:message { sender = "<eom@client.example>" })

-- Policies that let a message pass have nothing to make up for at its end, where handlers are asked as ever.
expect("CONTINUE", mta:mailfrom("<observer@client.example>"))
expect("no reply", mta:header("Subject", "hello"))
expect(answer, mta:eom())
mta:disconnect()
