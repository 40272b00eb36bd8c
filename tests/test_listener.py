# SPDX-License-Identifier: GPL-3.0-or-later
"""Sockets by name: each mistake is an exception that says what, where and what to do."""

import errno
import logging
import os
import re
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from milter import SocketError
from milter.listener import InetEndpoint, Listener, PassedEndpoint, UnixEndpoint, connect, open_listener, parse


def listen(specification: str | None, **options: object) -> Listener:
    return open_listener(specification, **{"backlog": 5, "remove_socket": True, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "endpoint"),
    [
        ("inet:3000@localhost", InetEndpoint("inet", 3000, "localhost")),
        ("inet:3000@127.0.0.1", InetEndpoint("inet", 3000, "127.0.0.1")),
        ("inet:3000@[127.0.0.1]", InetEndpoint("inet", 3000, "127.0.0.1")),
        ("INET:3000@localhost", InetEndpoint("inet", 3000, "localhost")),
        ("inet:3000", InetEndpoint("inet", 3000, None)),
        ("inet:smtp@localhost", InetEndpoint("inet", 25, "localhost")),
        ("inet6:3000@::1", InetEndpoint("inet6", 3000, "::1")),
        ("inet6:3000@[::1]", InetEndpoint("inet6", 3000, "::1")),
        ("inet:localhost:3000", InetEndpoint("inet", 3000, "localhost")),
        ("inet:127.0.0.1:3000", InetEndpoint("inet", 3000, "127.0.0.1")),
        ("inet6:[::1]:3000", InetEndpoint("inet6", 3000, "::1")),
        ("unix:/run/f.sock", UnixEndpoint("/run/f.sock")),
        ("local:/run/f.sock", UnixEndpoint("/run/f.sock")),
        ("unix:relative", UnixEndpoint("relative")),
        ("/run/f.sock", UnixEndpoint("/run/f.sock")),
        ("/run/with:colon", UnixEndpoint("/run/with:colon")),
        ("f.sock", UnixEndpoint("f.sock")),
        ("fd:3", PassedEndpoint(3)),
    ],
)
def test_each_form_of_a_specification(text: str, endpoint: object) -> None:
    assert parse(text) == endpoint


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "names no path"),
        ("unix:", "names no path"),
        ("unix:/a\0b", "NUL"),
        ("unix:/" + "x" * 200, "201 bytes"),
        ("tcp:3000@localhost", "'tcp' is unknown"),
        ("http://localhost", "'http' is unknown"),
        ("inet:", "no port"),
        ("inet:@localhost", "no port"),
        ("inet:3000@", "names no host"),
        ("inet:65536@localhost", "0 to 65535"),
        ("inet:-1@localhost", "no port"),
        ("inet:nosuchservice@localhost", "'nosuchservice' is no port"),
        ("inet:30 00@localhost", "no port"),
        ("inet:３@localhost", "no port"),
        ("inet:localhost", "no port"),
        ("fd:", "write fd:number"),
        ("fd:-1", "write fd:number"),
        ("fd:x", "write fd:number"),
    ],
)
def test_a_bad_specification_is_explained(text: str, reason: str) -> None:
    with pytest.raises(SocketError, match=reason):
        parse(text)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "filter.sock"


# ---- Unix sockets


def test_a_unix_socket_is_there_while_it_is_listened_at_and_gone_afterwards(path: Path) -> None:
    listener = listen(f"unix:{path}")
    assert str(listener) == f"unix:{path}"
    connect(f"unix:{path}", 5).close()
    listener.close()
    assert not path.exists()


def test_the_mode_is_right_from_the_first_moment(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[int] = []
    original = socket.socket.listen

    def spy(self: socket.socket, backlog: int) -> None:
        modes.append(stat.S_IMODE(path.stat().st_mode))
        original(self, backlog)

    monkeypatch.setattr(socket.socket, "listen", spy)
    listen(f"unix:{path}", mode=0o660, group=os.getgid()).close()
    assert modes == [0o660]


def test_an_unknown_group_is_an_error_and_leaves_nothing_behind(path: Path) -> None:
    with pytest.raises(SocketError, match="no group 'nosuchgroup'"):
        listen(f"unix:{path}", group="nosuchgroup")
    assert not path.exists()


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(SocketError, match=f"directory {tmp_path}/missing does not exist"):
        listen(f"unix:{tmp_path}/missing/filter.sock")


def test_a_plain_file_at_the_path_is_left_alone(path: Path) -> None:
    path.write_text("precious")
    with pytest.raises(SocketError, match="is not a socket"):
        listen(f"unix:{path}")
    assert path.read_text() == "precious"


def test_a_directory_at_the_path_is_left_alone(path: Path) -> None:
    path.mkdir()
    with pytest.raises(SocketError, match="is not a socket"):
        listen(f"unix:{path}")


def test_a_socket_at_which_somebody_listens_is_left_alone(path: Path) -> None:
    first = listen(f"unix:{path}")
    with pytest.raises(SocketError, match="another process is listening"):
        listen(f"unix:{path}")
    connect(f"unix:{path}", 5).close()
    first.close()


def test_a_socket_whose_queue_is_full_is_left_alone_too(path: Path) -> None:
    first = listen(f"unix:{path}", backlog=1)
    callers = []
    for _ in range(5):
        caller = socket.socket(socket.AF_UNIX)
        caller.setblocking(False)
        caller.connect_ex(str(path))
        callers.append(caller)
    with pytest.raises(SocketError, match="another process is listening"):
        listen(f"unix:{path}")
    for caller in callers:
        caller.close()
    first.close()


def leave_behind(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))


def test_a_socket_left_behind_is_removed_if_that_is_allowed(path: Path) -> None:
    leave_behind(path)
    with pytest.raises(SocketError, match="left behind"):
        listen(f"unix:{path}", remove_socket=False)
    listener = listen(f"unix:{path}")
    connect(f"unix:{path}", 5).close()
    listener.close()


def test_a_socket_that_another_filter_has_put_there_since_is_not_removed(path: Path) -> None:
    first = listen(f"unix:{path}")
    path.unlink()
    second = listen(f"unix:{path}")
    first.close()
    connect(f"unix:{path}", 5).close()
    second.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="changes the user for a moment")
def test_no_permission_is_told_with_the_directory(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    os.seteuid(65534)
    try:
        with pytest.raises(SocketError, match=r"Permission denied; the user that runs the filter needs write"):
            listen(f"unix:{tmp_path}/filter.sock")
    finally:
        os.seteuid(0)


# ---- TCP


@pytest.fixture
def busy_port() -> Iterator[int]:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        yield busy.getsockname()[1]


def test_a_port_in_use_is_told(busy_port: int) -> None:
    with pytest.raises(SocketError, match=rf"inet:{busy_port}@127\.0\.0\.1: the port is in use"):
        listen(f"inet:{busy_port}@127.0.0.1")


def test_an_unknown_host_is_told() -> None:
    with pytest.raises(SocketError, match=r"'host\.invalid' has no IPv4 address"):
        listen("inet:0@host.invalid")


def test_an_address_of_the_other_family_is_told() -> None:
    with pytest.raises(SocketError, match="has no IPv6 address"):
        listen("inet6:0@127.0.0.1")


def test_an_address_of_another_machine_is_told() -> None:
    with pytest.raises(SocketError, match="no such address"):
        listen("inet:0@192.0.2.1")


def test_a_listener_on_tcp_tells_its_port_and_sends_small_packets_at_once() -> None:
    listener = listen("inet:0@127.0.0.1")
    port = listener.socket.getsockname()[1]
    assert str(listener) == f"inet:{port}@127.0.0.1"
    caller = connect(str(listener), 5)
    accepted, _ = listener.socket.accept()
    assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY), "inherited from the listening socket"
    assert not listener.socket.getblocking()
    accepted.close()
    caller.close()
    listener.close()
    with pytest.raises(SocketError, match="is the filter running"):
        connect(f"inet:{port}@127.0.0.1", 5)


def test_listening_for_strangers_is_warned_of_and_for_this_machine_is_not(caplog: pytest.LogCaptureFixture) -> None:
    listen("inet:0@127.0.0.1").close()
    assert caplog.records == []
    listener = listen("inet:0")
    listener.close()
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "no authentication" in caplog.text


# ---- Sockets that were passed


@pytest.mark.parametrize("listening", [True, False])
def test_a_passed_socket_is_listened_at_and_left_open_for_its_other_owners(listening: bool) -> None:
    with socket.socket() as passed:
        passed.bind(("127.0.0.1", 0))
        if listening:
            passed.listen()
        listener = listen(f"fd:{passed.fileno()}")
        assert listener.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        listener.close()
        caller = connect(f"inet:{passed.getsockname()[1]}@127.0.0.1", 5)
        passed.accept()[0].close()
        caller.close()


def test_a_descriptor_that_is_no_listening_socket_is_refused(tmp_path: Path) -> None:
    descriptors = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else None
    with (tmp_path / "file").open("w") as file, pytest.raises(SocketError, match="not an open socket"):
        listen(f"fd:{file.fileno()}")
    with socket.socket(type=socket.SOCK_DGRAM) as datagrams, pytest.raises(SocketError, match="not a stream socket"):
        listen(f"fd:{datagrams.fileno()}")
    with pytest.raises(SocketError, match="not an open socket"):
        listen("fd:987")
    if descriptors is not None:
        assert len(os.listdir("/proc/self/fd")) == descriptors


def test_without_a_specification_systemd_must_have_passed_one_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LISTEN_PID", raising=False)
    with pytest.raises(SocketError, match="say where to listen"):
        listen(None)
    monkeypatch.setenv("LISTEN_PID", str(os.getpid() + 1))
    with pytest.raises(SocketError, match="say where to listen"):
        listen(None)
    monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
    monkeypatch.setenv("LISTEN_FDS", "2")
    with pytest.raises(SocketError, match="passed 2 sockets"):
        listen(None)


# ---- Connecting


def test_connecting_to_nobody_is_told(path: Path) -> None:
    with pytest.raises(SocketError, match=r"cannot connect to unix:.*is the filter running"):
        connect(f"unix:{path}", 5)
    with pytest.raises(SocketError, match="not connected to"):
        connect("fd:3", 5)


# ---- What the system refuses


def refused(number: int) -> Callable[..., Any]:
    """A system call that fails, which root, who may do everything, cannot bring about otherwise."""

    def call(*arguments: Any, **options: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return call


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.EACCES, "Permission denied; the user that runs the filter needs write permission in"),
        (errno.EADDRINUSE, "another process was faster"),
        (errno.ENOMEM, "Cannot allocate memory"),
    ],
)
def test_a_unix_socket_that_cannot_be_bound_is_explained(
    path: Path, monkeypatch: pytest.MonkeyPatch, number: int, reason: str
) -> None:
    monkeypatch.setattr(socket.socket, "bind", refused(number), raising=False)
    with pytest.raises(SocketError, match=re.escape(f"cannot listen at {path}: {reason}")):
        listen(f"unix:{path}")


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.EACCES, "Permission denied; ports below 1024 need privileges"),
        (errno.EADDRNOTAVAIL, "this machine has no such address"),
        (errno.ENOMEM, "Cannot allocate memory"),
    ],
)
def test_an_inet_socket_that_cannot_be_bound_is_explained(
    monkeypatch: pytest.MonkeyPatch, number: int, reason: str
) -> None:
    monkeypatch.setattr(socket.socket, "bind", refused(number), raising=False)
    with pytest.raises(SocketError, match=re.escape(f"cannot listen on inet:3000@127.0.0.1: {reason}")):
        listen("inet:3000@127.0.0.1")


def test_a_socket_that_was_left_behind_and_cannot_be_removed_is_told(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    monkeypatch.setattr(Path, "unlink", refused(errno.EROFS))
    with pytest.raises(SocketError, match="cannot be removed: Read-only file system"):
        listen(f"unix:{path}")


def test_a_socket_that_cannot_be_looked_at_is_told(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "stat", refused(errno.EACCES))
    with pytest.raises(SocketError, match="Permission denied"):
        listen(f"unix:{path}")


def test_a_passed_socket_that_cannot_listen_is_told() -> None:
    with socket.socket() as passed, socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        passed.connect(other.getsockname())
        with pytest.raises(SocketError, match=f"cannot listen on fd:{passed.fileno()}: Invalid argument"):
            listen(f"fd:{passed.fileno()}")


def test_a_socket_that_stays_behind_is_no_error(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "milter")
    listener = listen(f"unix:{path}")
    monkeypatch.setattr(Path, "unlink", refused(errno.EACCES))
    listener.close()
    assert f"the socket {path} stays behind (Permission denied)" in caplog.text


def test_a_descriptor_is_nothing_to_connect_to() -> None:
    with pytest.raises(SocketError, match="fd:3 can be listened on, not connected to"):
        connect("fd:3", 1.0)
