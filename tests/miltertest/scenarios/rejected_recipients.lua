-- SPDX-License-Identifier: GPL-3.0-or-later
-- The MTA shows recipients that it refuses itself, which are none of the message's.

local mta = connect()
expect(true, mt.test_option(mta.handle, SMFIP_RCPT_REJ))
expect("no reply", mta:mailfrom("<ann@client.example>"))
mta:macro("R", "{rcpt_mailer}", "local", "{rcpt_addr}", "bob")
expect("CONTINUE", mta:rcptto("<bob@mta.example>"))
mta:macro("R", "{rcpt_mailer}", "error", "{rcpt_host}", "5.1.1", "{rcpt_addr}", "user unknown")
expect("CONTINUE", mta:rcptto("<nobody@mta.example>"))
mta:macro("R", "{rcpt_mailer}", "local", "{rcpt_addr}", "eve")
expect("CONTINUE", mta:rcptto("<eve@mta.example>"))
expect("CONTINUE", mta:eom())
mta:disconnect()
