# SPDX-License-Identifier: GPL-3.0-or-later
"""A filter that tells the size of the stack its handlers have, on a system whose threads get little: SOCKET."""

import ctypes
import sys

from milter import ClientAddress, Context, Milter, Status

app = Milter("stacks")
system = ctypes.CDLL(None)
system.pthread_self.restype = ctypes.c_ulong


class Attributes:
    """Those of a new thread, or of a running one."""

    def __init__(self) -> None:
        self.memory = ctypes.create_string_buffer(128)  # a pthread_attr_t is smaller everywhere

    def size(self) -> int:
        size = ctypes.c_size_t()
        system.pthread_attr_getstacksize(self.memory, ctypes.byref(size))
        return size.value


@app.on_connect
def tell_size(ctx: Context, hostname: str, address: ClientAddress) -> Status:
    mine = Attributes()
    system.pthread_getattr_np(ctypes.c_ulong(system.pthread_self()), mine.memory)
    print(mine.size(), flush=True)
    return Status.CONTINUE


little = Attributes()
system.pthread_getattr_default_np(little.memory)
system.pthread_attr_setstacksize(little.memory, ctypes.c_size_t(128 * 1024))
system.pthread_setattr_default_np(little.memory)
app.run(sys.argv[1])
