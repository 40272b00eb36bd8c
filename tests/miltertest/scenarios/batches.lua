-- SPDX-License-Identifier: GPL-3.0-or-later
-- What is only observed waits in C, and comes in order with the next event that somebody answers.

local function greeted(name)
  local mta = connect()
  expect("no reply", mta:conninfo(name .. ".example", "192.0.2.1"))
  expect("no reply", mta:helo(name))
  return mta
end

local function mail(mta, sender) expect("no reply", mta:mailfrom("<" .. sender .. "@client.example>")) end

local function content(mta, subject, body)
  expect("no reply", mta:header("Subject", subject))
  expect("no reply", mta:header("To", "bob"))
  if body then
    expect("no reply", mta:eoh())
    for _, part in ipairs(body) do expect("no reply", mta:bodystring(part)) end
  end
end

-- A recipient comes at once, with its macros, and brings all that was before it. The rest comes at the end, and
-- so after all of another connection, which came later. (The unknown command is answered when the recipients are over.)
local late = greeted("late")
mail(late, "late")
for _, name in ipairs { "bob", "eve" } do
  late:macro("R", "{rcpt_mailer}", "mailer-of-" .. name)
  expect("no reply", late:rcptto("<" .. name .. "@mta.example>"))
end
expect("CONTINUE", late:unknown("HELP"))
expect("no reply", late:data())
content(late, "hello", { "one", "three", ("z"):rep(5000) })
local early = greeted("early")
mail(early, "early")
content(early, "hello", { "x" })
expect("ACCEPT", early:eom())
expect("ACCEPT", late:eom())
early:disconnect()
late:disconnect()

-- An answered event in the middle parts the batch.
local mta = greeted("parted")
mail(mta, "parted")
expect("CONTINUE", mta:unknown("HELP"))
content(mta, "hello", { "x" })
expect("ACCEPT", mta:eom())

-- Given up in the middle of a batch, at each stage; and the next message is whole.
for _, stage in ipairs { "mail", "header", "body" } do
  mail(mta, "given-up-at-" .. stage)
  if stage ~= "mail" then content(mta, "hello", stage == "body" and { "x", "y" }) end
  mta:abort()
end
mail(mta, "whole")
content(mta, "hello", { "x" })
expect("ACCEPT", mta:eom())
mta:disconnect()

-- An MTA that goes away in the middle of a batch.
mta = greeted("gone")
mail(mta, "gone")
content(mta, "hello", { "x" })
mta:disconnect(false)
mta = greeted("gone-early")
mta:disconnect(false)

-- A failure is answered where somebody is asked; the observer that failed rests until the next message.
mta = greeted("failing")
for _, subject in ipairs { "good", "bad", "good again" } do
  mail(mta, "failing")
  content(mta, subject, { "x" })
  expect(subject == "bad" and "TEMPFAIL" or "ACCEPT", mta:eom())
end
mail(mta, "bad")
expect("TEMPFAIL", mta:unknown("HELP"))
expect("TEMPFAIL", mta:eom())
mail(mta, "failing")
content(mta, "bad, and given up")
mta:abort()
mail(mta, "failing")
content(mta, "good", { "x" })
expect("ACCEPT", mta:eom())
mta:disconnect()
