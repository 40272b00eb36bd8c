# SPDX-License-Identifier: GPL-3.0-or-later
"""What systemd is told of this process (sd_notify(3)), where it asks for it by ``NOTIFY_SOCKET``."""

import contextlib
import os
import socket
import time

__all__ = ["ready", "reloading", "stopping"]


def ready() -> None:
    """The filter accepts connections: at the start, and at the end of a reload."""
    _tell("READY=1")


def reloading() -> None:
    """With the time that ``Type=notify-reload`` wants."""
    _tell(f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")


def stopping() -> None:
    _tell("STOPPING=1")


def _tell(state: str) -> None:
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address[:1] not in ("/", "@"):
        return
    if address.startswith("@"):  # in the abstract namespace
        address = "\0" + address[1:]
    # Whether systemd listens is its own business: the filter works without.
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.connect(address)
        sender.send(f"{state}\n".encode("ascii"))
