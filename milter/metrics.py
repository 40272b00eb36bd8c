# SPDX-License-Identifier: GPL-3.0-or-later
"""Figures for Prometheus: what a filter has done, and an HTTP endpoint that tells them.

Needs the package prometheus-client: ``pip install 'milter-cffi[prometheus]'``. It is imported only when
metrics are wanted.

====================================== ================================================================
``milter_messages_total``              messages by ``verdict``: accept, reject, tempfail, discard, abort
``milter_refused_recipients_total``    recipients refused at RCPT, by ``verdict``, whatever became of their messages
``milter_refused_connections_total``   connections refused at CONNECT or HELO, by ``verdict``
``milter_handler_seconds``             a histogram of how long the handlers of a ``stage`` took, each time
``milter_handler_errors_total``        handlers that raised, by ``stage``
``milter_open_connections``            of MTAs, now
====================================== ================================================================

One process
    It counts in its memory, and a thread answers: :func:`open_exporter`.
Several processes
    Each counts in files of a directory, which prometheus-client's multiprocess mode sums up, those of
    processes that ended included. The supervisor makes the :func:`directory` and the socket (:func:`listen`)
    before it forks; each worker has an exporter, which finds the directory; and one more process answers:
    :meth:`Directory.serve`. Metrics of the filter's own are summed and told, too, if the module that makes
    them is imported by the workers.

Connections come and go without Python. So the shim counts the open ones itself, in a page of memory that the one
who answers can read: its own, or a file in the directory.
"""

import contextlib
import mmap
import os
import select
import shutil
import signal
import socket
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

from milter import children
from milter.errors import MilterError, SocketError
from milter.printable import printable
from milter.protocol import Stage
from milter.safe_log import SafeLog
from milter.scarcity import start_thread

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.core import Metric

__all__ = ["Collector", "Directory", "Exporter", "directory", "listen", "open_exporter"]

log = SafeLog("milter")

_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
_PAGE = mmap.PAGESIZE
_OPEN = "connections_"
_VERDICTS = ("accept", "reject", "tempfail", "discard", "abort")
_BUCKETS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


def _package() -> ModuleType:
    try:
        import prometheus_client
    except ImportError:
        raise MilterError(
            "metrics need the package prometheus-client, which is not installed: pip install 'milter-cffi[prometheus]'"
        ) from None
    return prometheus_client


# ---- Counting --------------------------------------------------------------------------------


class Collector:
    """What is counted in this process. Made after the fork, one for each run of a filter."""

    def __init__(self) -> None:
        package = _package()
        self.registry: CollectorRegistry = package.CollectorRegistry()
        self.connections = _private_page() if _directory is None else _directory.page()
        """Where the shim counts the open ones, as an ``int``."""
        self.registry.register(_OpenConnections(lambda: [self.connections]))
        messages, recipients, refused, seconds, errors = self._metrics(package)
        self._messages = {verdict: messages.labels(verdict) for verdict in _VERDICTS}
        self._recipients = {verdict: recipients.labels(verdict) for verdict in ("reject", "tempfail")}
        self._refused = {verdict: refused.labels(verdict) for verdict in ("reject", "tempfail")}
        self._histogram, self._seconds = seconds, dict[Stage, Any]()
        self._errors = {stage: errors.labels(stage.name.lower()) for stage in Stage}

    def _metrics(self, package: ModuleType) -> tuple[Any, Any, Any, Any, Any]:
        registry = self.registry
        return (
            package.Counter("milter_messages", "Messages, by what became of them", ["verdict"], registry=registry),
            package.Counter("milter_refused_recipients", "Recipients refused", ["verdict"], registry=registry),
            package.Counter(
                "milter_refused_connections", "Connections refused before a message", ["verdict"], registry=registry
            ),
            package.Histogram(
                "milter_handler_seconds",
                "How long the handlers of a stage took",
                ["stage"],
                buckets=_BUCKETS,
                registry=registry,
            ),
            package.Counter("milter_handler_errors", "Handlers that raised", ["stage"], registry=registry),
        )

    def decided(self, verdict: str) -> None:
        self._messages[verdict].inc()

    def refused_recipient(self, verdict: str) -> None:
        self._recipients[verdict].inc()

    def refused(self, verdict: str) -> None:
        self._refused[verdict].inc()

    def took(self, stage: Stage, seconds: float) -> None:
        histogram = self._seconds.get(stage)
        if histogram is None:  # a histogram is many lines: there are only those of stages with handlers
            histogram = self._seconds.setdefault(stage, self._histogram.labels(stage.name.lower()))
        histogram.observe(seconds)

    def raised(self, stage: Stage) -> None:
        self._errors[stage].inc()


class _OpenConnections:
    """Asks the pages in which the shim counts.

    Arguments:
        pages: one for each process.
    """

    def __init__(self, pages: Callable[[], Iterable[mmap.mmap | bytes]]) -> None:
        self._pages = pages

    def collect(self) -> "Iterable[Metric]":
        from prometheus_client.core import GaugeMetricFamily

        count = sum(_opened(page) for page in self._pages())
        yield GaugeMetricFamily("milter_open_connections", "Open connections of MTAs", count)


def _opened(page: mmap.mmap | bytes) -> int:
    count: int = struct.unpack_from("=i", page)[0]
    return count


def _private_page() -> mmap.mmap:
    return mmap.mmap(-1, _PAGE)


# ---- Several processes -----------------------------------------------------------------------


class Directory:
    """Where several processes count; made by :func:`directory`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def page(self) -> mmap.mmap:
        """In which this process counts its open connections, for whoever reads the directory."""
        descriptor = os.open(self.path / f"{_OPEN}{os.getpid()}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(descriptor, _PAGE)
            return mmap.mmap(descriptor, _PAGE)
        finally:
            os.close(descriptor)

    def forget(self, process: int) -> None:
        """By the supervisor: this process has ended, and its connections with it. What it has counted stays."""
        from prometheus_client.multiprocess import mark_process_dead

        mark_process_dead(process, str(self.path))  # type: ignore[no-untyped-call]
        (self.path / f"{_OPEN}{process}").unlink(missing_ok=True)

    def serve(self, listener: socket.socket, lifeline: int) -> None:
        """Answer on `listener` until `lifeline`, the reading end of a pipe, shows that nobody holds the other end.

        The life of a process of its own, forked by the supervisor, which keeps the writing end; the process
        itself must have closed its copy. Signals that end a filter do not end it, since they may be meant for all
        of its processes at once, and the workers have figures as long as they drain.
        """
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        _answer(listener, self._registry(), lifeline)

    def _registry(self) -> "CollectorRegistry":
        from prometheus_client.multiprocess import MultiProcessCollector

        registry: CollectorRegistry = _package().CollectorRegistry()
        MultiProcessCollector(registry, str(self.path))  # type: ignore[no-untyped-call]
        registry.register(_OpenConnections(self._pages))
        return registry

    def _pages(self) -> Iterator[bytes]:
        for file in self.path.glob(f"{_OPEN}*"):
            with contextlib.suppress(FileNotFoundError):  # its process has ended meanwhile
                page = file.read_bytes()
                if page:  # pragma: no branch (else it begins at this moment)
                    yield page


_directory: Directory | None = None


@contextlib.contextmanager
def directory() -> Iterator[Directory]:
    """By the supervisor, before it forks: a directory in which its children count. It is removed at the end."""
    global _directory
    _package()
    # All that will be needed, as long as this process may read it: its children may become another user.
    from prometheus_client import exposition, multiprocess, values  # noqa: F401

    before = os.environ.get(_VARIABLE), values.ValueClass
    path = _new_directory()
    os.environ[_VARIABLE] = str(path)
    # The package chose its way of counting when it was imported, which may have been before this.
    values.ValueClass = values.get_value_class()  # type: ignore[no-untyped-call]
    _directory = Directory(path)
    process = os.getpid()
    try:
        yield _directory
    finally:
        if os.getpid() == process:  # and no child that leaves this way
            _directory = None
            variable, values.ValueClass = before
            os.environ.pop(_VARIABLE) if variable is None else os.environ.update({_VARIABLE: variable})
            shutil.rmtree(path, ignore_errors=True)


def _new_directory() -> Path:
    try:
        return Path(tempfile.mkdtemp(prefix="milter-metrics-"))
    except OSError as failure:
        raise MilterError(
            "the metrics of several processes need a directory for temporary files: let TMPDIR name one that can be "
            f"written ({failure.strerror})"
        ) from None


# ---- Answering -------------------------------------------------------------------------------


class Exporter:
    """The metrics of one process: it counts, and answers, unless the supervisor has another process for that.

    Arguments:
        address: see :func:`listen`.
    """

    def __init__(self, address: str) -> None:
        self._stack = contextlib.ExitStack()
        self.collector = Collector()
        self.address: str | None = None
        """Where it answers, with the port that the system chose for port 0; None: elsewhere."""
        if _directory is None:
            listener = self._stack.enter_context(listen(address))
            self.address = address_of(listener)
            self._stack.callback(children.show, children.hide(listener.fileno()))
            self._stack.enter_context(_answering(listener, _WithTheUsers(self.collector.registry)))

    def close(self) -> None:
        self._stack.close()


def open_exporter(address: str | None) -> Exporter | None:
    """For a run of a filter; None: no metrics are wanted."""
    return None if address is None else Exporter(address)


def listen(address: str) -> socket.socket:
    """Open the socket of an endpoint.

    Arguments:
        address: ``host:port``, ``[::1]:port`` or a port alone, which is one of 127.0.0.1. ``0.0.0.0:port`` and
            ``[::]:port`` are open to everyone: the figures tell how much mail there is, and nothing of its content.

    Raises :class:`SocketError <milter.SocketError>` when it cannot be had.
    """
    host, port = _host_and_port(address)
    try:
        family, _, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(where[:2], family=family)
    except OSError as failure:
        raise SocketError(f"metrics cannot be told on {address}: {failure.strerror or failure}") from failure


def address_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _host_and_port(address: str) -> tuple[str, int]:
    host, colon, port = address.rpartition(":")
    if not colon:
        host = "127.0.0.1"
    elif host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        host = ""
    if not host or not (port.isascii() and port.isdigit() and int(port) < 65536):
        raise ValueError(
            f"{address!r} is no address for metrics: write host:port, [::1]:port, or a port of 127.0.0.1 alone"
        )
    return host, int(port)


class _Registry(Protocol):
    """As much of a registry as its text is made of."""

    def collect(self) -> "Iterable[Metric]": ...


class _Answers(ThreadingHTTPServer):
    """Each request has a thread, so that one who reads slowly holds up nobody."""

    daemon_threads = True

    def __init__(self, listener: socket.socket, registry: _Registry) -> None:
        super().__init__(listener.getsockname()[:2], _Request, bind_and_activate=False)
        self.socket.close()
        self.socket = listener
        self.registry = registry


class _Request(BaseHTTPRequestHandler):
    server: _Answers
    timeout = 10
    server_version = "milter"
    sys_version = ""

    def do_GET(self) -> None:
        if self.path.partition("?")[0] not in ("/", "/metrics"):
            self.send_error(404)
            return
        encode, kind = _encoder(self.headers.get("Accept", ""))
        try:
            text = encode(self.server.registry)
        except Exception:
            log.exception("the metrics could not be told")
            self.send_error(500)
            return
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *arguments: Any) -> None:
        log.debug("metrics: %s", printable(format % arguments))


def _encoder(accept: str) -> tuple[Callable[[Any], bytes], str]:
    from prometheus_client.exposition import choose_encoder

    return choose_encoder(accept)


class _WithTheUsers:
    """The metrics of this library, and those that the filter itself has made, or its process has."""

    def __init__(self, registry: _Registry) -> None:
        self._registry = registry

    def collect(self) -> "Iterable[Metric]":
        yield from self._registry.collect()
        yield from _package().REGISTRY.collect()


def _answer(listener: socket.socket, registry: _Registry, end: int) -> None:
    """Answer until the descriptor `end` can be read, or its pipe has no writer any more."""
    listener.setblocking(False)
    ready = select.poll()
    ready.register(listener, select.POLLIN)
    ready.register(end, select.POLLIN)
    with _Answers(listener, registry) as server:
        while all(descriptor != end for descriptor, _ in ready.poll()):
            server.handle_request()


@contextlib.contextmanager
def _answering(listener: socket.socket, registry: _Registry) -> Iterator[None]:
    """A thread answers while this lasts."""
    reader, writer = os.pipe()
    try:
        thread = start_thread(_answer, "milter: metrics", listener, registry, reader)
        try:
            yield
        finally:
            os.write(writer, b"\n")  # to close it would not do: a child of this process may hold it open
            thread.join()
    finally:
        os.close(reader)
        os.close(writer)
