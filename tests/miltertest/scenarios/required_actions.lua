-- SPDX-License-Identifier: GPL-3.0-or-later
-- Where the MTA does not offer what Milter(requires=...) says, the filter ends the connection, and serves others.

expect(true, refuses { actions = SMFIF_ADDHDRS })
expect(true, refuses { actions = 0xff - SMFIF_QUARANTINE })

local mta = connect { actions = SMFIF_QUARANTINE + SMFIF_CHGBODY }
expect("CONTINUE", mta:up_to("eom"))
expect({ "quarantine each message" }, mta.changes)
mta:disconnect()
