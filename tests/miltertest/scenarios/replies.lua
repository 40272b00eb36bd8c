-- SPDX-License-Identifier: GPL-3.0-or-later
-- A refusal at the stage `case` carries the text that the filter gave. A "%" is doubled, once: MTAs read a format.

local TEXTS = {
  ["one line"] = "550 5.7.1 not for you",
  ["temporary"] = "451 4.3.0 come back later",
  ["several lines"] = "554-5.7.0 first\n554-5.7.0 second\n554 5.7.0 third",
  ["several temporary lines"] = "450-4.2.1 first\n450 4.2.1 second",
  ["per cent"] = "550 5.7.1 100%% spam, %%s %%d %%%%",
  ["closing"] = "421 4.7.0 good bye",
  ["no enhanced code"] = "571 just text",
  ["no enhanced code, several lines"] = "471-4.0.0 just\n471 4.0.0 text",
  ["other alphabet"] = "550 5.7.1 не для вас",
  ["empty line"] = "550 5.7.1 ",
}

for name, text in pairs(TEXTS) do
  local mta = connect()
  expect(text, mta:up_to(answered_at(case), name))
  if case == "eom" and text:find("^%d%d%d %d") then
    expect(true, mt.eom_check(mta.handle, MT_SMTPREPLY, text:match("^(%S+) (%S+) (.*)")))
  end
  mta:disconnect()
end
