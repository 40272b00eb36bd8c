# SPDX-License-Identifier: GPL-3.0-or-later
"""The user's filter by name: ``module:app``."""

import importlib
import os
import sys
import traceback
from types import TracebackType
from typing import Any

from milter import children
from milter.app import Milter
from milter.errors import MilterError

__all__ = ["LoadError", "load"]


class LoadError(MilterError):
    """The filter cannot be loaded. If its own code raised, the cause is that exception, with that code's traceback."""


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
