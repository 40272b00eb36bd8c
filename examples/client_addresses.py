# SPDX-License-Identifier: GPL-3.0-or-later
"""Print the address of each SMTP client. The smallest filter there is.

python examples/client_addresses.py inet:3000@localhost
"""

import sys

from milter import ClientAddress, Context, Milter

app = Milter("client_addresses")


@app.on_connect
def print_address(ctx: Context, hostname: str, address: ClientAddress) -> None:
    if address is not None:
        print(f"connect from {address}", flush=True)


if __name__ == "__main__":
    app.run(sys.argv[1])
