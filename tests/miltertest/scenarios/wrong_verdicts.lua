-- SPDX-License-Identifier: GPL-3.0-or-later
-- What is no verdict, or means nothing at its stage, is a mistake of the handler, and answered as one.

local MISTAKE = "451 4.3.5 the filter is wrong"

local refused = connect()
expect(MISTAKE, refused:conninfo("discard.example", "192.0.2.1"))
refused:disconnect()

local mta = connect()
expect("CONTINUE", mta:conninfo("client.example", "192.0.2.1"))
expect(MISTAKE, mta:helo("skip.example"))
expect("CONTINUE", mta:helo("client.example"))
for _, command in ipairs { "ACCEPT", "DISCARD", "SKIP" } do expect(MISTAKE, mta:unknown(command)) end
for _, kind in ipairs { "int", "bool", "str", "tuple", "class", "skip" } do
  expect(MISTAKE, mta:mailfrom("<" .. kind .. ">"))
end

-- The promise of "-> None" was broken where the MTA does not wait for a reply.
expect("CONTINUE", mta:mailfrom("<ann@client.example>"))
expect("no reply", mta:rcptto("<bob@mta.example>"))
expect("no reply", mta:data())
expect(MISTAKE, mta:eom())

expect("CONTINUE", mta:mailfrom("<ann@client.example>"))
mta:abort()
mta:disconnect()
