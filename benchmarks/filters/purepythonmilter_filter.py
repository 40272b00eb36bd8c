# SPDX-License-Identifier: GPL-3.0-or-later
"""The filter with purepythonmilter: ``purepythonmilter_filter.py inet:PORT@HOST``. It knows TCP only.

Its hooks are functions without state; commands of one connection are handled in one task, so a
context variable keeps the count.
"""

import sys
from contextvars import ContextVar

import purepythonmilter as ppm

total = ContextVar("total", default=0)


async def on_mail_from(command: ppm.MailFrom) -> None:
    total.set(0)


async def on_header(command: ppm.Header) -> None:
    total.set(total.get() + len(command.text.encode()))


async def on_body_chunk(command: ppm.BodyChunk) -> None:
    total.set(total.get() + len(command.data_raw))


async def on_end_of_message(command: ppm.EndOfMessage) -> ppm.Continue:
    return ppm.Continue(manipulations=[ppm.AppendHeader(headername="X-Sum", headertext=str(total.get()))])


app = ppm.PurePythonMilter(
    name="benchmark",
    hook_on_mail_from=on_mail_from,
    hook_on_header=on_header,
    hook_on_body_chunk=on_body_chunk,
    hook_on_end_of_message=on_end_of_message,
    can_add_headers=True,
)

if __name__ == "__main__":
    port, _, host = sys.argv[1].removeprefix("inet:").partition("@")
    app.run_server(host=host, port=int(port))
