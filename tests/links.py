# SPDX-License-Identifier: GPL-3.0-or-later
"""The library linked in both ways, with the static and with the shared libmilter.

One of them is the library that is tested; the other one is built here, once for a run of the tests.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import milter
from build_milter import undefined_symbols
from milter._shim import lib
from milter.libmilter import libmilter

REPOSITORY = Path(__file__).parent.parent
TESTED = Path(milter.__file__).parent


def waits_with_select() -> bool:
    """Was libmilter built to wait with select? Then it serves no descriptor above 1023."""
    maps = Path("/proc/self/maps")
    if libmilter.redirected or not maps.exists():
        return False
    loaded = {line.split()[-1] for line in maps.read_text().splitlines() if "/libmilter.so" in line}
    return any("select" in undefined_symbols(Path(path), "-D") for path in loaded)


def built_library(link: str, directory: Path) -> Path | None:
    """A directory for PYTHONPATH, where `milter` is linked as `link` says; None where that cannot be.

    ``static`` or ``shared``, as in ``MILTER_LINK``.
    """
    if link == ("static" if lib.MILTER_STATIC else "shared"):
        return TESTED.parent
    shutil.copytree(TESTED, directory / "milter", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    places = ["--build-lib", str(directory), "--build-temp", str(directory / "build")]
    command = [sys.executable, "setup.py", "-q", "build_ext", *places]
    environment = {**os.environ, "MILTER_LINK": link}
    built = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    if built.returncode != 0 and link == "static" and "cannot be linked statically" in built.stderr:
        return None
    assert built.returncode == 0, built.stderr
    return directory
