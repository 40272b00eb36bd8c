# SPDX-License-Identifier: GPL-3.0-or-later
"""Tests of the library inside real mail systems, and the harness that runs them."""
