# SPDX-License-Identifier: GPL-3.0-or-later
"""How long the machine itself lets a busy process stand still: no filter's longest wait can be shorter.

One process for each processor looks at the clock and does nothing else. What lies between two
looks, if it is long, was the kernel's or the virtual machine's.
"""

import subprocess
import sys
import time


def longest_us(seconds: float, processors: int) -> float:
    """The longest pause that one of the processes saw, in microseconds."""
    watch = [sys.executable, "-I", "-S", __file__, str(seconds)]
    watchers = [subprocess.Popen(watch, stdout=subprocess.PIPE, text=True) for _ in range(processors)]
    return max(float(watcher.communicate()[0]) for watcher in watchers)


def _watch(seconds: float) -> float:
    last = start = time.perf_counter_ns()
    longest, end = 0, start + int(seconds * 1e9)
    while last < end:
        look = time.perf_counter_ns()
        longest = max(longest, look - last)
        last = look
    return longest / 1000


if __name__ == "__main__":
    print(_watch(float(sys.argv[1])))
