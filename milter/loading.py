# SPDX-License-Identifier: GPL-3.0-or-later
"""The user's filter by name: ``module:app``.

A reload must load what is on the disk then. So each worker looks anew:

- The directory is gone to by the name that it had at the start: ``releases/current`` may be another one now. The
  kernel would stay in the old one, also when that was renamed or deleted. A shell tells the name in ``PWD``.
- What Python has put into ``sys.path`` for the old directory is taken out.
- Modules below it, and below those of ``PYTHONPATH``, are compiled from their source. A compiled file counts as fresh
  when time and size of the source are the same, and tools that deploy may give all files one time.
"""

import importlib
import importlib.machinery
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib.abc import PathEntryFinder
from types import TracebackType
from typing import Any

from milter import children
from milter.app import Milter
from milter.errors import MilterError
from milter.green import refuse_green_threads

__all__ = ["LoadError", "Place", "load"]


class LoadError(MilterError):
    """The filter cannot be loaded. If its own code raised, the cause is that exception, with that code's traceback."""


class Place:
    """The directory that the program was started in, by its name."""

    def __init__(self) -> None:
        try:
            self._real = os.getcwd()
        except OSError as failure:
            raise LoadError(f"the working directory is gone: {failure.strerror}; start the filter in another") from None
        named = os.environ.get("PWD", "")
        self.path = named if os.path.isabs(named) and _is_same(named, self._real) else self._real

    def enter(self) -> None:
        """Go where the name leads now, and look at all files anew. In a new process, before it imports the filter."""
        try:
            os.chdir(self.path)
        except PermissionError:  # root's directory, and another user now: where the process is it may stay
            pass
        except OSError as failure:
            raise LoadError(
                f"the directory {self.path}, which the filter was started in, cannot be entered: {failure.strerror}"
            ) from None
        now = os.getcwd()
        sys.path[:] = [_moved(entry, self._real, now) for entry in sys.path]
        given = map(os.path.abspath, filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)))
        sys.path_hooks.insert(0, _sources_below((now, *given)))
        sys.path_importer_cache.clear()


def _is_same(one: str, other: str) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False


def _moved(entry: str, old: str, new: str) -> str:
    """A directory of ``sys.path``, where it is now. The interpreter's own packages stay with the interpreter."""
    inside = entry == old or entry.startswith(f"{old}{os.sep}")
    return new + entry.removeprefix(old) if inside and not _is_installed(entry) else entry


def _is_installed(path: str) -> bool:
    return path.startswith(f"{sys.prefix}{os.sep}") or not _PACKAGES.isdisjoint(path.split(os.sep))


_PACKAGES = frozenset(("site-packages", "dist-packages"))


class _Source(importlib.machinery.SourceFileLoader):
    """Neither reads nor writes compiled files: without a source's time, Python finds none."""

    def path_stats(self, path: Any) -> Any:
        raise OSError("not asked for")


def _sources_below(directories: Sequence[str]) -> Callable[[str], PathEntryFinder]:
    """A hook for ``sys.path_hooks``."""
    machinery = importlib.machinery
    make = machinery.FileFinder.path_hook(
        (machinery.ExtensionFileLoader, machinery.EXTENSION_SUFFIXES),
        (_Source, machinery.SOURCE_SUFFIXES),
        (machinery.SourcelessFileLoader, machinery.BYTECODE_SUFFIXES),
    )

    def hook(path: str) -> PathEntryFinder:
        if _is_installed(path) or not any(os.path.join(path, "").startswith(os.path.join(d, "")) for d in directories):
            raise ImportError("another hook's", path=path)
        return make(path)

    return hook


def load(specification: str) -> Milter[Any, Any]:
    """The :class:`Milter` that ``module:attribute`` names; ``module`` alone means its ``app``.

    Modules are looked for in the working directory first, as with ``python -m``.
    """
    name, colon, path = specification.partition(":")
    if not name or (colon and not path):
        raise LoadError(f"{specification!r} names no filter: write module:app, as in myfilter:app")
    if name.endswith(".py") or "/" in name:
        raise LoadError(
            f"{name!r} is a file, and a module is wanted: write its name without .py, as in myfilter:app; the working "
            "directory is searched first"
        )
    if sys.path[:1] != [os.getcwd()]:
        sys.path.insert(0, os.getcwd())
    module = _imported(name)
    path = path or "app"
    found: Any = module
    for part in path.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            raise LoadError(
                f"the module {name!r} has no {path!r}{_hint(module)}; write {name}:NAME, with the name of your Milter"
            ) from None
    if not isinstance(found, Milter):
        raise LoadError(f"{name}:{path} is {_article(type(found).__name__)}, not a Milter{_hint(module)}")
    return found


def _imported(name: str) -> Any:
    try:
        return children.call(importlib.import_module, name)
    except ModuleNotFoundError as failure:
        if failure.name is not None and (failure.name == name or name.startswith(f"{failure.name}.")):
            raise LoadError(
                f"there is no module {failure.name!r}: it was looked for in {os.getcwd()} and in the places of "
                f"{sys.executable}"
            ) from None
        raise _load_error(name, failure) from failure.with_traceback(_users_part(failure.__traceback__))
    except (KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as failure:  # SystemExit as well: a module that ends the process at its import
        refuse_green_threads()  # which may be why
        raise _load_error(name, failure) from failure.with_traceback(_users_part(failure.__traceback__))


def _load_error(name: str, failure: BaseException) -> LoadError:
    reason = traceback.format_exception_only(failure)[-1].strip()
    return LoadError(f"the module {name!r} cannot be imported: {reason}")


def _users_part(frames: TracebackType | None) -> TracebackType | None:
    """Without the machinery of import at its beginning."""
    while frames is not None and _is_machinery(frames.tb_frame.f_code.co_filename):
        frames = frames.tb_next
    return frames


def _is_machinery(file: str) -> bool:
    return file in (__file__, children.__file__) or "importlib" in file


def _hint(module: Any) -> str:
    names = [name for name, value in vars(module).items() if isinstance(value, Milter)]
    return f"; there {'is' if len(names) == 1 else 'are'} {', '.join(names)}" if names else ""


def _article(name: str) -> str:
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"
