-- SPDX-License-Identifier: GPL-3.0-or-later
-- A message for which there is no room is not accepted, nor seen by half; the client may try again, and the room that
-- was taken for it is free for the next.

local ROOM, NO_ROOM = 60000, 300000

local mta = connect()
for _ = 1, 3 do
  for _, sender in ipairs { "no-room", "room" } do
    expect("CONTINUE", mta:mailfrom("<" .. sender .. "@client.example>"))
    expect("no reply", mta:rcptto("<bob@mta.example>"))
    expect("no reply", mta:header("Subject", "hello"))
    expect("no reply", mta:eoh())
    for _ = 1, sender == "room" and ROOM or NO_ROOM, ROOM do
      expect("no reply", mta:bodystring(("x"):rep(ROOM)))
    end
    if sender == "room" then
      expect("CONTINUE", mta:eom())
      expect({ "add_header X-Scanned:  clean" }, mta.changes)
    else
      expect("TEMPFAIL", mta:eom())
      expect({}, mta.changes)
    end
  end
end
mta:disconnect()
