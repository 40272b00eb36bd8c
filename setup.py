# SPDX-License-Identifier: GPL-3.0-or-later
"""What pyproject.toml cannot say yet: which script compiles the extension, and what is checked afterwards."""

import subprocess
import sys
import sysconfig

from setuptools import setup
from setuptools.command.build_ext import build_ext

# Loads the extension alone, without the package that may not be there yet.
LOOK = """
import importlib.machinery, importlib.util, sys
loader = importlib.machinery.ExtensionFileLoader("milter._shim", sys.argv[1])
module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
loader.exec_module(module)
sys.exit(0 if module.lib.milter_io_wrapped() else 3)
"""
NOT_REDIRECTED = """\
milter: libmilter was linked statically, but the linker did not redirect all of its system calls.
Build with MILTER_LINK=shared, which does the same in another way.
"""


class CheckedBuild(build_ext):
    """The extension itself tells if the linker redirected libmilter's calls; another machine's cannot be asked."""

    def run(self) -> None:
        super().run()
        for extension in self.extensions:
            if ("MILTER_STATIC", "1") in extension.define_macros:
                path = self.get_ext_fullpath(extension.name)
                if subprocess.run([sys.executable, "-c", LOOK, path], check=False, capture_output=True).returncode == 3:
                    raise SystemExit(NOT_REDIRECTED)


# The limited API serves all later versions with one wheel; a free-threaded CPython has none.
LIMITED_API = {} if sysconfig.get_config_var("Py_GIL_DISABLED") else {"py_limited_api": "cp311"}

setup(
    cmdclass={"build_ext": CheckedBuild}, cffi_modules=["build_milter.py:builder"], options={"bdist_wheel": LIMITED_API}
)
