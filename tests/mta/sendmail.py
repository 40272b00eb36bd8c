# SPDX-License-Identifier: GPL-3.0-or-later
"""A Sendmail of the tests' own, from packages that lie unpacked in a directory.

Debian's package would replace Postfix, so it is not installed: `scripts/test.sh` unpacks it below `.mta` in the
project directory. An instance lives in one directory, listens on a loopback port, and hands every message to a
sink. It delivers before it answers the client's next command, in the process that serves the client.
"""

import contextlib
import glob
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.filter_process import REPOSITORY

from .certificate import make_certificate
from .ports import PATIENCE, port_of, reserve_port, wait_until_free, wait_until_listening
from .server import DOMAIN, REFUSED, Queued, ServerError
from .sink import Delivery, Sink

ROOT = Path(os.environ.get("SENDMAIL_ROOT") or REPOSITORY / ".mta" / "sendmail")
"""Where the packages lie unpacked."""

_PROGRAM = ROOT / "usr/libexec/sendmail/sendmail"
_M4_FILES = ROOT / "usr/share/sendmail/cf"

# Every message goes to the sink, whoever sends it, and nothing on the way asks a name server. Messages stay as the
# client and the filter made them: Sendmail adds no Date, From and Message-Id.
_CONFIGURATION = """\
VERSIONID(`tests')
OSTYPE(`linux')
define(`confDOMAIN_NAME', `{domain}')
define(`confPID_FILE', `{directory}/pid')
define(`QUEUE_DIR', `{directory}/queue')
define(`STATUS_FILE', `')
define(`HELP_FILE', `')
define(`ALIAS_FILE', `')
define(`confCW_FILE', `-o {directory}/none')
define(`confCT_FILE', `-o {directory}/none')
define(`confSERVICE_SWITCH_FILE', `{directory}/switch')
define(`confDONT_BLAME_SENDMAIL', `TrustStickyBit')
define(`confDONT_PROBE_INTERFACES', `True')
define(`confDELIVERY_MODE', `interactive')
define(`confTO_IDENT', `0')
define(`confMIN_FREE_BLOCKS', `0')
define(`confREFUSE_LA', `1000')
define(`confQUEUE_LA', `1000')
define(`confBAD_RCPT_THROTTLE', `1000')
define(`confMILTER_LOG_LEVEL', `14')
define(`confPRIVACY_FLAGS', `')
define(`confCACERT_PATH', `{directory}')
define(`confCACERT', `{directory}/cert.pem')
define(`confSERVER_CERT', `{directory}/cert.pem')
define(`confSERVER_KEY', `{directory}/key.pem')
define(`confAUTH_MECHANISMS', `ANONYMOUS')
define(`RELAY_MAILER_ARGS', `TCP $h {sink_port}')
MODIFY_MAILER_FLAGS(`RELAY', `-DFM')
define(`SMART_HOST', `relay:[127.0.0.1]')
define(`MAIL_HUB', `relay:[127.0.0.1]')
FEATURE(`nocanonify')
FEATURE(`no_default_msa')
FEATURE(`promiscuous_relay')
FEATURE(`accept_unqualified_senders')
FEATURE(`accept_unresolvable_domains')
{settings}
DAEMON_OPTIONS(`Port={port}, Addr=127.0.0.1, Name=MTA')
{filters}
MAILER(`smtp')
LOCAL_RULESETS
SLocal_check_rcpt
R$*{refused}$*	$#error $@ 5.7.1 $: "550 5.7.1 not wanted here"
"""

# Sendmail's own defaults, but for the flag: without one, a message passes when its filter fails.
_FILTER_DEFAULTS = {"F": "T", "T": "S:10s;R:10s;E:5m"}


def missing() -> str | None:
    """Why no instance can run here; None when one can."""
    if os.geteuid() != 0:
        return "Sendmail can only be started by root"
    if not _PROGRAM.exists():
        return f"Sendmail is not unpacked in {ROOT}; scripts/test.sh does that"
    if not Path("/proc/net/tcp").exists():
        return "whether Sendmail listens is told in /proc"
    return None


def sendmail_address(spec: str) -> str:
    """A milter's address in Sendmail's form, which is libmilter's with the kind of socket always named."""
    return spec if ":" in spec.partition("/")[0] else f"unix:{spec}"


class Sendmail:
    """One instance; a context manager that stops it. It starts when a service is first asked for."""

    name = "sendmail"

    def __init__(self, directory: Path, sink: Sink) -> None:
        self.sink = sink
        self._directory = directory
        self._queue = directory / "queue"
        self._log = directory / "log"
        self._reserved = reserve_port()
        self._port = port_of(self._reserved)
        self._running: str | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._queue.mkdir(mode=0o700)
        (directory / "switch").write_text("hosts files\naliases files\npasswd files\n")
        make_certificate(directory)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        self._reserved.close()

    def milter_service(self, milters: str | Sequence[str], **settings: str) -> int:
        """The port of an SMTP service that asks these filters.

        Settings: `F` and `T` of each filter; all others are macros of sendmail.mc (`confMAX_HEADERS_LENGTH`).
        Sendmail restarts if anything differs from the last call; the port stays.
        """
        specs = [milters] if isinstance(milters, str) else milters
        equates = {name: settings.pop(name, default) for name, default in _FILTER_DEFAULTS.items()}
        wanted = self._configuration(specs, equates, settings)
        if wanted != self._running:
            self.stop()
            self._start(wanted)
        return self._port

    def service(self, **settings: str) -> int:
        """The port of an SMTP service that asks no filter."""
        return self.milter_service([], **settings)

    def submit(self, sender: str, recipients: Sequence[str], content: bytes) -> None:
        """Hand in a message with the command `sendmail`, as programs on the machine do."""
        command = [*self._command("-i", "-f", sender or "<>"), *recipients]
        done = subprocess.run(command, input=content, env=self._environment(), capture_output=True, timeout=PATIENCE)
        if done.returncode != 0:
            raise ServerError(f"exit {done.returncode}: {done.stderr.decode()}")

    def stop(self) -> None:
        """End all of its processes, and wait until nobody listens on the port."""
        if self._process is None:
            return
        self._running = None
        # It leads a process group of its own, in which are all who serve a client.
        os.killpg(self._process.pid, signal.SIGTERM)
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise ServerError(f"Sendmail does not end:\n{self.log()}") from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process = None
        wait_until_free(self._port)

    @property
    def is_running(self) -> bool:
        return self._process is not None

    @property
    def daemon_pid(self) -> int:
        """The process id of the daemon, which is also the process group of all the others."""
        assert self._process is not None
        return self._process.pid

    def log(self) -> str:
        """All that this instance has logged."""
        return self._log.read_text(errors="surrogateescape") if self._log.exists() else ""

    def queue(self) -> list[Queued]:
        """The messages in the queue, held or deferred."""
        return [_queued(path) for path in sorted(self._queue.glob("[qh]f*"))]

    def deliveries(self) -> list[Delivery]:
        """What was delivered since the last look, once nobody serves a client any more."""
        deadline = time.monotonic() + PATIENCE
        while self._serves():
            if time.monotonic() > deadline:
                raise AssertionError(f"Sendmail is still at work after {PATIENCE:g} seconds:\n{self.log()}")
            time.sleep(0.002)
        return self.sink.drain()

    def discard_queue(self) -> None:
        """Throw away all that is in the queue."""
        for path in self._queue.iterdir():
            path.unlink()

    def _serves(self) -> bool:
        return self._process is not None and any(_children(self._process.pid))

    def _configuration(self, specs: Sequence[str], equates: dict[str, str], settings: dict[str, str]) -> str:
        tail = ", ".join(f"{name}={value}" for name, value in equates.items())
        filters = "\n".join(
            f"INPUT_MAIL_FILTER(`filter{number}', `S={sendmail_address(spec)}, {tail}')"
            for number, spec in enumerate(specs, 1)
        )
        return _CONFIGURATION.format(
            domain=DOMAIN,
            directory=self._directory,
            sink_port=self.sink.port,
            settings="\n".join(f"define(`{name}', `{value}')" for name, value in settings.items()),
            port=self._port,
            filters=filters,
            refused=REFUSED,
        )

    def _start(self, configuration: str) -> None:
        self._write_cf(configuration)
        self._process = subprocess.Popen(
            self._command("-bD"),
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            wait_until_listening(self._port)
        except TimeoutError as failure:
            raise ServerError(f"{failure}\n{self.log()}") from None
        self._running = configuration

    def _write_cf(self, configuration: str) -> None:
        m4 = shutil.which("m4") or str(ROOT / "usr/bin/m4")
        done = subprocess.run(
            [m4, f"-D_CF_DIR_={_M4_FILES}/", _M4_FILES / "m4/cf.m4", "-"],
            input=configuration,
            env=self._environment(),
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            raise ServerError(f"m4: {done.stderr}")
        cf = self._directory / "sendmail.cf"
        cf.write_text(done.stdout)
        cf.chmod(0o644)

    def _command(self, *arguments: str) -> list[str]:
        # Without a name space of its own, Sendmail waits a minute on machines whose name has no dot.
        own_name = ["unshare", "--uts", "sh", "-c", f'hostname {DOMAIN} && exec "$@"', "sh"]
        # With -d89.10 the log goes to the file of -D instead of the machine's.
        log = ["-D", str(self._log), "-d89.10"]
        return [*own_name, str(_PROGRAM), *log, "-C", f"{self._directory}/sendmail.cf", *arguments]

    def _environment(self) -> dict[str, str]:
        libraries = os.pathsep.join(glob.glob(f"{ROOT}/usr/lib/*-linux-*"))
        return {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C", "LD_LIBRARY_PATH": libraries}


def _queued(path: Path) -> Queued:
    """A message from its queue file: lines that begin with S (sender), R (recipient), q (why it is held)."""
    sender, reason, recipients = "", "", list[str]()
    for line in path.read_text(errors="surrogateescape").splitlines():
        match line[:1]:
            case "S":
                sender = line[1:].strip("<>")
            case "R":
                recipients.append(line.rpartition(":")[2].strip("<>"))
            case "q":
                reason = line[1:]
    state = "hold" if path.name.startswith("h") else "deferred"
    return Queued(state, path.name[2:], sender, tuple(recipients), reason)


def _children(pid: int) -> Iterator[int]:
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            yield from map(int, task.read_text().split())
