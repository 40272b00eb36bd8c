# SPDX-License-Identifier: GPL-3.0-or-later
"""The benchmark: filters that do the same work, written with several libraries, compared in one run.

``python -m benchmarks`` in the source tree; see README.md beside this file.

The rooms: ``load/`` (C) plays the MTAs and checks the answers, ``filters/`` holds the filters.
``workshop`` builds what has to be built, ``contenders`` lists the filters, ``scenarios`` the work.
``process`` runs a filter, ``generator`` gives it work, ``measure`` goes through the rounds.
``requirements`` judges the figures, ``report`` and ``chart`` show them.
"""
