# SPDX-License-Identifier: GPL-3.0-or-later
"""What the figures were measured on."""

import datetime
import os
import platform
import subprocess
from pathlib import Path


def facts() -> dict[str, str | int]:
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "cpus": cpus(),
        "cpu": _cpu(),
        "memory_mib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20,
        "kernel": f"{platform.system()} {platform.release()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "libmilter": _libmilter(),
    }


def cpus() -> int:
    return len(os.sched_getaffinity(0))


def busy_seconds() -> float:
    """What all processors together have worked since the machine started, for whomever."""
    user, nice, system, _idle, _waiting, *others = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    return sum(map(int, [user, nice, system, *others])) / os.sysconf("SC_CLK_TCK")


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _libmilter() -> str:
    """The version of Sendmail that it comes with, as the package says."""
    for command in (["pkg-config", "--modversion", "milter"], ["dpkg-query", "-W", "-f=${Version}", "libmilter-dev"]):
        try:
            said = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            continue
        if said.returncode == 0 and said.stdout.strip():
            return said.stdout.strip()
    return "unknown"
