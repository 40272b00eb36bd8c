# SPDX-License-Identifier: GPL-3.0-or-later
"""Print what CHANGELOG.md says of a version: python3 scripts/release_notes.py v1.2.3

Fails where the tag, milter/_version.py and CHANGELOG.md do not agree on what is released.
"""

import re
import runpy
import sys
from pathlib import Path

PROJECT = Path(__file__).parent.parent


def version() -> str:
    """The library's version, without importing the library, which may not be built."""
    told = runpy.run_path(str(PROJECT / "milter" / "_version.py"))["VERSION"]
    assert isinstance(told, str)
    return told


def notes(tag: str, version: str, changelog: str) -> str:
    """The section of the changelog for the version that the tag names."""
    if tag != f"v{version}":
        raise SystemExit(f"The tag is {tag}, but milter/_version.py says {version}: it should be v{version}.")
    heading = rf"^## {re.escape(version)} \(\d{{4}}-\d{{2}}-\d{{2}}\)\n"
    found = re.search(heading + r"(.*?)(?=^## |\Z)", changelog, re.MULTILINE | re.DOTALL)
    if found is None or not found[1].strip():
        raise SystemExit(f'CHANGELOG.md has nothing under "## {version} (YYYY-MM-DD)": write what is new, and the day.')
    return found[1].strip() + "\n"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("Usage: python3 scripts/release_notes.py TAG")
    sys.stdout.write(notes(sys.argv[1], version(), (PROJECT / "CHANGELOG.md").read_text(encoding="utf-8")))
