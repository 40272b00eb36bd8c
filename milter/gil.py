# SPDX-License-Identifier: GPL-3.0-or-later
"""Whether the threads of this Python run one at a time (under the GIL), or side by side (free threading)."""

import sys
import sysconfig

__all__ = ["gil_is_on", "python_version"]


def gil_is_on() -> bool:
    """At this moment: a free-threaded Python switches it on for good when a module is imported that needs it."""
    ask = getattr(sys, "_is_gil_enabled", None)  # since Python 3.13
    return ask is None or bool(ask())


def python_version() -> str:
    """For people."""
    version = f"Python {'.'.join(map(str, sys.version_info[:3]))}"
    if not sysconfig.get_config_var("Py_GIL_DISABLED"):
        return version
    return f"{version}, free-threaded, the GIL is {'on' if gil_is_on() else 'off'}"
