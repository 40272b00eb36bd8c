-- SPDX-License-Identifier: GPL-3.0-or-later
-- Observers hear of everything, in order, however much there is of it, and nobody waits for them.

local mta = connect()
expect("no reply", mta:mailfrom("<ann@client.example>"))
for _, name in ipairs { "bob", "eve" } do
  mta:macro("R", "{rcpt_addr}", name)
  expect("no reply", mta:rcptto("<" .. name .. "@mta.example>"))
end
expect("no reply", mta:data())
for number = 1, 150 do
  expect("no reply", mta:header("X-Number", number .. " " .. ("x"):rep(900)))
end
expect("no reply", mta:eoh())
expect("no reply", mta:bodystring(("x"):rep(65535)))
expect("no reply", mta:bodystring("x"))
expect("CONTINUE", mta:eom())
mta:disconnect()
