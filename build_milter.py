# SPDX-License-Identifier: GPL-3.0-or-later
"""Compile milter/shim into the extension ``milter._shim``; called by setup.py.

libmilter is found through pkg-config, by the name ``milter``: first where
``PKG_CONFIG_PATH`` and the system say, then by the ``milter.pc`` beside this file.

Where there is a static ``libmilter.a`` that can be a part of the extension, it is linked, and the linker
redirects some of its calls to milter/shim (redirect.c, packets.c, scheduler.c); else the shared library is, whose
calls the dynamic linker redirects. ``MILTER_LINK=static`` or ``shared`` says which it must be.

``MILTER_STRICT=1`` turns the compiler's warnings into errors.
"""

import os
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
SHIM = Path("milter", "shim")
SOURCES = (
    *("milter_shim.c", "content.c", "changes.c", "macro_guard.c", "connect_guard.c", "peer.c"),
    *("packets.c", "scheduler.c", "redirect.c", "child.c"),
)
# The shared library's calls are redirected by the dynamic linker. Where they are not, the extension finds it out.
SHARED_MACROS = [("MILTER_REDIRECT", "1")] if sys.platform == "linux" else []
INTERFACES = ("milter_shim", "child", "packets", "redirect", "scheduler")

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

WRONG_LINK = """\
milter: MILTER_LINK={value} is neither "static" nor "shared".
Set one of them, or none: then the static library is linked where that is possible.
"""
STATIC_IMPOSSIBLE = """\
milter: MILTER_LINK=static, but libmilter cannot be linked statically with its system calls redirected: {reason}.
It needs a libmilter.a of position-independent code (Debian, Ubuntu: libmilter-dev), and a linker that knows --wrap.
"""
SHARED_INSTEAD = "milter: linking the shared libmilter: {reason}"

# What packets.c, scheduler.c and redirect.c put in the place of libmilter's calls.
WRAPPERS = ("accept", "close", "mi_rd_cmd", "mi_wr_cmd", "poll", "syslog")
# These are called only in some builds: by the fortified ones, and by those with a pool of workers.
WRAPPERS_OF_SOME = ("__poll_chk", "__syslog_chk", "mi_pool_controller_init", "mi_start_session")
# Without these it is not the libmilter that they were written for; one name of each line must be there.
NEEDED = (("accept",), ("close",), ("mi_rd_cmd",), ("mi_wr_cmd",), ("poll", "__poll_chk"))
# Ways around them: a libmilter that uses one of them stays as it is.
UNSERVED = frozenset(
    [
        *["accept4", "epoll_wait", "epoll_pwait", "ppoll", "__ppoll_chk", "pselect", "select", "shutdown"],
        *["preadv", "readv", "recv", "recvfrom", "recvmsg", "__recv_chk", "__recvfrom_chk"],
        *["pwritev", "send", "sendmsg", "sendto", "vsyslog", "__vsyslog_chk"],
    ]
)

PROBE = """\
#include <stdbool.h>
#include <libmilter/mfapi.h>
int main(void) { return smfi_stop(); }
"""


def builder() -> FFI:
    """What setup.py compiles. Exits with two plain lines where something is missing."""
    flags = libmilter_flags()
    probe(flags)
    archive = chosen_archive(flags)
    objects = [str(archive.path)] if archive else []
    ffi = FFI()
    ffi.cdef(declarations())
    ffi.set_source(
        "milter._shim",
        # With another libmilter the source is another one, and is compiled anew.
        f"/* {archive or 'shared'} */\n" + "".join(f'#include "{name}.h"\n' for name in INTERFACES),
        sources=[str(SHIM / name) for name in SOURCES],
        depends=[str(SHIM / path.name) for path in sorted((HERE / SHIM).glob("*.h"))] + objects,
        define_macros=archive.macros if archive else SHARED_MACROS,
        include_dirs=[str(SHIM), *directories(flags, "-I")],
        library_dirs=directories(flags, "-L"),
        libraries=[flag[2:] for flag in flags if flag.startswith("-l") and not (archive and flag == "-lmilter")],
        extra_objects=objects,
        extra_compile_args=["-std=c11", *warnings(), *other(flags), *(["-fno-lto"] if archive else [])],
        extra_link_args=["-pthread", *(archive.link_flags if archive else linker_options(flags))],
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
    compiler = compiler_command()
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory, "probe.c")
        source.write_text(PROBE, encoding="ascii")
        command = [*compiler, str(source), "-o", str(source.with_suffix("")), *flags, "-pthread"]
        try:
            result = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            raise SystemExit(MISSING_COMPILER.format(compiler=compiler[0])) from None
    if result.returncode != 0:
        said = first_error(result.stderr)
        raise SystemExit(MISSING_LIBMILTER.format(reason=f" ({said})" if said else ""))


def compiler_command() -> list[str]:
    return shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")


def first_error(said: str) -> str:
    """What a compiler said behind its first "error: ", or nothing."""
    return next((line.partition("error: ")[2] for line in said.splitlines() if "error: " in line), "")


# ---- The static library ----------------------------------------------------------------------


class Unsuitable(Exception):
    """libmilter cannot be linked statically here; says why."""


@dataclass(frozen=True)
class Archive:
    """A static libmilter that can be a part of the extension, and the names it calls that are redirected."""

    path: Path
    symbols: tuple[str, ...]

    @property
    def link_flags(self) -> list[str]:
        # Hidden, libmilter's names are not taken for those of a shared one that somebody else has loaded.
        return [*(f"-Wl,--wrap={name}" for name in self.symbols), f"-Wl,--exclude-libs,{self.path.name}"]

    @property
    def macros(self) -> list[tuple[str, str | None]]:
        """redirect.c shows by these names that the linker used them."""
        return [
            ("MILTER_REDIRECT", "1"),
            ("MILTER_STATIC", "1"),
            ("MILTER_IO_SYMBOLS", " ".join(f"X({name})" for name in self.symbols)),
        ]


def chosen_archive(flags: list[str]) -> Archive | None:
    """What ``MILTER_LINK`` asks for; None for the shared library."""
    wanted = os.environ.get("MILTER_LINK", "")
    if wanted not in ("", "static", "shared"):
        raise SystemExit(WRONG_LINK.format(value=wanted))
    if wanted == "shared":
        return None
    try:
        return suitable_archive(flags)
    except Unsuitable as reason:
        if wanted == "static":
            raise SystemExit(STATIC_IMPOSSIBLE.format(reason=reason)) from None
        print(SHARED_INSTEAD.format(reason=reason), file=sys.stderr)
        return None


def suitable_archive(flags: list[str]) -> Archive:
    if sys.platform != "linux":
        raise Unsuitable("what would serve it needs epoll")
    path = find_archive(flags)
    calls = undefined_symbols(path)
    around = sorted(calls & UNSERVED)
    lacking = [names[0] for names in NEEDED if calls.isdisjoint(names)]
    if around:
        raise Unsuitable(f"{path} calls {', '.join(around)}")
    if lacking:
        raise Unsuitable(f"{path} does not call {', '.join(lacking)}")
    archive = Archive(path, tuple(sorted({*WRAPPERS, *calls.intersection(WRAPPERS_OF_SOME)})))
    try_redirection(archive)
    return archive


def find_archive(flags: list[str]) -> Path:
    """Beside the shared library, where pkg-config or the compiler know it."""
    places = directories(flags, "-L")
    for place in places:
        if Path(place, "libmilter.a").exists():
            return Path(place, "libmilter.a")
    # The compiler answers with a path, or with the bare name if it knows none.
    found = Path(output([*compiler_command(), "-print-file-name=libmilter.a"]).strip())
    if not found.is_absolute() or not found.exists():
        raise Unsuitable("there is no libmilter.a")
    return found.resolve()


def undefined_symbols(path: Path, *options: str) -> set[str]:
    """The names that the members of an archive, or a shared object, want from elsewhere."""
    lines = output([os.environ.get("NM", "nm"), "-u", *options, str(path)]).splitlines()
    return {line.split()[-1].partition("@")[0] for line in lines if " U " in f" {line}"}


def try_redirection(archive: Archive) -> None:
    """Link the whole archive into a shared object, with stand-ins for the wrappers that call nothing.

    It fails where the code is not position-independent, or the linker does not know ``--wrap``. And if
    one of the names is still wanted from elsewhere, the linker took the options and did not redirect it.
    """
    with tempfile.TemporaryDirectory() as directory:
        source, linked = Path(directory, "trial.c"), Path(directory, "trial.so")
        source.write_text("".join(f"int __wrap_{name}(void) {{ return -1; }}\n" for name in archive.symbols))
        output(
            [
                *compiler_command(),
                *["-shared", "-fPIC", str(source), "-o", str(linked)],
                *["-Wl,--whole-archive", str(archive.path), "-Wl,--no-whole-archive", *archive.link_flags, "-pthread"],
            ]
        )
        left = undefined_symbols(linked, "-D").intersection(archive.symbols)
    if left:
        raise Unsuitable(f"the linker did not redirect {', '.join(sorted(left))}")


def output(command: list[str]) -> str:
    """What a tool prints; if it fails, that is why the archive is unsuitable."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise Unsuitable(f"{command[0]} is missing") from None
    if result.returncode != 0:
        said = first_error(result.stderr) or next(iter(result.stderr.splitlines()), "") or "no message"
        raise Unsuitable(f"{command[0]} failed ({said})")
    return result.stdout


def directories(flags: list[str], option: str) -> list[str]:
    return [flag[2:] for flag in flags if flag.startswith(option)]


def linker_options(flags: list[str]) -> list[str]:
    """Say, where the shared library is looked for when the extension is loaded."""
    return [flag for flag in flags if flag.startswith("-Wl,")]


def other(flags: list[str]) -> list[str]:
    return [flag for flag in flags if flag[:2] not in ("-I", "-L", "-l") and not flag.startswith("-Wl,")]


def warnings() -> list[str]:
    if not os.environ.get("MILTER_STRICT"):
        return []
    # For a free-threaded Python cffi says this on the command line and in its source, which gives a warning.
    return ["-Wall", "-Wextra", "-Werror", "-U_CFFI_NO_LIMITED_API"]


if __name__ == "__main__":
    builder().compile(verbose=True)
