# SPDX-License-Identifier: GPL-3.0-or-later
"""The library built with AddressSanitizer and UndefinedBehaviorSanitizer; libmilter too, where its source is at hand.

``MILTER_SOURCE`` names a directory with the unpacked source of sendmail (Debian: ``apt-get source sendmail``). Then
libmilter is compiled from it as Debian does, but with ``_FFR_ADD_NULL``: its own switch against what is known to read
past the end of a packet, which would hide what is not known (see docs/libmilter.md).
"""

import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import milter
from milter.libmilter import libmilter as tested

REPOSITORY = Path(__file__).parent.parent.parent
SANITIZERS = "-fsanitize=address,undefined"
COMPILED = ["-fno-omit-frame-pointer", "-O1", "-g"]

LIBMILTER = ("main", "engine", "listener", "worker", "handler", "comm", "smfi", "signal", "sm_gethost", "monitor")
LIBSM = ("errstring", "strl")
# As in Debian's site.config.m4 and libmilter's Makefile.m4.
DEFINED = (
    *("-DNOT_SENDMAIL", "-Dsm_snprintf=snprintf", "-DSM_CONF_POLL=1", "-D_FFR_WORKERS_POOL=1", "-DNETINET6=1"),
    "-DXP_MT",
)
REPAIRED = ("-D_FFR_ADD_NULL=1",)
AS_IT_IS: tuple[str, ...] = ()


class Unavailable(Exception):
    """There are no sanitizers here; says why."""


@dataclass(frozen=True)
class Sanitized:
    """A directory for PYTHONPATH, and what a process needs that uses it."""

    library: Path
    environment: dict[str, str]
    redirected: bool
    """libmilter's system calls are."""


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CC", "cc"))


def runtime() -> str:
    """The library of AddressSanitizer, which must be loaded before all others."""
    name = "libasan.so"
    found = subprocess.run([*compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    path = Path(found.stdout.strip())
    if not path.is_absolute() or not Path("/proc/self/maps").exists():
        raise Unavailable(f"{' '.join(compiler())} has no {name}, or there is no /proc")
    return str(path.resolve())


def source() -> Path | None:
    named = os.environ.get("MILTER_SOURCE")
    return Path(named) if named else None


def built(directory: Path) -> Sanitized:
    """Compile all of it into `directory`."""
    preloaded = runtime()
    package = directory / "milter"
    shutil.copytree(Path(milter.__file__).parent, package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    environment = {
        **os.environ,
        "CFLAGS": " ".join([SANITIZERS, "-fno-sanitize-recover=undefined", *COMPILED]),
        "LDFLAGS": SANITIZERS,
    }
    sources = source()
    redirected = sources is not None or bool(tested.redirected)
    environment["MILTER_LINK"] = "static" if redirected else "shared"
    if sources is not None:
        environment["PKG_CONFIG_PATH"] = str(libmilter(sources, directory / "libmilter"))
    places = ["--build-lib", str(directory), "--build-temp", str(directory / "build")]
    command = [sys.executable, "setup.py", "-q", "build_ext", *places]
    subprocess.run(command, cwd=REPOSITORY, env=environment, check=True)
    return Sanitized(
        directory,
        {
            "LD_PRELOAD": preloaded,
            # Python itself leaks on purpose. What it allocates is to be watched, too.
            "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1:allocator_may_return_null=1",
            "UBSAN_OPTIONS": "print_stacktrace=1",
            "PYTHONMALLOC": "malloc",
        },
        redirected,
    )


def libmilter(sources: Path, directory: Path, switches: tuple[str, ...] = REPAIRED) -> Path:
    """Compile libmilter; a directory for PKG_CONFIG_PATH with the archive."""
    directory.mkdir(parents=True)
    (directory / "sm_os.h").write_text('#include "sm/os/sm_os_linux.h"\n')
    paths = [
        *(sources / "libmilter" / f"{name}.c" for name in LIBMILTER),
        *(sources / "libsm" / f"{name}.c" for name in LIBSM),
    ]
    for path in paths:
        compile_one(path, directory, sources, switches)
    objects = sorted(map(str, directory.glob("*.o")))
    subprocess.run(["ar", "rcs", str(directory / "libmilter.a"), *objects], check=True)
    (directory / "milter.pc").write_text(
        f"Name: milter\nDescription: libmilter with sanitizers\nVersion: 0\nLibs: -L{directory} -lmilter {SANITIZERS}\n"
        f"Cflags: -I{sources / 'include'}\n"
    )
    return directory


def compile_one(path: Path, directory: Path, sources: Path, switches: tuple[str, ...]) -> None:
    includes = [f"-I{directory}", f"-I{sources / 'include'}", f"-I{sources / 'sendmail'}"]
    command = [*compiler(), "-c", "-w", "-fPIC", "-pthread", SANITIZERS, *COMPILED, *DEFINED, *switches, *includes]
    subprocess.run([*command, str(path), "-o", str(directory / f"{path.stem}.o")], check=True)
