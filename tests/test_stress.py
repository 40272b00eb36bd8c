# SPDX-License-Identifier: GPL-3.0-or-later
"""The shim under stress, on the real libmilter, with a stand-in for Python: plain and with sanitizers.

libmilter is linked as it is, and then so that its calls go to the shim, as in the wheels. What is checked
stands at the head of stress/stress.c. ``MILTER_STRESS`` sets the seconds of each run.
"""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from build_milter import SOURCES, Archive, Unsuitable, libmilter_flags, suitable_archive

HERE = Path(__file__).parent
SHIM = HERE.parent / "milter" / "shim"
LEFT = HERE / "stress" / "scheduler.supp"
SECONDS = os.environ.get("MILTER_STRESS", "3")

SANITIZERS = {
    "plain": [],
    "address and undefined": ["-fsanitize=address,undefined", "-fno-omit-frame-pointer"],
    "thread": ["-fsanitize=thread"],
}

# What the program puts in the place of calls, so that they can fail, or show something.
MEMORY_AND_DISKS = ("malloc", "realloc", "calloc", "strdup", "free", "open", "write")
SYSTEM = ("sendmsg", "recvmsg", "epoll_wait", "epoll_ctl", "pthread_create", "vsyslog", "mi_engine")


def compiled(directory: Path, flags: list[str], archive: Archive | None) -> Path:
    program = directory / "stress"
    inside = {"packets.c", "scheduler.c"}  # which stress/inside.c and leads.c include
    shim = [SHIM / name for name in SOURCES if name not in inside]
    redirection = [*archive.link_flags, archive.path] if archive else []
    command = [
        *shlex.split(os.environ.get("CC", "cc")),
        *["-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread"],
        *flags,
        *["-Dcalloc=calloc_for_ever", "-Dstrdup=strdup_for_ever"],  # the shim's, not libmilter's
        *(f"-D{name}={value}" for name, value in (archive.macros if archive else [])),
        *["-I", SHIM, *sorted((HERE / "stress").glob("*.c")), *shim, "-o", program],
        f"-Wl,{','.join(f'--wrap={name}' for name in (*MEMORY_AND_DISKS, *SYSTEM))}",
        *redirection,
        *(flag for flag in libmilter_flags() if not (archive and flag == "-lmilter")),
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
        env={**os.environ, "ASAN_OPTIONS": "detect_leaks=1", "TSAN_OPTIONS": f"exitcode=66 suppressions={LEFT}"},
        capture_output=True,
        text=True,
        check=False,
    )
    print(result.stderr[-4000:])
    assert result.returncode == 0, result.stderr[-4000:]


# Clients, seed, faults, and 1: garbage ends in NUL. libmilter gives an unknown command
# without its length, and reads on where an MTA forgot the NUL.
@pytest.mark.parametrize(
    ("sanitizer", "arguments"),
    [
        ("plain", ["8", "1", "0", "1"]),
        ("plain", ["8", "2", "1", "1"]),
        ("address and undefined", ["8", "3", "0", "1"]),
        ("thread", ["8", "4", "0", "1"]),
    ],
)
def test_the_shim_keeps_its_invariants_under_stress(sanitizer: str, arguments: list[str], tmp_path: Path) -> None:
    flags = SANITIZERS[sanitizer]
    run(compiled(tmp_path, flags, None), flags, *arguments)


@pytest.fixture(scope="module")
def archive() -> Archive:
    try:
        return suitable_archive(libmilter_flags())
    except Unsuitable as reason:
        pytest.skip(f"libmilter's calls are not redirected here: {reason}")


# Clients, seed, faults, and 0: an MTA may forget a NUL. Then pauses beyond the time-out, and how many threads lead.
RUNS = {
    "calm": ["8", "5", "0", "0"],
    "faults": ["8", "6", "1", "0"],
    "silent MTAs": ["8", "7", "0", "0", "1"],
    "four lead": ["16", "8", "0", "0", "0", "4"],
    "four lead, faults": ["16", "9", "1", "0", "0", "4"],
}


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_the_scheduler_keeps_its_invariants_under_stress(sanitizer: str, archive: Archive, tmp_path: Path) -> None:
    flags = SANITIZERS[sanitizer]
    program = compiled(tmp_path, flags, archive)
    for arguments in RUNS.values():
        run(program, flags, *arguments)
