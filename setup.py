# SPDX-License-Identifier: GPL-3.0-or-later
"""The one thing that pyproject.toml cannot say yet: which script compiles the extension."""

import sysconfig

from setuptools import setup

# The limited API serves all later versions with one wheel; a free-threaded CPython has none.
LIMITED_API = {} if sysconfig.get_config_var("Py_GIL_DISABLED") else {"py_limited_api": "cp311"}

setup(cffi_modules=["build_milter.py:builder"], options={"bdist_wheel": LIMITED_API})
