-- SPDX-License-Identifier: GPL-3.0-or-later
-- A macro is seen from the stage with which it is sent until that stage comes again.

local mta = connect()
mta:macro("C", "j", "mta.example", "{client_name}", "client.example", "{mine}", "of connect")
expect("CONTINUE", mta:conninfo("client.example", "192.0.2.1"))
mta:macro("H", "{tls_version}", "TLSv1.3")
expect("CONTINUE", mta:helo("client.example"))
mta:macro("M", "i", "QUEUE1", "{auth_authen}", "ann", "{mine}", "of mail")
expect("CONTINUE", mta:mailfrom("<ann@client.example>"))
mta:macro("R", "{rcpt_addr}", "bob")
expect("CONTINUE", mta:rcptto("<bob@mta.example>"))
mta:macro("R", "{rcpt_addr}", "eve")
expect("CONTINUE", mta:rcptto("<eve@mta.example>"))
mta:macro("T", "i", "QUEUE1", "{mine}", "of data, with 100% spaces")
expect("CONTINUE", mta:data())
expect("no reply", mta:header("Subject", "hello"))
mta:macro("N", "{mine}", "of eoh")
expect("CONTINUE", mta:eoh())
expect("CONTINUE", mta:bodystring("Hello.\r\n"))
mta:macro("E", "{mine}", "of eom, " .. ("long "):rep(100))
expect("CONTINUE", mta:eom())

-- The second message has no authenticated sender, and no macro of the first one.
mta:macro("M", "i", "QUEUE2")
expect("CONTINUE", mta:mailfrom("<mallory@client.example>"))
expect("CONTINUE", mta:rcptto("<bob@mta.example>"))
mta:abort()
mta:disconnect()
