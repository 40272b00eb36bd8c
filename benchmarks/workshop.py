# SPDX-License-Identifier: GPL-3.0-or-later
"""Builds what the benchmark runs, in a directory that keeps it for the next time."""

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

HERE = Path(__file__).resolve().parent
TREE = HERE.parent
CFLAGS = ["-std=c11", "-O2", "-Wall", "-Wextra"]


class Unavailable(Exception):
    """Something cannot be built or had here; the text tells why, in a line."""


class Workshop:
    """The directory, and what is made in it. Nothing is made twice as long as its sources stay the same."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory.resolve()
        self.directory.mkdir(parents=True, exist_ok=True)

    def load(self) -> Path:
        """The load generator."""
        sources = sorted((HERE / "load").glob("*.[ch]"))
        return self._c_program("load", sources, [])

    def c_filter(self) -> Path:
        """The filter in C, linked with the shared libmilter."""
        return self._c_program("c_filter", [HERE / "filters" / "c_filter.c"], libmilter_flags())

    def milter(self, link: str) -> Path:
        """A directory to import this library from, built from the source tree; `link`: ``static`` or ``shared``."""
        sources = [TREE / "setup.py", TREE / "build_milter.py", *_files(TREE / "milter")]

        def make(place: Path) -> None:
            command = [sys.executable, "setup.py", "-q", "build", "--build-base", str(place / "build")]
            _run([*command, "--build-lib", str(place)], {"MILTER_LINK": link}, TREE)
            shutil.rmtree(place / "build")
            _compile_python(place)

        return self._once(f"milter-{link}", sources, make, sys.version)

    def filters(self) -> Path:
        """A directory to import the benchmark's filters from."""
        sources = sorted((HERE / "filters").glob("*.py"))

        def make(place: Path) -> None:
            for source in sources:
                shutil.copy(source, place)
            _compile_python(place)

        return self._once("filters", sources, make, sys.version)

    def environment(self, requirement: str) -> Path:
        """The interpreter of a virtual environment that has a package of another author."""

        def make(place: Path) -> None:
            _run([sys.executable, "-m", "venv", str(place)])
            _run([str(place / "bin" / "python"), "-m", "pip", "install", "-q", requirement])

        return self._once(f"venv-{requirement}", [], make, sys.version) / "bin" / "python"

    def rust_filter(self) -> Path:
        """The filter in Rust: the program that INDYMILTER_FILTER names, or what cargo makes of the source here."""
        built = os.environ.get("INDYMILTER_FILTER")
        if built:
            return Path(built)
        source = HERE / "filters" / "indymilter"

        def make(place: Path) -> None:
            manifest = str(shutil.copytree(source, place / "source") / "Cargo.toml")
            _run(
                [
                    "cargo",
                    "build",
                    "-q",
                    "--release",
                    "--manifest-path",
                    manifest,
                    "--target-dir",
                    str(place / "target"),
                ]
            )

        name = "indymilter_filter"
        return self._once("rust-indymilter", _files(source), make) / "target" / "release" / name

    def _c_program(self, name: str, sources: list[Path], flags: list[str]) -> Path:
        compiler = shlex.split(os.environ.get("CC", "cc"))

        def make(place: Path) -> None:
            inputs = [str(path) for path in sources if path.suffix == ".c"]
            _run([*compiler, *CFLAGS, *inputs, "-o", str(place / name), *flags, "-pthread"])

        return self._once(f"c-{name}", sources, make, *compiler, *flags) / name

    def _once(self, name: str, sources: Iterable[Path], make: Callable[[Path], None], *circumstances: str) -> Path:
        """The directory `name`, filled by `make` unless it was, from the same sources under the same circumstances."""
        place = self.directory / name
        stamp, mark = place / ".made-from", _fingerprint(sources, circumstances)
        if stamp.exists() and stamp.read_text() == mark:
            return place
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        make(place)
        stamp.write_text(mark)
        return place


def libmilter_flags() -> list[str]:
    """As pkg-config knows them, or the linker by itself."""
    found = subprocess.run(["pkg-config", "--cflags", "--libs", "milter"], capture_output=True, text=True, check=False)
    return shlex.split(found.stdout) if found.returncode == 0 else ["-lmilter"]


def _compile_python(place: Path) -> None:
    """As pip does it. Without the GIL it counts: constants of a module that is compiled in memory are slower."""
    _run([sys.executable, "-m", "compileall", "-q", str(place)])


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file() and path.suffix not in (".pyc", ".so", ".o"))


def _fingerprint(sources: Iterable[Path], circumstances: Iterable[str]) -> str:
    digest = hashlib.sha256(repr(list(circumstances)).encode())
    for path in sources:
        digest.update(f"{path}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def _run(command: list[str], variables: Mapping[str, str] | None = None, directory: Path | None = None) -> None:
    environment = {**os.environ, **(variables or {})}
    try:
        done = subprocess.run(command, env=environment, cwd=directory, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise Unavailable(f"{command[0]} is missing") from None
    if done.returncode != 0:
        lines = (done.stderr.strip() or done.stdout.strip() or "no reason given").splitlines()
        telling = next((line for line in lines if "error" in line.lower()), lines[-1])
        raise Unavailable(f"{Path(command[0]).name} failed: {telling.strip()}")
