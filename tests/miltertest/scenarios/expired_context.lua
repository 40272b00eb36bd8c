-- SPDX-License-Identifier: GPL-3.0-or-later
-- A context is of no use once its handler has returned, and no harm is done by one that is kept.

local mta = connect()
expect("no reply", mta:helo("client.example"))
expect("CONTINUE", mta:message())
expect({}, mta.changes)
mta:disconnect()
