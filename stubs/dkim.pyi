# SPDX-License-Identifier: GPL-3.0-or-later
"""The part of dkimpy that docs/howto/sign.md and its test use; it has no types of its own."""

from collections.abc import Callable

def sign(
    message: bytes, selector: bytes, domain: bytes, privkey: bytes, *, include_headers: list[bytes] | None = None
) -> bytes: ...
def verify(message: bytes, *, dnsfunc: Callable[..., bytes] = ...) -> bool: ...
