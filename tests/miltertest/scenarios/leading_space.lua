-- SPDX-License-Identifier: GPL-3.0-or-later
-- The space after the colon comes and goes with a header's value, where the MTA can do that.

local mta = connect()
expect(true, mt.test_option(mta.handle, SMFIP_HDR_LEADSPC))
expect("no reply", mta:header("Subject", "hello")) -- miltertest adds a space
expect("no reply", mta:header("X-Tab", "\thello"))
expect("CONTINUE", mta:eom())
expect({ "add_header X-Signature:  one space" }, mta.changes)
mta:disconnect()

local other = connect { steps = 0xfffff }
expect(false, mt.test_option(other.handle, SMFIP_HDR_LEADSPC))
expect("no reply", other:header("Subject", "hello"))
expect("CONTINUE", other:eom())
expect({ "add_header X-Signature: no space" }, other.changes)
other:disconnect()
