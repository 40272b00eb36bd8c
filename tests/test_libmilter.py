# SPDX-License-Identifier: GPL-3.0-or-later
"""What is said of libmilter itself, and how its sockets are found where the system tells little."""

import os
import socket

import pytest

from milter import descriptors
from milter.libmilter import Libmilter, libmilter


@pytest.mark.parametrize(
    ("redirected", "link", "where"),
    [
        (("accept", "close"), "static, I/O wrapped: accept close", "the logger milter.libmilter"),
        ((), "shared", "the system's log (facility mail)"),
    ],
)
def test_the_way_of_linking_decides_where_libmilter_logs(
    monkeypatch: pytest.MonkeyPatch, redirected: tuple[str, ...], link: str, where: str
) -> None:
    monkeypatch.setattr(Libmilter, "redirected", redirected)
    assert (libmilter.link, libmilter.where_it_logs) == (link, where)


def test_descriptors_are_found_without_proc_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: str) -> list[str]:
        raise FileNotFoundError(path)

    with socket.socket() as known:
        monkeypatch.setattr(os, "listdir", refused)
        assert known.fileno() in [descriptor for descriptor, _ in descriptors.sockets()]
