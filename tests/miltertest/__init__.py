# SPDX-License-Identifier: GPL-3.0-or-later
"""Scenarios for miltertest, which plays the MTA: a Lua script each, and the filter that it talks to."""
