# SPDX-License-Identifier: GPL-3.0-or-later
"""The shim alone, to which nobody has attached Python functions: SOCKET. It must fail closed."""

import importlib.machinery
import importlib.util
import logging
import os
import sys
from pathlib import Path

package = importlib.util.find_spec("milter")
assert package is not None
assert package.origin is not None
directory = Path(package.origin).parent
# Several may lie there, for several Pythons: the first one is this Python's.
places = (directory / f"_shim{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES)
extension = next(place for place in places if place.exists())
loader = importlib.machinery.ExtensionFileLoader("milter._shim", str(extension))
spec = importlib.util.spec_from_loader("milter._shim", loader)
assert spec is not None
shim = importlib.util.module_from_spec(spec)
loader.exec_module(shim)
ffi, lib = shim.ffi, shim.lib

plan = ffi.new("struct milter_plan *")
for stage in range(lib.MILTER_STAGES):
    plan.mode[stage] = lib.MILTER_ENTER
assert lib.milter_register(b"unattached") == 0
assert lib.smfi_setconn(sys.argv[1].encode()) == 0
assert lib.smfi_opensocket(False) == 0
lib.milter_begin(plan)
assert lib.milter_serve(1) == 0
logging.getLogger("milter").info("unattached is listening on %s", sys.argv[1])
sys.stdin.readline()
os._exit(0)
