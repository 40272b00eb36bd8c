# SPDX-License-Identifier: GPL-3.0-or-later
"""The part of pyspf that examples/spf_check.py uses; it has no types of its own."""

class query:
    def __init__(
        self,
        i: str,
        s: str,
        h: str,
        local: str | None = None,
        receiver: str | None = None,
        strict: bool = True,
        timeout: float = 20,
        verbose: bool = False,
        querytime: float = 0,
    ) -> None: ...
    def check(self, spf: str | None = None) -> tuple[str, int, str]: ...
    def get_header(self, res: str, receiver: str | None = None) -> str: ...
