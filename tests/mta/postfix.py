# SPDX-License-Identifier: GPL-3.0-or-later
"""A Postfix of the tests' own, beside whatever mail system the machine has.

An instance lives in one directory: configuration, queue, data and log. It listens on loopback ports only, and
hands every message to a sink. Nothing of the machine's own mail system is changed.
"""

import contextlib
import fcntl
import json
import os
import pwd
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from .certificate import make_certificate
from .ports import PATIENCE, port_of, reserve_port, wait_until_free
from .server import DOMAIN, Queued, ServerError
from .sink import Delivery, Sink
from .smtp import SmtpClient

MAIL_OWNER = "postfix"

MAIN_CF: Mapping[str, str | int] = {
    "compatibility_level": "3.6",
    "inet_interfaces": "127.0.0.1",
    "mynetworks": "127.0.0.0/8",
    "myhostname": DOMAIN,
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
    "smtpd_proxy_filter=",
    "cleanup_service_name=plain-cleanup",
)

_SEARCH_PATH = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"))
_MARKER = "marker@harness.test"
_ON_ITS_WAY = ("maildrop", "incoming", "active")


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

    name = "postfix"

    def __init__(self, directory: Path, sink: Sink) -> None:
        self.sink = sink
        self._etc, self._queue, self._data = (directory / name for name in ("etc", "queue", "data"))
        self._maillog = directory / "maillog"
        self._reserved = [reserve_port(), reserve_port()]
        self._port, self._plain_port = map(port_of, self._reserved)
        self._running: dict[str, str] | None = None
        for part in (self._etc, self._queue, self._data):
            part.mkdir()
            part.chmod(0o755)
        shutil.chown(self._data, MAIL_OWNER)
        make_certificate(self._etc)
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

    def submit(self, sender: str, recipients: Sequence[str], content: bytes) -> None:
        """Hand in a message with the command `sendmail`, as programs on the machine do."""
        arguments = ["-i", "-f", sender or "<>", *recipients]
        self._run("sendmail", *arguments, option="-C", given=content.replace(b"\r\n", b"\n"))

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
            wait_until_free(port)

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
            raise ServerError(f"the marker was refused: {answer}\n{self.log()}")

    def _places(self) -> dict[str, str | int]:
        return {
            "queue_directory": str(self._queue),
            "data_directory": str(self._data),
            "maillog_file": str(self._maillog),
            "maillog_file_prefixes": str(self._maillog.parent),
            "smtpd_tls_cert_file": str(self._etc / "cert.pem"),
            "smtpd_tls_key_file": str(self._etc / "key.pem"),
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

    def _run(self, command: str, *arguments: str, option: str = "-c", given: bytes = b"") -> str:
        """What a command of Postfix prints. `option` names the directory of the configuration."""
        executable = shutil.which(command, path=_SEARCH_PATH)
        if executable is None:
            raise ServerError(f"there is no command {command!r}")
        done = subprocess.run(
            [executable, option, self._etc, *arguments],
            env={"PATH": _SEARCH_PATH, "LC_ALL": "C"},
            input=given,
            capture_output=True,
            timeout=PATIENCE,
        )
        if done.returncode != 0:
            said = (done.stdout + done.stderr).decode(errors="replace")
            raise ServerError(f"{command} {' '.join(arguments)}: exit {done.returncode}\n{said}{self.log()}")
        return done.stdout.decode("utf-8", "surrogateescape")
