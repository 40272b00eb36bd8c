# SPDX-License-Identifier: GPL-3.0-or-later
"""Imported by Python itself in the filters that tests start: shows the test what the library logs.

So a filter runs exactly as its user would run it, and yet the test can wait for "… is listening on …", which
the library logs at INFO, a level that few filters show. Nothing else changes: a record below the level that
the program has chosen goes to the test alone.
"""

import logging
import os

_DESCRIPTOR = os.environ.pop("MILTER_TEST_LOG", "")


class _Tell(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        line = f"{record.levelname} {record.getMessage()}".replace("\n", "\\n")
        os.write(int(_DESCRIPTOR), line.encode("utf-8", "backslashreplace") + b"\n")
        return record.levelno >= logging.getLogger().level


if _DESCRIPTOR:
    _logger = logging.getLogger("milter")
    _logger.setLevel(logging.INFO)
    _logger.addFilter(_Tell())
