-- SPDX-License-Identifier: GPL-3.0-or-later
-- What miltertest runs: it plays a scenario, and tells what was expected and what came.
--
--   miltertest -s prelude.lua -D scenario=FILE -D socket=unix:PATH -D wire=PATH [-D case=NAME]
--
-- miltertest itself prints nothing about an error of a script, knows the text of a reply only at
-- the end of a message, and sees neither a changed sender nor a recipient with parameters nor the
-- lists of macros. So whoever starts it keeps what the filter writes in files (wire.1 for the first
-- connection, and so on), always before miltertest can read it; they are read here.
--
-- A scenario uses connect(), refuses(), expect(), and mt itself. The answer to a step is a string: the
-- name of a verdict, the text of a reply, or "no reply" at a stage where that was negotiated:
--
--   local mta = connect()
--   expect("CONTINUE", mta:mailfrom("<ann@example.org>"))
--   expect("550 5.7.1 not for you", mta:rcptto("<bob@example.net>"))

local VERDICTS = { c = "CONTINUE", a = "ACCEPT", r = "REJECT", t = "TEMPFAIL", d = "DISCARD", s = "SKIP" }

local NO_REPLY = {
  conninfo = SMFIP_NR_CONN,
  helo = SMFIP_NR_HELO,
  mailfrom = SMFIP_NR_MAIL,
  rcptto = SMFIP_NR_RCPT,
  data = SMFIP_NR_DATA,
  header = SMFIP_NR_HDR,
  eoh = SMFIP_NR_EOH,
  bodystring = SMFIP_NR_BODY,
  unknown = SMFIP_NR_UNKN,
}
local STEPS = { "conninfo", "helo", "mailfrom", "rcptto", "data", "header", "eoh", "bodystring", "eom", "unknown" }

local OPTIONS = {
  "NOCONNECT", "NOHELO", "NOMAIL", "NORCPT", "NODATA", "NOHDRS", "NOEOH", "NOBODY", "NOUNKNOWN",
  "NR_CONN", "NR_HELO", "NR_MAIL", "NR_RCPT", "NR_DATA", "NR_HDR", "NR_EOH", "NR_BODY", "NR_UNKN",
  "SKIP", "RCPT_REJ", "HDR_LEADSPC",
}
local ACTIONS = {
  "ADDHDRS", "CHGBODY", "ADDRCPT", "ADDRCPT_PAR", "DELRCPT", "CHGHDRS", "CHGFROM", "QUARANTINE", "SETSYMLIST",
}
local MACRO_LISTS = { [0] = "CONNECT", "HELO", "MAIL", "RCPT", "DATA", "EOM", "EOH" }

-- ---- Assertions ---------------------------------------------------------------------------------

local function shown(value)
  return type(value) == "table" and table.concat(value, "\n  ") or tostring(value)
end

-- Both are strings, or lists of strings.
function expect(expected, actual)
  if shown(expected) ~= shown(actual) then
    error("expected:\n  " .. shown(expected) .. "\ncame:\n  " .. shown(actual), 2)
  end
end

-- ---- What the filter wrote ----------------------------------------------------------------------

local function describe_reply(data)
  return (data:sub(1, -2):gsub("\r\n", "\n"))
end

local CHANGES = {
  h = function(data) return ("add_header %s: %s"):format(string.unpack("zz", data)) end,
  i = function(data) return ("insert_header %d %s: %s"):format(string.unpack(">I4zz", data)) end,
  m = function(data)
    local index, name, value = string.unpack(">I4zz", data)
    return value == "" and ("delete_header %d %s"):format(index, name)
      or ("replace_header %d %s: %s"):format(index, name, value)
  end,
  e = function(data) return "replace_sender " .. data:sub(1, -2):gsub("\0", " ") end,
  ["+"] = function(data) return ("add_recipient %s"):format(string.unpack("z", data)) end,
  ["2"] = function(data) return ("add_recipient %s with %s"):format(string.unpack("zz", data)) end,
  ["-"] = function(data) return ("remove_recipient %s"):format(string.unpack("z", data)) end,
  b = function(data) return "replace_body " .. data:gsub("\r\n", "\\r\\n") end,
  q = function(data) return ("quarantine %s"):format(string.unpack("z", data)) end,
  p = function() return "progress" end,
}

-- ---- A connection -------------------------------------------------------------------------------

local Connection = {}
Connection.__index = Connection
local connections = 0

-- The packets that came since the last call, as pairs of a letter and its data.
function Connection:received()
  local file = io.open(wire .. "." .. self.number, "rb")
  if file == nil then return {} end
  file:seek("set", self.offset)
  local bytes = file:read("a")
  file:close()
  self.offset = self.offset + #bytes
  local packets, position = {}, 1
  while position <= #bytes do
    local packet
    packet, position = string.unpack(">s4", bytes, position)
    packets[#packets + 1] = { letter = packet:sub(1, 1), data = packet:sub(2) }
  end
  return packets
end

-- Of the steps that miltertest fills in by itself each must be answered by CONTINUE.
function Connection:answer(step)
  local verdicts = {}
  self.changes = {}
  for _, packet in ipairs(self:received()) do
    if VERDICTS[packet.letter] then
      verdicts[#verdicts + 1] = VERDICTS[packet.letter]
    elseif packet.letter == "y" then
      verdicts[#verdicts + 1] = describe_reply(packet.data)
    else
      local describe = CHANGES[packet.letter] or error("the filter sent a packet of the kind " .. packet.letter, 3)
      self.changes[#self.changes + 1] = describe(packet.data)
    end
  end
  local answer = "no reply"
  if not (NO_REPLY[step] and mt.test_option(self.handle, NO_REPLY[step])) then
    answer = table.remove(verdicts) or error(step .. " was not answered", 3)
  end
  for _, verdict in ipairs(verdicts) do
    if verdict ~= "CONTINUE" then error("a step before " .. step .. " was answered by " .. verdict, 3) end
  end
  if step ~= "eom" and #self.changes > 0 then
    error(step .. " was answered by " .. shown(self.changes), 3)
  end
  return answer
end

for _, step in ipairs(STEPS) do
  Connection[step] = function(self, ...)
    local failure = mt[step](self.handle, ...)
    if failure ~= nil then error(step .. ": " .. failure, 2) end
    return self:answer(step)
  end
end

function Connection:abort()
  expect(nil, mt.abort(self.handle))
end

function Connection:macro(letter, ...)
  expect(nil, mt.macro(self.handle, string.byte(letter), ...))
end

-- Returns when the filter has closed the connection too, so nothing that it does for it comes later.
function Connection:disconnect(politely)
  mt.disconnect(self.handle, politely ~= false)
  local closed = io.open(wire .. "." .. self.number .. ".closed")
  closed:read(1)
  closed:close()
end

-- What the filter said of itself when it negotiated.

local function chosen(names, prefix, test, handle)
  local list = {}
  for _, name in ipairs(names) do
    if test(handle, _G[prefix .. name]) then list[#list + 1] = name end
  end
  return table.concat(list, " ")
end

function Connection:options()
  return chosen(OPTIONS, "SMFIP_", mt.test_option, self.handle)
end

function Connection:actions()
  return chosen(ACTIONS, "SMFIF_", mt.test_action, self.handle)
end

-- The lists of macros that it asks for, a string each.
function Connection:macro_requests()
  local requests, position = {}, 13
  while position <= #self.negotiated do
    local list, names
    list, names, position = string.unpack(">I4z", self.negotiated, position)
    requests[#requests + 1] = MACRO_LISTS[list] .. ": " .. names
  end
  return requests
end

local function open(offer)
  offer = offer or {}
  connections = connections + 1
  local self = setmetatable({ handle = mt.connect(socket), number = connections, offset = 0 }, Connection)
  -- miltertest takes the steps before the actions, other than its manual says.
  return self, mt.negotiate(self.handle, offer.version, offer.steps, offer.actions)
end

-- Connect and negotiate; offer = { version =, actions =, steps = }, by default all there is.
function connect(offer)
  local self, failure = open(offer)
  if failure ~= nil then error("the filter refused the negotiation: " .. failure, 2) end
  local packets = self:received()
  if #packets ~= 1 or packets[1].letter ~= "O" then error("the filter did not negotiate", 2) end
  self.negotiated = packets[1].data
  return self
end

-- Does the filter end the connection instead of negotiating?
function refuses(offer)
  local self, failure = open(offer)
  mt.disconnect(self.handle, false)
  return failure ~= nil and #self:received() == 0
end

-- A message from its beginning to its end, on a connection, which nothing stops before; the answer to its end.
function Connection:message(fields)
  fields = fields or {}
  local envelope = {
    { "mailfrom", fields.sender or "<ann@client.example>" },
    { "rcptto", fields.recipient or "<bob@mta.example>" },
  }
  for _, command in ipairs(envelope) do
    local step, address = table.unpack(command)
    local answer = self[step](self, address)
    if answer ~= "CONTINUE" and answer ~= "no reply" then error(step .. " was answered by " .. answer, 2) end
  end
  return self:eom()
end

-- The same step by step, as far as the stage of that name: its answer. The first message of a connection begins
-- with the client's name and HELO, others with MAIL. "unknown" comes between two recipients.
function Connection:up_to(stage, client)
  for _, step in ipairs {
    { "connect", "conninfo", client or "client.example", "192.0.2.1" },
    { "helo", "helo", "client.example" },
    { "mail", "mailfrom", "<ann@client.example>" },
    { "rcpt", "rcptto", "<bob@mta.example>" },
    { "unknown", "unknown", "HELP" },
    { "data", "data" },
    { "header", "header", "Subject", "hello" },
    { "eoh", "eoh" },
    { "body", "bodystring", "Hello.\r\n" },
    { "eom", "eom" },
  } do
    local reached, command = step[1], step[2]
    local done = self.has_begun and (reached == "connect" or reached == "helo")
    if not done and (self:sends(reached) or reached == stage) then
      local answer = self[command](self, table.unpack(step, 3))
      if reached == stage then
        self.has_begun = true
        return answer
      end
      if answer ~= "CONTINUE" and answer ~= "no reply" then error(reached .. " was answered by " .. answer, 2) end
    end
  end
  error("no stage is called " .. stage, 2)
end

-- Where a filter answers what its handlers of that stage say: header fields together, at their end.
function answered_at(stage)
  return stage == "header" and "eoh" or stage
end

-- Does an MTA send this stage? Not all of them are wanted; and few clients send unknown commands.
function Connection:sends(stage)
  local declined = { data = SMFIP_NODATA, header = SMFIP_NOHDRS, eoh = SMFIP_NOEOH, body = SMFIP_NOBODY }
  if stage == "unknown" then return false end
  return not (declined[stage] and mt.test_option(self.handle, declined[stage]))
end

-- ---- The scenario -------------------------------------------------------------------------------

local function report(failure)
  io.stderr:write(debug.traceback(tostring(failure), 2), "\n")
  os.exit(1)
end

mt.set_timeout(25)
local chunk, failure = loadfile(scenario)
if chunk == nil then report(failure) end
xpcall(chunk, report)
