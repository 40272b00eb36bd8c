-- SPDX-License-Identifier: GPL-3.0-or-later
-- Macros are asked for at the stages that declare them, besides the usual ones, and "j" always: with nothing to send,
-- an MTA would leave the macros of the last message in place. miltertest shows the lists to nobody.

local mta = connect()
expect({
  "CONNECT: j {daemon_name} {daemon_addr} v _ {if_name} {if_addr} {client_ptr} {client_port}",
  "MAIL: j i {auth_type} {auth_authen} {auth_ssf} {auth_author} {mail_mailer} {mail_host} {mail_addr}",
  "RCPT: j i {rcpt_mailer} {rcpt_host} {rcpt_addr} {nrcpts}",
  "DATA: j i {at_header} {at_body}",
  "EOM: j i {msg_id} {first} {second}",
  "EOH: j i {at_eoh}",
}, mta:macro_requests())
expect("CONTINUE", mta:eom())
mta:disconnect()

-- An MTA that does not let itself be asked must not be.
local deaf = connect { actions = SMFIF_ADDHDRS }
expect({}, deaf:macro_requests())
expect("CONTINUE", deaf:eom())
deaf:disconnect()
