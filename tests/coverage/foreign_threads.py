# SPDX-License-Identifier: GPL-3.0-or-later
"""A plugin of coverage.py: measure the threads of libmilter, and the workers to their end.

coverage.py traces the threads that ``threading`` starts. Those of libmilter come from C, straight into
``milter.binding``. So the two functions that they enter are registered once more, with a step before them that
begins to trace the thread.

A worker is a fork, runs the functions of ``atexit`` by itself, and ends with ``os._exit``. coverage.py would end with
the former, and saves with the latter, too. So in a fork it is taken off the former.

Used by scripts/coverage.sh only.
"""

import atexit
import os
import sys
import threading
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from coverage import Coverage, CoveragePlugin
from coverage.plugin_support import Plugins

_MODULE = "milter.binding"
_ENTRANCES = ("milter_python_enter", "milter_python_negotiate")


def coverage_init(registry: Plugins, options: object) -> None:
    """Called by coverage.py in each process, before anything of the library is imported."""
    registry.add_noop(CoveragePlugin())
    sys.meta_path.insert(0, _Finder())
    os.register_at_fork(after_in_child=_measure_to_the_end)


def _measure_to_the_end() -> None:
    measuring = Coverage.current()
    if measuring is not None:
        atexit.unregister(measuring._atexit)


class _Finder(MetaPathFinder):
    """Finds one module where it is, and sees to its entrances once it is loaded."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _MODULE:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_register(module: ModuleType) -> None:
                load(module)
                _register(module)

            spec.loader.exec_module = load_and_register  # type: ignore[method-assign]
        return spec


def _register(binding: Any) -> None:
    for name in _ENTRANCES:
        register = binding.ffi.def_extern(name=name, error=0, onerror=binding._crashed)
        register(_traced(getattr(binding, name)))


def _traced(function: Callable[..., int]) -> Callable[..., int]:
    def enter(*arguments: Any) -> int:
        if sys.gettrace() is None:
            sys.settrace(threading.gettrace())
        return function(*arguments)

    return enter
