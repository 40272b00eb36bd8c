-- SPDX-License-Identifier: GPL-3.0-or-later
-- What the filter asks of the MTA follows from its handlers: not to send what nobody wants to hear, and not to wait
-- where nobody replies. Header fields are answered at their end. Client and envelope are always wanted, since the library remembers them.

local ALL_SILENT = "NR_CONN NR_HELO NR_MAIL NR_RCPT NR_DATA NR_HDR NR_EOH NR_BODY NR_UNKN"

local OPTIONS = {
  ["nothing"] = "NODATA NOHDRS NOEOH NOBODY NOUNKNOWN " .. ALL_SILENT,
  ["eom"] = "NODATA NOHDRS NOEOH NOBODY NOUNKNOWN " .. ALL_SILENT,
  ["abort and close"] = "NODATA NOHDRS NOEOH NOBODY NOUNKNOWN " .. ALL_SILENT,
  ["every stage"] = "NR_HDR SKIP",
  ["every stage, unannotated"] = "NR_HDR SKIP",
  ["every stage, observers"] = ALL_SILENT,
  ["rcpt"] = "NODATA NOHDRS NOEOH NOBODY NOUNKNOWN " .. (ALL_SILENT:gsub("NR_RCPT ", "")),
  ["rcpt, observer and not"] = "NODATA NOHDRS NOEOH NOBODY NOUNKNOWN " .. (ALL_SILENT:gsub("NR_RCPT ", "")),
  ["body"] = "NODATA NOHDRS NOEOH NOUNKNOWN " .. (ALL_SILENT:gsub("NR_BODY ", "")) .. " SKIP",
  ["body, observer"] = "NODATA NOHDRS NOEOH NOUNKNOWN " .. ALL_SILENT,
  ["data"] = "NOHDRS NOEOH NOBODY NOUNKNOWN " .. (ALL_SILENT:gsub("NR_DATA ", "")),
  ["eoh"] = "NODATA NOHDRS NOBODY NOUNKNOWN " .. (ALL_SILENT:gsub("NR_EOH ", "")),
  -- libmilter would drop an end of header, or a header, that it does not expect after these.
  ["header"] = "NODATA NOBODY NOUNKNOWN " .. (ALL_SILENT:gsub("NR_EOH ", "")),
  ["unknown"] = "NOHDRS NOEOH NOBODY " .. (ALL_SILENT:gsub(" NR_UNKN", "")),
  -- A message is wanted whole and exact, whatever its other handlers can do without.
  ["message"] = "NODATA NOUNKNOWN " .. ALL_SILENT .. " HDR_LEADSPC",
  ["message, observer"] = "NODATA NOUNKNOWN " .. ALL_SILENT .. " HDR_LEADSPC",
  ["message, and others that reply"] = "NODATA NOUNKNOWN " .. (ALL_SILENT:gsub("NR_EOH ", ""):gsub("NR_BODY ", ""))
    .. " HDR_LEADSPC",
}

local mta = connect()
expect(OPTIONS[case], mta:options())
expect("ADDHDRS CHGBODY ADDRCPT ADDRCPT_PAR DELRCPT CHGHDRS CHGFROM QUARANTINE SETSYMLIST", mta:actions())
expect({}, mta:macro_requests())
expect("CONTINUE", mta:up_to("eom"))
expect("CONTINUE", mta:up_to("eom"))
mta:disconnect()

-- An MTA that cannot leave out anything, nor do without replies, gets its replies.
local PLAIN = { steps = SMFIP_SKIP } -- no steps at all would be taken for those of the protocol's first version
local plain = connect(PLAIN)
expect(OPTIONS[case]:match("SKIP") or "", plain:options())
for _, stage in ipairs { "connect", "helo", "mail", "rcpt", "data", "header", "eoh", "body", "eom" } do
  local message = connect(PLAIN)
  expect("CONTINUE", message:up_to(stage))
  message:disconnect()
end
expect("CONTINUE", plain:up_to("eom"))
plain:disconnect()

-- One of long ago, which knows a third of all this.
local old = connect { version = 2, actions = 0x0f, steps = 0x7f }
expect("ADDHDRS CHGBODY ADDRCPT DELRCPT", old:actions())
expect("CONTINUE", old:up_to("eom"))
old:disconnect()
