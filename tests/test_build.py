# SPDX-License-Identifier: GPL-3.0-or-later
"""build_milter.py: where libmilter is looked for, and what is said when something is missing."""

import os
import sysconfig
from pathlib import Path

import pytest

import build_milter


def executable(path: Path, script: str) -> str:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def told(monkeypatch: pytest.MonkeyPatch, **environment: str) -> list[str]:
    """The lines with which the build ends in this environment."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as end:
        build_milter.builder()
    return str(end.value).splitlines()


def test_a_missing_pkg_config_is_told_in_two_lines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lines = told(monkeypatch, PKG_CONFIG=str(tmp_path / "none"))
    assert len(lines) == 2
    assert "pkg-config is missing" in lines[0]
    assert_packages(lines[1])


def test_a_missing_compiler_is_told_in_two_lines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lines = told(monkeypatch, CC=f"{tmp_path}/none")
    assert len(lines) == 2
    assert f'the C compiler "{tmp_path}/none" is missing' in lines[0]
    assert_packages(lines[1])


def test_a_missing_header_is_told_in_two_lines_instead_of_pages(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler = executable(tmp_path / "cc", "echo 'x.c:2:10: fatal error: libmilter/mfapi.h: No such file' >&2; exit 1")
    lines = told(monkeypatch, CC=compiler)
    assert len(lines) == 2
    assert "libmilter/mfapi.h are missing" in lines[0]
    assert "(libmilter/mfapi.h: No such file)" in lines[0]
    assert_packages(lines[1])


def assert_packages(line: str) -> None:
    for system in ("Debian", "Fedora", "Alpine", "FreeBSD"):
        assert system in line


def pkg_config_file(directory: Path, flag: str) -> None:
    directory.mkdir()
    (directory / "milter.pc").write_text(f"Name: milter\nDescription: x\nVersion: 1\nLibs: -lmilter\nCflags: {flag}\n")


def test_pkg_config_path_names_another_libmilter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pkg_config_file(tmp_path / "elsewhere", "-I/opt/elsewhere/include/libmilter")
    monkeypatch.setenv("PKG_CONFIG_PATH", str(tmp_path / "elsewhere"))
    flags = build_milter.libmilter_flags()
    assert flags[0] == "-I/opt/elsewhere/include/libmilter"
    assert flags[-1] == "-I/opt/elsewhere/include", "mfapi.h itself includes libmilter/mfdef.h"


def test_a_system_without_a_file_for_pkg_config_gets_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PKG_CONFIG_LIBDIR", str(tmp_path))
    monkeypatch.delenv("PKG_CONFIG_PATH", raising=False)
    assert build_milter.pkg_config(None) is None
    assert "-lmilter" in build_milter.libmilter_flags()


def test_the_callers_pkg_config_path_is_kept_beside_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pkg_config = executable(tmp_path / "pkg-config", f'echo "$PKG_CONFIG_PATH" >> {tmp_path}/asked; exit 1')
    monkeypatch.setenv("PKG_CONFIG", pkg_config)
    monkeypatch.setenv("PKG_CONFIG_PATH", "/opt/a")
    with pytest.raises(SystemExit, match="libmilter-dev"):
        build_milter.libmilter_flags()
    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked == ["/opt/a", os.pathsep.join([str(build_milter.HERE), "/opt/a"])]


def test_the_extension_serves_all_later_pythons_where_there_is_a_gil() -> None:
    from milter import _shim

    free_threaded = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
    assert (".abi3." in str(_shim.__file__)) is not free_threaded
