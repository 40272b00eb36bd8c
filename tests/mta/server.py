# SPDX-License-Identifier: GPL-3.0-or-later
"""What tests ask of a mail server, whichever it is: `Postfix` and `Sendmail` both offer this."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from .sink import Delivery, Sink

DOMAIN = "mta.test"
REFUSED = "refused@sink.test"
"""A recipient that the servers refuse by themselves, when a test asks for it."""


class ServerError(Exception):
    """A server did not do as it was told; the message holds what it said."""


@dataclass(frozen=True)
class Queued:
    """A message in a server's queue; `state` is `hold`, `deferred`, `active` …; `reason` why it is held, if told."""

    state: str
    queue_id: str
    sender: str
    recipients: tuple[str, ...]
    reason: str = ""


class MailServer(Protocol):
    """An instance of the tests' own. It starts when a service is first asked for, and again for other settings."""

    sink: Sink
    name: str

    @property
    def is_running(self) -> bool: ...

    def milter_service(self, milters: str | Sequence[str], **settings: str) -> int:
        """The port of an SMTP service that asks these filters, given in libmilter's form."""

    def stop(self) -> None:
        """End all of its processes, and wait until nothing holds its port."""

    def submit(self, sender: str, recipients: Sequence[str], content: bytes) -> None:
        """Hand in a message with the command `sendmail`, as programs on the machine do."""

    def log(self) -> str:
        """All that this instance has logged."""

    def queue(self) -> list[Queued]:
        """The messages in the queue, in whichever state."""

    def deliveries(self) -> list[Delivery]:
        """What was delivered since the last look, once the server is done with all that it took so far."""

    def discard_queue(self) -> None:
        """Throw away all that is in the queue."""
