# SPDX-License-Identifier: GPL-3.0-or-later
"""Testing mail filters without an MTA: the MTA's side of the milter protocol.

The public names of this package, nothing else. ``milter`` itself does not import it. `MTA` is where to begin;
docs/testing.md tells more.

>>> from milter.testing import Envelope, Message
>>> Envelope.of("ann@client.example", "bob@mta.example").sender.path
'<ann@client.example>'
"""

from milter.testing.client import (
    Client,
    ClientAddress,
    EndOfMessage,
    Outcome,
    PeerClosed,
    PeerTimeout,
    Session,
    StageAnswer,
    Transcript,
)
from milter.testing.delivery import (
    Delivery,
    DeliveryModel,
    Envelope,
    Header,
    Mailbox,
    Message,
    ModificationError,
    Postfix,
    Sendmail,
)
from milter.testing.mta import MTA, Mail, MTAFactory, SMTPSession
from milter.testing.result import DeliveredHeaders, MailBytes, NotDeliveredError, Result
from milter.testing.wire import (
    Actions,
    AddHeader,
    AddRecipient,
    Answer,
    Change,
    Command,
    Decoder,
    Event,
    Family,
    InsertHeader,
    Negotiated,
    Packet,
    Progress,
    Quarantine,
    RemoveRecipient,
    ReplaceBody,
    ReplaceHeader,
    ReplaceSender,
    Response,
    Steps,
    Verdict,
    WireError,
)

__all__ = [
    "MTA",
    "Actions",
    "AddHeader",
    "AddRecipient",
    "Answer",
    "Change",
    "Client",
    "ClientAddress",
    "Command",
    "Decoder",
    "DeliveredHeaders",
    "Delivery",
    "DeliveryModel",
    "EndOfMessage",
    "Envelope",
    "Event",
    "Family",
    "Header",
    "InsertHeader",
    "MTAFactory",
    "Mail",
    "MailBytes",
    "Mailbox",
    "Message",
    "ModificationError",
    "Negotiated",
    "NotDeliveredError",
    "Outcome",
    "Packet",
    "PeerClosed",
    "PeerTimeout",
    "Postfix",
    "Progress",
    "Quarantine",
    "RemoveRecipient",
    "ReplaceBody",
    "ReplaceHeader",
    "ReplaceSender",
    "Response",
    "Result",
    "SMTPSession",
    "Sendmail",
    "Session",
    "StageAnswer",
    "Steps",
    "Transcript",
    "Verdict",
    "WireError",
]
