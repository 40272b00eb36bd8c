# SPDX-License-Identifier: GPL-3.0-or-later
"""Compile milter/shim into the extension ``milter._shim``; called by setup.py.

libmilter is found through pkg-config, by the name ``milter``: first where
``PKG_CONFIG_PATH`` and the system say, then by the ``milter.pc`` beside this file.

``MILTER_STRICT=1`` turns the compiler's warnings into errors.
"""

import os
import shlex
import subprocess
import sysconfig
import tempfile
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
SHIM = Path("milter", "shim")
SOURCES = ("milter_shim.c", "content.c", "changes.c", "macro_guard.c")

MISSING_PKG_CONFIG = """\
milter: pkg-config is missing, so libmilter cannot be found.
Install it: Debian, Ubuntu: pkgconf; Fedora: pkgconf-pkg-config; Alpine: pkgconf; FreeBSD: pkgconf.
"""
MISSING_LIBMILTER = """\
milter: libmilter and its header libmilter/mfapi.h are missing, or the compiler does not find them{reason}.
Install it: Debian, Ubuntu: libmilter-dev; Fedora: sendmail-milter-devel; Alpine: libmilter-dev; FreeBSD: libmilter.
"""
MISSING_COMPILER = """\
milter: the C compiler "{compiler}" is missing.
Install it: Debian, Ubuntu: gcc libc6-dev; Fedora: gcc; Alpine: gcc musl-dev; FreeBSD: in the base system.
"""

PROBE = """\
#include <stdbool.h>
#include <libmilter/mfapi.h>
int main(void) { return smfi_stop(); }
"""


def builder() -> FFI:
    """What setup.py compiles. Exits with two plain lines where something is missing."""
    flags = libmilter_flags()
    probe(flags)
    ffi = FFI()
    ffi.cdef(declarations())
    ffi.set_source(
        "milter._shim",
        '#include "milter_shim.h"',
        sources=[str(SHIM / name) for name in SOURCES],
        depends=[str(SHIM / path.name) for path in sorted((HERE / SHIM).glob("*.h"))],
        include_dirs=[str(SHIM), *directories(flags, "-I")],
        library_dirs=directories(flags, "-L"),
        libraries=[flag[2:] for flag in flags if flag.startswith("-l")],
        extra_compile_args=["-std=c11", *warnings(), *other(flags)],
        extra_link_args=["-pthread"],
    )
    return ffi


def declarations() -> str:
    return (HERE / SHIM / "cdef.h").read_text(encoding="ascii")


def libmilter_flags() -> list[str]:
    """The compiler's and linker's options, from pkg-config."""
    for path in (None, HERE):
        flags = pkg_config(path)
        if flags is not None:
            return with_parents(flags)
    raise SystemExit(MISSING_LIBMILTER.format(reason=""))


def pkg_config(path: Path | None) -> list[str] | None:
    """What pkg-config says of ``milter``, looking in `path` too; None when it does not know it."""
    command = [os.environ.get("PKG_CONFIG", "pkg-config"), "--cflags", "--libs", "milter"]
    environment = dict(os.environ)
    if path is not None:
        places = [str(path), environment.get("PKG_CONFIG_PATH", "")]
        environment["PKG_CONFIG_PATH"] = os.pathsep.join(filter(None, places))
    try:
        found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise SystemExit(MISSING_PKG_CONFIG) from None
    return shlex.split(found.stdout) if found.returncode == 0 else None


def with_parents(flags: list[str]) -> list[str]:
    """``mfapi.h`` includes ``libmilter/mfdef.h``, but some files name the inner directory only."""
    inner = [Path(flag[2:]) for flag in flags if flag.startswith("-I")]
    parents = {path.parent for path in inner if path.name == "libmilter"} - {Path("/usr/include")}
    return flags + [f"-I{path}" for path in sorted(parents)]


def probe(flags: list[str]) -> None:
    """Compile and link three lines, so that a missing header is told in two, not in a compiler's pages."""
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory, "probe.c")
        source.write_text(PROBE, encoding="ascii")
        command = [*compiler, str(source), "-o", str(source.with_suffix("")), *flags, "-pthread"]
        try:
            result = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            raise SystemExit(MISSING_COMPILER.format(compiler=compiler[0])) from None
    if result.returncode != 0:
        said = next((line.partition("error: ")[2] for line in result.stderr.splitlines() if "error: " in line), "")
        raise SystemExit(MISSING_LIBMILTER.format(reason=f" ({said})" if said else ""))


def directories(flags: list[str], option: str) -> list[str]:
    return [flag[2:] for flag in flags if flag.startswith(option)]


def other(flags: list[str]) -> list[str]:
    return [flag for flag in flags if flag[:2] not in ("-I", "-L", "-l")]


def warnings() -> list[str]:
    return ["-Wall", "-Wextra", "-Werror"] if os.environ.get("MILTER_STRICT") else []


if __name__ == "__main__":
    builder().compile(verbose=True)
