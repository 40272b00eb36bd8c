# SPDX-License-Identifier: GPL-3.0-or-later
"""The version of this library, told here and nowhere else."""

VERSION = "0.1.0"
