# SPDX-License-Identifier: GPL-3.0-or-later
"""What is said of libmilter itself, and how its sockets are found where the system tells little."""

import os
import socket
import tempfile
from pathlib import Path

import pytest

from milter import descriptors
from milter.errors import MilterError
from milter.libmilter import Libmilter, libmilter
from milter.standins import Placeholder


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


def test_a_long_directory_for_temporary_files_is_too_long_for_a_socket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with Placeholder(socket.AF_UNIX) as placeholder:
        next(placeholder.specifications())
    assert list(long.iterdir()) == []


def test_a_socket_that_libmilter_did_not_open_is_not_found() -> None:
    with Placeholder(socket.AF_INET) as placeholder:
        next(placeholder.specifications())
        with pytest.raises(MilterError, match="listening socket was not found"):
            placeholder.find()
