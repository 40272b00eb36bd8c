# SPDX-License-Identifier: GPL-3.0-or-later
"""Loads the extension ``milter._shim``, before any other module asks for it.

A shared libmilter looks for the functions that it calls in the whole process first, and then beside itself. With
``RTLD_DEEPBIND`` that order is the other way round for the extension and the libraries that it brings along: so
libmilter finds those of the extension, which has its own for some names (shim/redirect.h). Where that does not come
about (a C library without this flag, a libmilter that another extension has loaded before), shim/redirect.c sees it.

A static libmilter needs nothing of that; and a process with a sanitizer does not allow it.
"""

import importlib
import importlib.util
import os
import sys
from pathlib import Path


def _needs_libmilter(module: str) -> bool:
    """Does this extension bring the shared library along? Its name is then among those in the file."""
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.origin is not None and b"libmilter.so" in Path(spec.origin).read_bytes()


def _load(module: str) -> None:
    flags = sys.getdlopenflags()
    if hasattr(os, "RTLD_DEEPBIND") and _needs_libmilter(module):
        sys.setdlopenflags(os.RTLD_NOW | os.RTLD_DEEPBIND)
    try:
        importlib.import_module(module)
    finally:
        sys.setdlopenflags(flags)


_load("milter._shim")
