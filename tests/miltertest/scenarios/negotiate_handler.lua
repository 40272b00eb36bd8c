-- SPDX-License-Identifier: GPL-3.0-or-later
-- A handler of on_negotiate may take something away; when it raises, the MTA must do without the filter.

expect(true, refuses { actions = SMFIF_CHGBODY })

local mta = connect { actions = SMFIF_ADDHDRS + SMFIF_CHGBODY, steps = 0x1fffff & ~SMFIP_SKIP }
expect("ADDHDRS", mta:actions())
expect("NODATA NOHDRS NOEOH NOBODY NOUNKNOWN NR_CONN NR_HELO NR_MAIL NR_RCPT NR_DATA NR_HDR NR_EOH NR_BODY NR_UNKN",
  mta:options())
expect("CONTINUE", mta:message())
expect({ "add_header X-Mark: checked" }, mta.changes)
mta:disconnect()
