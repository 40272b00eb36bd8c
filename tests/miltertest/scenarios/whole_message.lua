-- SPDX-License-Identifier: GPL-3.0-or-later
-- Messages reach on_message as they were sent, each for itself; the MTA waits for an answer at their end only.

local mta

local function begin(sender, ...)
  expect("no reply", mta:mailfrom(sender))
  for _, recipient in ipairs { ... } do expect("no reply", mta:rcptto(recipient)) end
end

local function send(fields, body)
  for _, field in ipairs(fields) do expect("no reply", mta:header(table.unpack(field))) end
  if body then
    expect("no reply", mta:eoh())
    for _, part in ipairs(body) do expect("no reply", mta:bodystring(part)) end
  end
end

mta = connect()
expect("no reply", mta:conninfo("client.example", "192.0.2.1"))
expect("no reply", mta:helo("client.example"))

begin("<ann@client.example>", "<bob@mta.example>", "eve@mta.example")
send({ { "From", "ann" }, { "Subject", "hello" } }, { "Hi.\r\n" })
expect("CONTINUE", mta:eom())

begin("<>", "<bob@mta.example>")
send({ { "X-Twin", "1" }, { "X-Folded", "one\n two\n\tthree" }, { "x-twin", "2" }, { "X-Latin", "caf\xe9 \xff" } }, {
  "cut in t", "he middle\r", "\n.dot\r\n..\r\n", "bare\nends\rhere", "\xff\xfe\r\n",
})
expect("CONTINUE", mta:eom())

-- A space that was there comes back; and there may be more of them, or nothing behind them.
begin("<spaces@client.example>", "<bob@mta.example>")
send({ { "X-Spaces", "  two " }, { "X-Tab", "\ttab" }, { "X-Empty", "" } }, { "Hi.\r\n" })
expect("CONTINUE", mta:eom())

-- Nothing of a message that was given up is in the next one, whatever was sent of it.
begin("<envelope@client.example>", "<eve@mta.example>")
mta:abort()
begin("<header@client.example>", "<eve@mta.example>")
send { { "X-Left", "behind" } }
mta:abort()
begin("<body@client.example>", "<eve@mta.example>")
send({ { "X-Left", "behind" } }, { "left behind\r\n", ("x"):rep(65535) })
mta:abort()
begin("<after@client.example>", "<bob@mta.example>")
send({ { "Subject", "afresh" } }, { "afresh\r\n" })
expect("CONTINUE", mta:eom())
mta:disconnect()

-- An MTA that goes away in the middle.
mta = connect()
begin("<gone@client.example>", "<bob@mta.example>")
send({ { "X-Left", "behind" } }, { "left behind\r\n" })
mta:disconnect(false)

-- An MTA that takes off the space after the colon: one is put there.
mta = connect { steps = 0xfffff }
expect(false, mt.test_option(mta.handle, SMFIP_HDR_LEADSPC))
begin("<old@client.example>", "<bob@mta.example>")
send({ { "Subject", "hello" }, { "X-Empty", "" } }, { "Hi.\r\n" })
expect("CONTINUE", mta:eom())
mta:disconnect()
