# SPDX-License-Identifier: GPL-3.0-or-later
"""What the tests of the filters in examples/ share: a message in, what becomes of it out."""

from milter.testing import Client, ClientAddress, Envelope, Message, Outcome, Postfix, Session, Transcript
from tests.conftest import Peer

ENVELOPE = Envelope.of("ann@client.example", "bob@mta.example")


def send(peer: Peer, content: bytes | str, envelope: Envelope = ENVELOPE, session: Session | None = None) -> Transcript:
    """One message on a connection of its own; lines may end in LF."""
    data = content.encode() if isinstance(content, str) else content
    client = peer.client()
    try:
        return client.send_message(envelope, Message.parse(data), session)
    finally:
        client.finish()
        peer.forget(client)


def delivered(transcript: Transcript) -> Message:
    """The message as Postfix delivers it, without the MTA's own field."""
    return transcript.delivery(Postfix(transcript.negotiated.steps)).without_trace()


def field(message: Message, name: str) -> str | None:
    """The value of the one header field of this name; None if there is none."""
    values = [header.value for header in message.headers if header.name.lower() == name.lower()]
    assert len(values) <= 1, values
    return values[0] if values else None


def refusal(transcript: Transcript) -> str:
    """What the client is told of a message that was refused."""
    assert transcript.outcome in (Outcome.REJECTED, Outcome.TEMPFAILED), transcript.outcome
    entry = transcript.decision or next(entry for entry in transcript.stages if entry.answer and _refuses(entry.answer))
    answer = entry.answer
    assert answer is not None
    return " ".join([str(answer.code), *answer.lines])


def _refuses(answer: object) -> bool:
    return bool(getattr(answer, "rejects", False) or getattr(answer, "tempfails", False))


def from_address(address: str, helo: str = "client.example", **macros: str) -> Session:
    """A session of a client at this address."""
    named = {name if len(name) == 1 else f"{{{name}}}": value for name, value in macros.items()}
    return Session(address=ClientAddress.of(address, 49152), helo=helo, macros=named)


__all__ = ["ENVELOPE", "Client", "delivered", "field", "from_address", "refusal", "send"]
