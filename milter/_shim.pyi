# SPDX-License-Identifier: GPL-3.0-or-later
"""The extension that build_milter.py compiles; its functions are declared in shim/cdef.h."""

from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., int])

class _FFI:
    NULL: Any
    def def_extern(self, *, error: int, onerror: Callable[..., object]) -> Callable[[F], F]: ...
    def memmove(self, dest: Any, source: Any, length: int) -> None: ...
    def new(self, declaration: str, initializer: object = ...) -> Any: ...
    def string(self, text: Any) -> bytes: ...
    def unpack(self, pointer: Any, length: int) -> Any: ...

ffi: _FFI
lib: Any
