# SPDX-License-Identifier: GPL-3.0-or-later
"""What ``milter run`` and ``run()`` refuse before they begin, and the users they can become."""

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from milter import Milter, MilterError
from milter.cli import main
from milter.privileges import Identity, identity


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (["--workers", "0"], "no number from 1 on"),
        (["--backlog", "x"], "no number from 1 on"),
        (["--grace", "x"], "no number of seconds"),
        (["--grace", "-1"], "no number of seconds"),
        (["--grace", "inf"], "no number of seconds"),
        (["--mode", "rw"], "three octal digits"),
        (["--mode", "1777"], "three octal digits"),
    ],
)
def test_a_wrong_option_is_explained(capsys: pytest.CaptureFixture[str], wrong: list[str], reason: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["run", "nowhere:app", *wrong])
    assert caught.value.code == 2
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--user", "nobody-of-this-name"], "there is no user 'nobody-of-this-name'"),
        (["--user", "root", "--group", "no-such-group"], "there is no group 'no-such-group'"),
    ],
)
def test_a_user_or_group_that_is_not_there_is_told(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, options: list[str], reason: str
) -> None:
    assert main(["run", "nowhere:app", "--socket", f"unix:{tmp_path}/s", *options]) == 1
    assert capsys.readouterr().err.startswith(f"milter run: {reason}")


def test_a_group_is_found_by_its_name_and_by_its_number() -> None:
    by_number = identity("root", 1)
    assert by_number == Identity("root", 0, 1, by_number.home)
    assert identity(0, "root").group == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody who is not root")
def test_only_root_becomes_another_user() -> None:
    program = (
        "import os\n"
        "from milter.privileges import identity\n"
        "os.setresuid(65534, 65534, 65534)\n"
        "identity('root', None).take_on()\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "cannot become the user root: Operation not permitted; only root may" in ended.stderr


def test_run_belongs_into_the_main_thread(tmp_path: Path) -> None:
    failures: list[str] = []

    def run() -> None:
        try:
            Milter("elsewhere").run(f"unix:{tmp_path}/s")
        except MilterError as failure:
            failures.append(str(failure))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert failures == ["run() belongs into the main thread, which gets the signals; use start() elsewhere"]


def test_workers_are_not_forked_beside_other_threads(tmp_path: Path) -> None:
    reader, writer = socket.socketpair()
    thread = threading.Thread(target=reader.recv, args=(1,))
    thread.start()
    try:
        with pytest.raises(MilterError, match="other threads do not survive that"):
            Milter("forking").run(f"unix:{tmp_path}/s", workers=2)
    finally:
        writer.close()
        thread.join()
        reader.close()


def test_workers_that_cannot_start_end_run_with_an_exit_code(tmp_path: Path) -> None:
    program = (
        "from milter import Milter\n"
        "app = Milter('broken')\n"
        "@app.on_start\n"
        "def fail() -> None:\n"
        "    raise RuntimeError('no database')\n"
        f"app.run('unix:{tmp_path}/s', workers=2)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert ended.returncode == 1
    assert "no database" in ended.stderr
