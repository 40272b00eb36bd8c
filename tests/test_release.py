# SPDX-License-Identifier: GPL-3.0-or-later
"""What a release consists of: its version, the changelog, the licences, and the source of the libmilter inside."""

import hashlib
import importlib.util
import os
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

PROJECT = Path(__file__).parent.parent
CHANGELOG = """# Changelog

## 1.1.0 (unreleased)

- Later.

## 1.0.0 (2026-01-31)

- Now.

## 0.1.0 (2025-12-31)

- Before.
"""


@pytest.fixture(scope="module")
def release_notes() -> ModuleType:
    path = PROJECT / "scripts" / "release_notes.py"
    specification = importlib.util.spec_from_file_location("release_notes", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_the_notes_are_the_section_of_the_version(release_notes: ModuleType) -> None:
    assert release_notes.notes("v1.0.0", "1.0.0", CHANGELOG) == "- Now.\n"
    assert release_notes.notes("v0.1.0", "0.1.0", CHANGELOG) == "- Before.\n"


def test_a_tag_of_another_version_is_refused(release_notes: ModuleType) -> None:
    with pytest.raises(SystemExit, match=r"The tag is v1\.0\.0, but .* says 1\.0\.1: it should be v1\.0\.1"):
        release_notes.notes("v1.0.0", "1.0.1", CHANGELOG)


@pytest.mark.parametrize("version", ["1.1.0", "1.0", "2.0.0"])
def test_a_version_that_the_changelog_does_not_date_is_refused(release_notes: ModuleType, version: str) -> None:
    with pytest.raises(SystemExit, match=r"CHANGELOG\.md has nothing under"):
        release_notes.notes(f"v{version}", version, CHANGELOG)


def test_the_changelog_begins_with_this_version(release_notes: ModuleType) -> None:
    headings = [line for line in (PROJECT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## ")]
    assert headings[0].split()[1] == release_notes.version()


def test_no_other_file_tells_the_version() -> None:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    assert "version" not in project
    assert "version" in project["dynamic"]


def test_the_licence_of_libmilter_goes_with_ours() -> None:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    named = {path.name for pattern in project["license-files"] for path in PROJECT.glob(pattern)}
    assert named == {"LICENSE", "libmilter.txt"}
    assert "SENDMAIL LICENSE" in (PROJECT / "licenses" / "libmilter.txt").read_text()


# ---- libmilter.sh


def build_libmilter(directory: Path, *source: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", "scripts/libmilter.sh", directory, *source],
        cwd=PROJECT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_an_archive_with_another_checksum_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tar.gz").write_bytes(b"something else")
    result = build_libmilter(tmp_path / "out", tmp_path / "a.tar.gz")
    assert result.returncode == 1
    assert "a.tar.gz is not the archive of Sendmail's release" in result.stderr


def test_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    result = build_libmilter(tmp_path / "out", tmp_path, KIND="fibre")
    assert result.returncode == 1
    assert "KIND=fibre is unknown" in result.stderr


def test_a_source_with_another_licence_is_refused(tmp_path: Path) -> None:
    (tmp_path / "LICENSE").write_text("Do what you like.\n")
    result = build_libmilter(tmp_path / "out", tmp_path)
    assert result.returncode == 1
    assert "is not licenses/libmilter.txt: read it" in result.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="the script runs sha256sum")
def test_the_archive_of_the_release_is_unpacked_and_kept(tmp_path: Path) -> None:
    """The checksum is right, and the licence is another one: so the sum was accepted, and the archive was read."""
    (tmp_path / "LICENSE").write_text("Do what you like.\n")
    archive = tmp_path / "a.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "LICENSE", "sendmail-1/LICENSE")
    scripts = tmp_path / "project" / "scripts"
    scripts.mkdir(parents=True)
    (scripts / "libmilter.sh").write_text((PROJECT / "scripts" / "libmilter.sh").read_text())
    checksum = hashlib.sha256(archive.read_bytes()).hexdigest()
    (scripts / "libmilter.release").write_text(f"SENDMAIL_VERSION=1\nSENDMAIL_SHA256={checksum}\nSENDMAIL_PLACES=\n")
    result = subprocess.run(
        ["sh", scripts / "libmilter.sh", tmp_path / "out", archive], capture_output=True, text=True, check=False
    )
    assert "is not licenses/libmilter.txt" in result.stderr
    assert (tmp_path / "out" / "share" / "sendmail.1.tar.gz").read_bytes() == archive.read_bytes()
