-- SPDX-License-Identifier: GPL-3.0-or-later
-- A message that is larger than `case` bytes lies in a file, and is whole there; its header fields count without
-- colon and line end, with a NUL after name and value.

local HEADER = #"X-Number\0 1\0"

local mta = connect()

-- One of so many bytes besides the header fields, in pieces.
local function message(number, size)
  expect("no reply", mta:mailfrom("<ann@client.example>"))
  expect("no reply", mta:rcptto("<bob@mta.example>"))
  expect("no reply", mta:header("X-Number", tostring(number)))
  expect("no reply", mta:eoh())
  local body = tostring(number):rep(size)
  for start = 1, size, 60000 do
    expect("no reply", mta:bodystring(body:sub(start, start + 59999)))
  end
end

local limit = math.max(tonumber(case), HEADER + 1)
for number, excess in ipairs { -1, 0, 1, 200000 } do
  message(number, math.max(limit - HEADER + excess, 1))
  expect("CONTINUE", mta:eom())
end

-- Given up, and the file is gone.
message(5, limit + 200000)
mta:abort()
message(6, 1)
expect("CONTINUE", mta:eom())
mta:disconnect()
