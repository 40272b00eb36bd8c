-- SPDX-License-Identifier: GPL-3.0-or-later
-- The edits of a message become the fewest changes, in an order in which MTAs take them.
-- (No long body is among them: miltertest crashes at one.)

local function message(mta, edit)
  expect("no reply", mta:mailfrom("<" .. edit .. "@client.example>"))
  expect("no reply", mta:rcptto("<bob@mta.example>", "NOTIFY=FAILURE"))
  expect("no reply", mta:rcptto("bare@mta.example"))
  for _, field in ipairs {
    { "From", "ann" }, { "To", "bob" }, { "X-Spam", "1" }, { "Subject", "old" }, { "x-spam", "2" },
    { "X-Twin", "1" }, { "X-Twin", "2" }, { "X-Twin", "3" },
  } do
    expect("no reply", mta:header(table.unpack(field)))
  end
  expect("no reply", mta:eoh())
  expect("no reply", mta:bodystring("old\r\n"))
  return mta:eom()
end

-- Several on one connection. Postfix and Sendmail count fields differently when one is inserted.
local function header_edits_on(version, below_first)
  local mta = connect()
  mta:macro("C", "v", version)
  expect("no reply", mta:conninfo("client.example", "192.0.2.1"))

  expect("CONTINUE", message(mta, "headers"))
  expect({
    "add_header X-Last:  last",
    "delete_header 2 x-spam",
    "replace_header 1 Subject:  new",
    "delete_header 1 X-Spam",
    "insert_header " .. below_first .. " X-Second:  second",
    "insert_header 1 X-First:  100% first",
  }, mta.changes)
  expect(true, mt.eom_check(mta.handle, MT_HDRADD, "X-Last", " last"))
  expect(true, mt.eom_check(mta.handle, MT_HDRINSERT, "X-First", " 100% first", 1))
  expect(true, mt.eom_check(mta.handle, MT_HDRINSERT, "X-Second", " second", below_first))
  expect(true, mt.eom_check(mta.handle, MT_HDRCHANGE, "Subject", " new"))
  expect(true, mt.eom_check(mta.handle, MT_HDRDELETE, "X-Spam"))
  expect(false, mt.eom_check(mta.handle, MT_HDRDELETE, "To"))

  expect("CONTINUE", message(mta, "one-of-several"))
  expect({ "delete_header 3 X-Twin", "replace_header 2 X-Twin:  two" }, mta.changes)
  mta:disconnect()
end

header_edits_on("Postfix 3.7.11", 2)
header_edits_on("8.17.1.9", 9)

local mta = connect()

expect("CONTINUE", message(mta, "values"))
expect({
  "add_header X-Folded:  one\n two\n\tthree",
  "add_header X-Latin:  caf\xe9",
  "add_header X-Empty:  ",
  "replace_header 1 Subject:  ",
}, mta.changes)

expect("CONTINUE", message(mta, "envelope"))
expect({
  "replace_sender <new@client.example>",
  "remove_recipient <bob@mta.example>",
  "remove_recipient bare@mta.example",
  "add_recipient <archive@mta.example>",
  "add_recipient <quiet@mta.example> with NOTIFY=NEVER",
}, mta.changes)
expect(true, mt.eom_check(mta.handle, MT_RCPTADD, "<archive@mta.example>"))
expect(true, mt.eom_check(mta.handle, MT_RCPTDELETE, "<bob@mta.example>"))
expect(true, mt.eom_check(mta.handle, MT_RCPTDELETE, "bare@mta.example"))

expect("CONTINUE", message(mta, "null-sender"))
expect({ "replace_sender <>" }, mta.changes)

expect("CONTINUE", message(mta, "body"))
expect({ "replace_body new\\r\\n.\\r\\n\0\\r\\n" }, mta.changes)
expect("CONTINUE", message(mta, "no-body"))
expect({ "replace_body " }, mta.changes)

-- A second body would be appended to the first.
expect("TEMPFAIL", message(mta, "two-bodies"))
expect({ "replace_body one\\r\\n" }, mta.changes)

expect("CONTINUE", message(mta, "quarantine"))
expect({ "quarantine looks odd", "add_header X-Suspect:  yes" }, mta.changes)
expect(true, mt.eom_check(mta.handle, MT_QUARANTINE, "looks odd"))
expect(true, mt.eom_check(mta.handle, MT_HDRADD, "X-Suspect", " yes"))

expect("CONTINUE", message(mta, "nothing"))
expect({}, mta.changes)
mta:disconnect()

-- The MTA puts the space itself. An empty value would delete the field; so another one is put in its place.
local old = connect { steps = 0xfffff }
expect("CONTINUE", message(old, "headers"))
expect("add_header X-Last: last", old.changes[1])
expect("CONTINUE", message(old, "values"))
expect({
  "add_header X-Folded: one\n two\n\tthree",
  "add_header X-Latin: caf\xe9",
  "add_header X-Empty: ",
  "delete_header 1 Subject",
  "insert_header 11 Subject: ",
}, old.changes)
old:disconnect()

-- What an MTA does not grant is not tried, nor is the rest.
local strict = connect { actions = SMFIF_ADDHDRS | SMFIF_ADDRCPT }
expect("TEMPFAIL", message(strict, "headers"))
expect({}, strict.changes)
expect("CONTINUE", message(strict, "nothing"))
strict:disconnect()
