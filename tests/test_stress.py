# SPDX-License-Identifier: GPL-3.0-or-later
"""The shim under stress, on the real libmilter, with a stand-in for Python: plain and with sanitizers.

What is checked stands at the head of stress/stress.c. ``MILTER_STRESS`` sets the seconds of each run.
"""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from build_milter import libmilter_flags

HERE = Path(__file__).parent
SHIM = HERE.parent / "milter" / "shim"
SECONDS = os.environ.get("MILTER_STRESS", "5")

# Clients, seed, allocations that fail, and 1: garbage ends in NUL. libmilter gives an unknown command
# without its length, and reads on where an MTA forgot the NUL.
BUILDS = {
    "plain": ([], ["8", "1", "0", "1"]),
    "out of memory": ([], ["8", "2", "1", "1"]),
    "address and undefined": (["-fsanitize=address,undefined", "-fno-omit-frame-pointer"], ["8", "3", "0", "1"]),
    "thread": (["-fsanitize=thread"], ["8", "4", "0", "1"]),
}

# What the program puts in the place of the shim's calls, so that they can fail.
FAULTS = ("malloc", "realloc", "calloc", "free", "open", "write")


def compiled(directory: Path, flags: list[str]) -> Path:
    program = directory / "stress"
    guards = ("macro_guard.c", "connect_guard.c", "peer.c")
    shim = ("milter_shim.c", "content.c", "changes.c", *guards, "io.c", "turns.c", "child.c")
    sources = [*sorted((HERE / "stress").glob("*.c")), *(SHIM / name for name in shim)]
    command = [
        *shlex.split(os.environ.get("CC", "cc")),
        *["-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread"],
        *flags,
        *["-I", SHIM, *sources, "-o", program],
        f"-Wl,{','.join(f'--wrap={name}' for name in FAULTS)}",
        *libmilter_flags(),
    ]
    subprocess.run(list(map(str, command)), check=True)
    return program


@pytest.mark.parametrize("build", BUILDS)
def test_the_shim_keeps_its_invariants_under_stress(build: str, tmp_path: Path) -> None:
    flags, arguments = BUILDS[build]
    if flags and not Path("/proc/self/task").exists():
        pytest.skip("a sanitizer reads its options and the threads in /proc")
    program = compiled(tmp_path, flags)
    # The shadow memory of the sanitizers wants an address space without surprises.
    fixed = ["setarch", "-R"] if shutil.which("setarch") else []
    result = subprocess.run(
        [*fixed, str(program), SECONDS, *arguments],
        env={**os.environ, "ASAN_OPTIONS": "detect_leaks=1", "TSAN_OPTIONS": "exitcode=66"},
        capture_output=True,
        text=True,
        check=False,
    )
    print(result.stdout)
    assert result.returncode == 0, result.stderr[-4000:]
