# SPDX-License-Identifier: GPL-3.0-or-later
"""shim/io.c and threads.c under stress, plain and with sanitizers, on a stand-in for libmilter.

The stand-in (stress/io/io_stress.c) counts every byte, and its system calls fail and are interrupted.
``MILTER_STRESS`` sets the seconds of each run.
"""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from build_milter import WRAPPERS, Archive, Unsuitable, libmilter_flags, suitable_archive

HERE = Path(__file__).parent
SHIM = HERE.parent / "milter" / "shim"
SECONDS = os.environ.get("MILTER_STRESS", "2")

SANITIZERS = {
    "plain": [],
    "address and undefined": ["-fsanitize=address,undefined", "-fno-omit-frame-pointer"],
    "thread": ["-fsanitize=thread"],
}


def compiled(directory: Path, flags: list[str], sources: list[Path], symbols: tuple[str, ...], *more: str) -> Path:
    """The program, with `symbols` redirected to io.c, and with the rest of the command line."""
    program = directory / "stress"
    command = [
        *shlex.split(os.environ.get("CC", "cc")),
        *["-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread"],
        *flags,
        *(f"-D{name}={value}" for name, value in Archive(Path("none"), symbols).macros),
        *["-I", SHIM, *sources, "-o", program],
        *(f"-Wl,--wrap={name}" for name in symbols),
        *more,
    ]
    subprocess.run(list(map(str, command)), check=True)
    return program


def run(program: Path, flags: list[str], *arguments: str) -> None:
    if flags and not Path("/proc/self/task").exists():
        pytest.skip("a sanitizer reads its options and the threads in /proc")
    # The shadow memory of the sanitizers wants an address space without surprises.
    fixed = ["setarch", "-R"] if shutil.which("setarch") else []
    result = subprocess.run(
        [*fixed, str(program), SECONDS, *arguments],
        env={**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "exitcode=66"},
        capture_output=True,
        text=True,
        check=False,
    )
    print(result.stdout)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]


@pytest.fixture(scope="module")
def archive() -> Archive:
    try:
        return suitable_archive(libmilter_flags())
    except Unsuitable as reason:
        pytest.skip(f"libmilter's system calls are not redirected here: {reason}")


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_every_byte_arrives_whatever_the_system_calls_do(sanitizer: str, archive: Archive, tmp_path: Path) -> None:
    flags = SANITIZERS[sanitizer]
    injected = [f"-Wl,--wrap={name}" for name in ("malloc", "calloc", "sendmsg", "recvmsg", "vsyslog")]
    shim = (SHIM / name for name in ("threads.c", "child.c", "connect_guard.c"))
    sources = [HERE / "stress" / "io" / "io_stress.c", *shim]
    program = compiled(tmp_path, flags, sources, WRAPPERS, *injected)
    run(program, flags, "8", "1")
    with_faults = "1"
    run(program, flags, "8", "2", with_faults)
