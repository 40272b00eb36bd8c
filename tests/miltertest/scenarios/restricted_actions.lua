-- SPDX-License-Identifier: GPL-3.0-or-later
-- The filter asks for no more than it was allowed by Milter(actions=...).

local mta = connect()
expect("ADDHDRS QUARANTINE SETSYMLIST", mta:actions())
expect("CONTINUE", mta:message())
expect({ "add_header X-Mark: checked" }, mta.changes)
mta:disconnect()

local stingy = connect { actions = SMFIF_ADDHDRS + SMFIF_DELRCPT }
expect("ADDHDRS", stingy:actions())
expect("CONTINUE", stingy:message())
stingy:disconnect()
