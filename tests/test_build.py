# SPDX-License-Identifier: GPL-3.0-or-later
"""build_milter.py: where libmilter is looked for, how it is linked, and what is said when something is missing."""

import os
import re
import subprocess
import sys
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


def test_options_for_the_linker_reach_it_and_not_the_compiler() -> None:
    flags = ["-I/opt/a", "-L/opt/b", "-Wl,-rpath,/opt/b", "-DX", "-lmilter"]
    assert build_milter.linker_options(flags) == ["-Wl,-rpath,/opt/b"]
    assert build_milter.other(flags) == ["-DX"]


# ---- The static library


def make_archive(directory: Path, source: str, *options: str) -> None:
    """A libmilter.a that pkg-config finds."""
    pkg_config_file(directory, "-I/usr/include")
    pc = directory / "milter.pc"
    pc.write_text(pc.read_text().replace("Libs:", f"Libs: -L{directory}"))
    (directory / "a.c").write_text(source)
    subprocess.run(["cc", "-w", *options, "-c", "a.c"], cwd=directory, check=True)
    subprocess.run(["ar", "rc", "libmilter.a", "a.o"], cwd=directory, check=True)


def calls(*names: str) -> str:
    """A libmilter that calls these functions, and knows where it is."""
    lines = [f"void {name}(void);" for name in names]
    lines += ["int data;", "int *where(void) { return &data; }"]
    lines += ["int smfi_stop(void) {", *(f"{name}();" for name in names), "return data; }"]
    return "\n".join(lines)


USUAL = ("accept", "close", "mi_rd_cmd", "mi_wr_cmd", "poll")


def unsuitable(monkeypatch: pytest.MonkeyPatch, directory: Path) -> str:
    """Why the archive there is not linked."""
    monkeypatch.setenv("PKG_CONFIG_PATH", str(directory))
    with pytest.raises(build_milter.Unsuitable) as why:
        build_milter.suitable_archive(build_milter.libmilter_flags())
    return str(why.value)


def test_an_archive_with_the_usual_calls_is_linked_and_all_wrappers_stand_by(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    make_archive(tmp_path / "a", calls(*USUAL, "__poll_chk"), "-fPIC")
    monkeypatch.setenv("PKG_CONFIG_PATH", str(tmp_path / "a"))
    archive = build_milter.suitable_archive(build_milter.libmilter_flags())
    assert archive.path == tmp_path / "a" / "libmilter.a"
    assert set(archive.symbols) == {*build_milter.WRAPPERS, "__poll_chk"}


@pytest.mark.parametrize("call", ["select", "recv", "epoll_wait"])
def test_an_archive_with_calls_that_are_not_served_is_not_linked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, call: str
) -> None:
    make_archive(tmp_path / "a", calls(*USUAL, call), "-fPIC")
    assert unsuitable(monkeypatch, tmp_path / "a") == f"{tmp_path}/a/libmilter.a calls {call}"


@pytest.mark.parametrize("call", USUAL)
def test_an_archive_without_one_of_the_usual_calls_is_not_linked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, call: str
) -> None:
    make_archive(tmp_path / "a", calls(*(name for name in USUAL if name != call)), "-fPIC")
    assert unsuitable(monkeypatch, tmp_path / "a") == f"{tmp_path}/a/libmilter.a does not call {call}"


def test_an_archive_whose_code_cannot_be_moved_is_not_linked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    make_archive(tmp_path / "a", calls(*USUAL), "-fno-pic", "-fno-pie")
    assert "failed" in unsuitable(monkeypatch, tmp_path / "a")


def test_a_linker_that_redirects_nothing_is_found_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    make_archive(tmp_path / "a", calls(*USUAL), "-fPIC")
    monkeypatch.setenv("CC", without_wrap(tmp_path, "accept"))
    assert unsuitable(monkeypatch, tmp_path / "a") == "the linker did not redirect accept"


def without_wrap(directory: Path, name: str, only_for: str = "") -> str:
    """A compiler that forgets to redirect a call, when its command line contains `only_for`."""
    script = f"""
case "$*" in *"{only_for}"*) ;; *) exec cc "$@" ;; esac
for argument; do
    shift
    if [ "$argument" != "-Wl,--wrap={name}" ]; then set -- "$@" "$argument"; fi
done
exec cc "$@"
"""
    return executable(directory / "cc", script)


def test_a_missing_archive_is_told_and_the_shared_library_is_linked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = 'case "$*" in *-print-file-name*) echo libmilter.a ;; *) exec cc "$@" ;; esac'
    monkeypatch.setenv("CC", executable(tmp_path / "cc", script))
    monkeypatch.delenv("MILTER_LINK", raising=False)
    pkg_config_file(tmp_path / "pc", "-I/usr/include")
    monkeypatch.setenv("PKG_CONFIG_PATH", str(tmp_path / "pc"))
    assert build_milter.chosen_archive(build_milter.libmilter_flags()) is None
    said = capsys.readouterr().err
    assert said == build_milter.SHARED_INSTEAD.format(reason="there is no libmilter.a") + "\n"
    lines = told(monkeypatch, MILTER_LINK="static")
    assert len(lines) == 2
    assert "there is no libmilter.a" in lines[0]
    assert "libmilter-dev" in lines[1]


def test_the_shared_library_is_linked_where_that_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILTER_LINK", "shared")
    assert build_milter.chosen_archive(build_milter.libmilter_flags()) is None


def test_a_wrong_way_of_linking_is_told_in_two_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = told(monkeypatch, MILTER_LINK="statically")
    assert len(lines) == 2
    assert 'MILTER_LINK=statically is neither "static" nor "shared"' in lines[0]


def test_an_extension_that_was_linked_without_a_redirection_is_refused(tmp_path: Path) -> None:
    try:
        build_milter.suitable_archive(build_milter.libmilter_flags())
    except build_milter.Unsuitable as reason:
        pytest.skip(f"libmilter's system calls are not redirected here: {reason}")
    compiler = without_wrap(tmp_path, "syslog", only_for="_shim.")
    result = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", f"--build-lib={tmp_path}", f"--build-temp={tmp_path}/t"],
        cwd=build_milter.HERE,
        env={**os.environ, "CC": compiler, "LDSHARED": f"{compiler} -shared", "MILTER_LINK": "static"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert len(result.stderr.strip().splitlines()) == 2
    assert "did not redirect all of its system calls" in result.stderr


def test_another_way_of_linking_compiles_anew(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "build_ext", f"--build-lib={tmp_path}", f"--build-temp={tmp_path}/t"]
    links = []
    for link in ("shared", "static", "shared"):
        environment = {**os.environ, "MILTER_LINK": link}
        if subprocess.run(command, cwd=build_milter.HERE, env=environment, check=False).returncode != 0:
            pytest.skip(f"{link} is not possible here")
        (extension,) = (tmp_path / "milter").glob("_shim*.so")
        links.append(b"__wrap_poll" in extension.read_bytes())
    assert links == [False, True, False]


def test_the_extension_serves_all_later_pythons_where_there_is_a_gil() -> None:
    from milter import _shim

    free_threaded = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
    # "_shim.abi3.so"; since Python 3.15 it tells the machine, too: "_shim.abi3-x86_64-linux-gnu.so".
    tags = re.split("[.-]", Path(str(_shim.__file__)).name)
    assert ("abi3" in tags) is not free_threaded
