# SPDX-License-Identifier: GPL-3.0-or-later
"""Green threads in the place of Python's are refused; the filter would hang."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

FILTER = """
{}
from milter import Milter
app = Milter("green")
if __name__ == "__main__":
    app.run("unix:s")
"""

GEVENT = "from gevent import monkey; monkey.patch_all()"
EVENTLET = "import eventlet; eventlet.monkey_patch()"


@pytest.mark.parametrize("arguments", [["thefilter.py"], ["-m", "milter", "run", "thefilter:app", "-s", "unix:s"]])
@pytest.mark.parametrize(("name", "patch"), [("gevent", GEVENT), ("eventlet", EVENTLET)])
def test_patched_threads_are_refused(tmp_path: Path, name: str, patch: str, arguments: list[str]) -> None:
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    (tmp_path / "thefilter.py").write_text(FILTER.format(patch))
    command = [sys.executable, *arguments]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    assert f"{name} has replaced Python's threads" in ended.stderr


@pytest.mark.parametrize(
    "imported", ["sys.modules['gevent.monkey'] = patch", "sys.modules['eventlet.patcher'] = patch"]
)
@pytest.mark.parametrize("patched", [True, False])
def test_what_is_imported_and_patches_nothing_is_fine(imported: str, patched: bool) -> None:
    program = (
        "import sys, types\n"
        f"answer = lambda name: {patched}\n"
        "patch = types.SimpleNamespace(is_module_patched=answer, is_monkey_patched=answer)\n"
        f"{imported}\n"
        "from milter.green import refuse_green_threads\n"
        "refuse_green_threads()\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == int(patched)
    assert ("MilterError" in ended.stderr) is patched
