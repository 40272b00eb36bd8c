# SPDX-License-Identifier: GPL-3.0-or-later
"""Fuzzing: conversations that no MTA would have, with a filter that does what the mail itself orders.

- ``filters/ordered.py``: the filter. Text such as ``=rcpt.reject=`` in what a stage is told orders its verdict.
- ``model``: what libmilter, the library and that filter must answer to any packets, so any bytes can be sent.
- ``link``: sends bytes in pieces, and compares the answers with the model.
- ``mutation``: recorded conversations, and random changes of them; from a seed, again and again the same.
- ``test_conversations``: Hypothesis makes the conversations.
- ``test_packets``: mutation makes them; also the program of ``scripts/fuzz.sh``.
- ``sanitized``: the library built with AddressSanitizer and UndefinedBehaviorSanitizer.
- ``test_libmilter``: what libmilter itself does wrong, shown on a filter in C.
"""
