# SPDX-License-Identifier: GPL-3.0-or-later
"""A Postfix of the tests' own, beside whatever mail system the machine has.

An instance lives in one directory: configuration, queue, data and log. It listens on loopback ports only, and
hands every message to a sink. Nothing of the machine's own mail system is changed.
"""

import contextlib
import errno
import fcntl
import json
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from .sink import PATIENCE, Delivery, Sink
from .smtp import SmtpClient

MAIL_OWNER = "postfix"

MAIN_CF: Mapping[str, str | int] = {
    "compatibility_level": "3.6",
    "inet_interfaces": "127.0.0.1",
    "mynetworks": "127.0.0.0/8",
    "myhostname": "mta.test",
    # Every message goes to the sink, whoever the client is, and nothing on the way asks a name server.
    "mydestination": "",
    "relay_domains": "static:all",
    "alias_maps": "",
    "smtp_dns_support_level": "disabled",
    "smtp_host_lookup": "native",
    "smtp_tls_security_level": "none",
    "smtpd_peername_lookup": "no",
    # Messages stay as the client and the filter made them.
    "local_header_rewrite_clients": "",
    "smtp_line_length_limit": 0,
    "message_size_limit": 64 * 1024 * 1024,
    "mailbox_size_limit": 0,
    # Tests misbehave on purpose and in a hurry.
    "smtpd_authorized_xclient_hosts": "127.0.0.1",
    "smtpd_error_sleep_time": 0,
    "smtpd_soft_error_limit": 1000,
    "smtpd_hard_error_limit": 2000,
    "smtpd_junk_command_limit": 1000,
    "smtpd_client_connection_count_limit": 0,
    "in_flow_delay": 0,
    "queue_minfree": 0,
    # The defaults of these differ between the versions of Postfix.
    "milter_default_action": "tempfail",
    "smtpd_forbid_bare_newline": "no",
    "smtpd_forbid_unauth_pipelining": "no",
}

SERVICES = """\
pickup     unix        n  -  n  60   1  pickup
cleanup    unix        n  -  n  -    0  cleanup
qmgr       unix        n  -  n  300  1  qmgr
tlsmgr     unix        -  -  n  -    1  tlsmgr
rewrite    unix        -  -  n  -    -  trivial-rewrite
bounce     unix        -  -  n  -    0  bounce
defer      unix        -  -  n  -    0  bounce
trace      unix        -  -  n  -    0  bounce
verify     unix        -  -  n  -    1  verify
flush      unix        n  -  n  -    0  flush
proxymap   unix        -  -  n  -    -  proxymap
smtp       unix        -  -  n  -    -  smtp
relay      unix        -  -  n  -    -  smtp
showq      unix        n  -  n  -    -  showq
error      unix        -  -  n  -    -  error
retry      unix        -  -  n  -    -  error
discard    unix        -  -  n  -    -  discard
anvil      unix        -  -  n  -    1  anvil
scache     unix        -  -  n  -    1  scache
postlog    unix-dgram  n  -  n  -    1  postlogd
"""

# Restrictions that a test sets must not stop the messages of the harness.
_PLAIN_OPTIONS = (
    "smtpd_milters=",
    "smtpd_client_restrictions=",
    "smtpd_helo_restrictions=",
    "smtpd_sender_restrictions=",
    "smtpd_recipient_restrictions=",
    "smtpd_data_restrictions=",
    "smtpd_end_of_data_restrictions=",
    "cleanup_service_name=plain-cleanup",
)

_SEARCH_PATH = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"))
_MARKER = "marker@harness.test"
_ON_ITS_WAY = ("maildrop", "incoming", "active")


class PostfixError(Exception):
    """Postfix did not do as it was told; the message holds what it said."""


@dataclass(frozen=True)
class Queued:
    """A message in Postfix's queue; `state` is the part of the queue: `active`, `deferred`, `hold` …"""

    state: str
    queue_id: str
    sender: str
    recipients: tuple[str, ...]


def missing() -> str | None:
    """Why no instance can run here; None when one can."""
    if os.geteuid() != 0:
        return "Postfix can only be started by root"
    if shutil.which("postfix", path=_SEARCH_PATH) is None:
        return "Postfix is not installed"
    try:
        pwd.getpwnam(MAIL_OWNER)
    except KeyError:
        return f"there is no user {MAIL_OWNER!r}"
    return None


@contextlib.contextmanager
def open_directory(prefix: str = "milter-") -> Iterator[Path]:
    """A new directory that user `postfix` can reach, its path short enough for sockets; removed after use."""
    # TMPDIR and pytest's own directories are often closed to other users, or long.
    directory = Path(tempfile.mkdtemp(prefix=prefix, dir="/tmp"))
    directory.chmod(0o755)
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


def postfix_address(spec: str) -> str:
    """A milter's address in Postfix's form; libmilter's (`inet:port@host`, a bare path) is understood."""
    kind, colon, rest = spec.partition(":")
    if not colon or "/" in kind:
        return f"unix:{spec}"
    if kind in ("unix", "local"):
        return f"unix:{rest}"
    port, at, host = rest.partition("@")
    if not at:
        return spec
    return f"inet:[{host}]:{port}" if ":" in host else f"inet:{host}:{port}"


class Postfix:
    """One instance; a context manager that stops it. It starts when a service is first asked for."""

    def __init__(self, directory: Path, sink: Sink) -> None:
        self.sink = sink
        self._etc, self._queue, self._data = (directory / name for name in ("etc", "queue", "data"))
        self._maillog = directory / "maillog"
        self._reserved = [_reserve_port(), _reserve_port()]
        self._port, self._plain_port = map(_port, self._reserved)
        self._running: dict[str, str] | None = None
        for part in (self._etc, self._queue, self._data):
            part.mkdir()
            part.chmod(0o755)
        shutil.chown(self._data, MAIL_OWNER)
        (self._etc / "master.cf").write_text(self._master_cf())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        for reserved in self._reserved:
            reserved.close()

    def milter_service(self, milters: str | Sequence[str], **main_cf: str | int) -> int:
        """The port of an SMTP service that asks these filters, given in libmilter's form or Postfix's."""
        specs = [milters] if isinstance(milters, str) else milters
        return self.service(smtpd_milters=", ".join(map(postfix_address, specs)), **main_cf)

    def service(self, **main_cf: str | int) -> int:
        """The port of an SMTP service under these parameters, and no others beside the defaults above.

        Postfix restarts if they differ from those of the last call; the port stays.
        """
        wanted = {name: str(value) for name, value in {**MAIN_CF, **self._places(), **main_cf}.items()}
        if wanted != self._running:
            self.stop()
            self._write_main_cf(wanted)
            self._start()
            self._running = wanted
        return self._port

    def stop(self) -> None:
        """End all of its processes, and wait until nothing holds the ports."""
        if self._running is None:
            return
        self._running = None
        # "stop" sends the same signal, but looks for the effect once a second only.
        with self._pid_file.open() as locked_by_master:
            self._run("postfix", "abort")
            fcntl.flock(locked_by_master, fcntl.LOCK_SH)
        for port in (self._port, self._plain_port):
            _wait_until_free(port)

    @property
    def is_running(self) -> bool:
        return self._running is not None

    @property
    def master_pid(self) -> int:
        """The process id of Postfix's master, which is also the process group of all the others."""
        return int(self._pid_file.read_text())

    @property
    def _pid_file(self) -> Path:
        return self._queue / "pid" / "master.pid"

    def log(self) -> str:
        """All that this instance has logged."""
        return self._maillog.read_text(errors="surrogateescape") if self._maillog.exists() else ""

    def queue(self) -> list[Queued]:
        """The messages in the queue, in whichever state."""
        entries = map(json.loads, self._run("postqueue", "-j").splitlines())
        return [
            Queued(
                entry["queue_name"],
                entry["queue_id"],
                entry["sender"],
                tuple(recipient["address"] for recipient in entry["recipients"]),
            )
            for entry in entries
            if entry["sender"] != _MARKER
        ]

    def deliveries(self) -> list[Delivery]:
        """What was delivered since the last look, once Postfix is done with all that it took so far.

        Done means delivered, deferred or on hold. An empty list says that nothing was delivered, nor will be.
        """
        arrived: list[Delivery] = []
        # A marker may overtake a message, so more than one can be needed.
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            self._send_marker()
            while (delivery := self.sink.next()).sender != _MARKER:
                arrived.append(delivery)
            if not any(message.state in _ON_ITS_WAY for message in self.queue()):
                return arrived + self.sink.drain()
        raise AssertionError(f"still in the queue after {PATIENCE:g} seconds: {self.queue()}")

    def discard_queue(self) -> None:
        """Throw away all that is in the queue."""
        self._run("postsuper", "-d", "ALL")

    def _send_marker(self) -> None:
        with SmtpClient(self._plain_port) as client:
            answer = client.send(_MARKER, _MARKER, "Subject: marker\n\n")
        if answer.code != 250:
            raise PostfixError(f"the marker was refused: {answer}\n{self.log()}")

    def _places(self) -> dict[str, str | int]:
        return {
            "queue_directory": str(self._queue),
            "data_directory": str(self._data),
            "maillog_file": str(self._maillog),
            "maillog_file_prefixes": str(self._maillog.parent),
            "relayhost": f"[127.0.0.1]:{self.sink.port}",
        }

    def _master_cf(self) -> str:
        smtpd = "127.0.0.1:{port} inet n - n - - smtpd {options}\n"
        plain = " ".join(f"-o {option}" for option in _PLAIN_OPTIONS)
        return (
            smtpd.format(port=self._port, options="")
            + smtpd.format(port=self._plain_port, options=plain)
            + "plain-cleanup unix n - n - 0 cleanup\n"
            + SERVICES
        )

    def _write_main_cf(self, parameters: Mapping[str, str]) -> None:
        main_cf = self._etc / "main.cf"
        main_cf.write_text("".join(f"{name} = {value}\n" for name, value in parameters.items()))
        # Postfix sleeps until the file is more than a second old, lest it read one that is being written.
        os.utime(main_cf, (0, 0))

    def _start(self) -> None:
        # Returns when the master process is up, and so when all the ports listen.
        self._run("postfix", "start")
        # The next start may leave out the search for missing directories and for queue files out of place.
        (self._queue / "quick-start").touch()

    def _run(self, command: str, *arguments: str) -> str:
        executable = shutil.which(command, path=_SEARCH_PATH)
        if executable is None:
            raise PostfixError(f"there is no command {command!r}")
        done = subprocess.run(
            [executable, "-c", self._etc, *arguments],
            env={"PATH": _SEARCH_PATH, "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        if done.returncode != 0:
            said = done.stdout + done.stderr
            raise PostfixError(f"{command} {' '.join(arguments)}: exit {done.returncode}\n{said}{self.log()}")
        return done.stdout


def _reserve_port() -> socket.socket:
    """A bound socket that keeps its port from being given to others, yet lets Postfix listen there.

    Linux allows it: both set SO_REUSEADDR, and only Postfix listens.
    """
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind(("127.0.0.1", 0))
    return reserved


def _port(bound: socket.socket) -> int:
    port: int = bound.getsockname()[1]
    return port


def _wait_until_free(port: int) -> None:
    """Wait until nobody listens there: the master's children may outlive it by a moment, with its ports."""
    deadline = time.monotonic() + PATIENCE
    while _is_listening(port):
        if time.monotonic() > deadline:
            raise PostfixError(f"somebody still listens on port {port}")
        time.sleep(0.002)


def _is_listening(port: int) -> bool:
    # Not found out by connecting, which would make Postfix talk to the filters.
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
            probe.listen()
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            return True
    return False
