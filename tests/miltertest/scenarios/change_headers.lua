-- SPDX-License-Identifier: GPL-3.0-or-later
-- The changes of header fields arrive, in the order in which they were asked for.

local mta = connect()
expect("CONTINUE", mta:eom())
expect({
  "add_header X-Added: at the end",
  "add_header X-Folded: one\n\ttwo\n three",
  "add_header X-Empty: ",
  "insert_header 0 X-Top: above the MTA's own",
  "insert_header 1 X-Below: 100% below",
  "replace_header 1 Subject: [checked] hello",
  "replace_header 2 received: changed",
  "delete_header 2 X-Spam",
  "delete_header 1 X-Spam",
}, mta.changes)

expect(true, mt.eom_check(mta.handle, MT_HDRADD, "X-Added", "at the end"))
expect(true, mt.eom_check(mta.handle, MT_HDRINSERT, "X-Top", "above the MTA's own", 0))
expect(true, mt.eom_check(mta.handle, MT_HDRINSERT, "X-Below", "100% below", 1))
expect(true, mt.eom_check(mta.handle, MT_HDRCHANGE, "Subject", "[checked] hello"))
expect(true, mt.eom_check(mta.handle, MT_HDRDELETE, "X-Spam", 1))
expect(true, mt.eom_check(mta.handle, MT_HDRDELETE, "X-Spam", 2))
expect(false, mt.eom_check(mta.handle, MT_HDRDELETE, "Subject"))
expect("at the end", mt.getheader(mta.handle, "X-Added", 0))
mta:disconnect()
