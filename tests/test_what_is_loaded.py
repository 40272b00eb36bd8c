# SPDX-License-Identifier: GPL-3.0-or-later
"""A reload loads what is on the disk now, however it came there."""

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.filter_process import FilterProcess

FILTER = """
from milter import Milter
from helper import VERSION
app = Milter("deployed")
@app.on_start
def start():
    print("this is", VERSION, flush=True)
"""


def release(directory: Path, version: str) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "thefilter.py").write_text(FILTER)
    (directory / "helper.py").write_text(f"VERSION = {version!r}\n")
    for file in directory.glob("*.py"):
        os.utime(file, (1_700_000_000, 1_700_000_000))  # as tools do that pack and unpack
    return directory


class Deployed(FilterProcess):
    def __init__(self, directory: Path, socket: Path, **environment: str) -> None:
        arguments = ("-m", "milter", "run", "thefilter:app", "--socket", f"unix:{socket}/s")
        super().__init__(
            *arguments,
            directory=directory,
            environment={"PWD": str(directory), "PYTHONDONTWRITEBYTECODE": "", **environment},
        )

    def reload(self) -> None:
        self.signal(signal.SIGHUP)
        self.log.wait_for("was loaded again")


def swap_link(base: Path) -> None:
    (base / "next").symlink_to(release(base / "release-2", "two"))
    (base / "next").rename(base / "current")


def swap_directory(base: Path) -> None:
    release(base / "next", "two")
    (base / "current").rename(base / "old")
    (base / "next").rename(base / "current")


def delete_directory(base: Path) -> None:
    shutil.rmtree(base / "current")
    release(base / "current", "two")


def write_over(base: Path) -> None:
    release(base / "current", "two")


@pytest.mark.parametrize("deploy", [swap_link, swap_directory, delete_directory, write_over])
def test_a_reload_loads_what_was_deployed(tmp_path: Path, deploy: Any) -> None:
    if deploy is swap_link:
        (tmp_path / "current").symlink_to(release(tmp_path / "release-1", "one"))
    else:
        release(tmp_path / "current", "one")
    with Deployed(tmp_path / "current", tmp_path) as process:
        process.stdout.wait_for("this is one")
        deploy(tmp_path)
        process.reload()
        process.stdout.wait_for("this is two")
        process.stop()


def test_so_it_is_with_a_path_of_python_s(tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to(release(tmp_path / "release-1", "one"))
    with Deployed(tmp_path, tmp_path, PYTHONPATH=_with(tmp_path / "current")) as process:
        process.stdout.wait_for("this is one")
        swap_link(tmp_path)
        process.reload()
        process.stdout.wait_for("this is two")
        process.stop()


def _with(directory: Path) -> str:
    import milter
    from tests import filter_process

    return os.pathsep.join([str(directory), str(filter_process._SITE), str(Path(milter.__file__).parent.parent)])


def test_what_is_missing_in_the_new_release_is_not_taken_from_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to(release(tmp_path / "release-1", "one"))
    with Deployed(tmp_path / "current", tmp_path) as process:
        process.stdout.wait_for("this is one")
        (release(tmp_path / "release-2", "two") / "helper.py").unlink()
        swap_target = tmp_path / "next"
        swap_target.symlink_to(tmp_path / "release-2")
        swap_target.rename(tmp_path / "current")
        process.signal(signal.SIGHUP)
        process.log.wait_for("No module named 'helper'")
        process.log.wait_for("was not loaded again")
        process.stop()


def test_a_directory_that_is_gone_is_named_and_the_old_version_goes_on(tmp_path: Path) -> None:
    with Deployed(release(tmp_path / "current", "one"), tmp_path) as process:
        process.stdout.wait_for("this is one")
        (tmp_path / "current").rename(tmp_path / "old")
        process.signal(signal.SIGHUP)
        process.log.wait_for(f"the directory {tmp_path}/current, which the filter was started in, cannot be entered")
        process.log.wait_for("was not loaded again")
        process.stop()


def test_a_name_that_is_not_that_of_the_directory_is_not_believed(tmp_path: Path) -> None:
    release(tmp_path / "current", "one")
    with Deployed(tmp_path / "current", tmp_path, PWD="/") as process:
        process.stdout.wait_for("this is one")
        process.stop()
