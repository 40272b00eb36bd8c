-- SPDX-License-Identifier: GPL-3.0-or-later
-- Progress is told between changes, but never between the parts of a new body, where Postfix does not stand it.

local mta = connect()
expect("CONTINUE", mta:eom())
expect({
  "progress",
  "progress",
  "add_header X-Work: done",
  "progress",
  "replace_body one\\r\\n",
  "replace_body two\\r\\n",
}, mta.changes)
mta:disconnect()
