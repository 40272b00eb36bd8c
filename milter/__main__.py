# SPDX-License-Identifier: GPL-3.0-or-later
"""``python -m milter``: the command ``milter``, where its script is not on the path."""

import sys

from milter.cli import main

sys.exit(main())
