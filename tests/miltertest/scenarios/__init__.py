# SPDX-License-Identifier: GPL-3.0-or-later
"""The scenarios: NAME.lua is the MTA, NAME.py the filter, NAME.out what it prints, NAME.log what it logs."""
