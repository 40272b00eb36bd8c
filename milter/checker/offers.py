# SPDX-License-Identifier: GPL-3.0-or-later
"""What the MTA that ``milter check`` plays offers a filter in the negotiation, and the macros it sends by itself.

As Postfix 3.7 and Sendmail 8.17 were seen to do it. In the negotiation these two offer the same; they differ in
their macros. ``v2`` is Postfix with ``milter_protocol = 2``: an old MTA, without DATA, UNKNOWN and macro lists.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from milter.testing.client import POSTFIX_MACROS
from milter.testing.wire import ALL_ACTIONS, ALL_STEPS, Actions, Command, Steps


@dataclass(frozen=True)
class Offer:
    """What an MTA offers. ``unasked``: the macros of each stage; ``macros``: values that are this MTA's own."""

    version: int
    actions: Actions
    steps: Steps
    unasked: Mapping[Command, str]
    macros: Mapping[str, str]
    tls: Mapping[str, str]
    auth: Mapping[str, str]


_TLS = {"{tls_version}": "TLSv1.3", "{cipher}": "TLS_AES_256_GCM_SHA384", "{cipher_bits}": "256"}
_AUTH = {"{auth_type}": "PLAIN"}

_SENDMAIL_MACROS = {
    Command.CONNECT: "j _ {daemon_name} {if_name} {if_addr}",
    Command.HELO: "{tls_version} {cipher} {cipher_bits} {cert_subject} {cert_issuer}",
    Command.MAIL: "i {auth_type} {auth_authen} {auth_ssf} {auth_author} {mail_mailer} {mail_host} {mail_addr}",
    Command.RCPT: "{rcpt_mailer} {rcpt_host} {rcpt_addr}",
    Command.END_OF_MESSAGE: "{msg_id}",
}
_SENDMAIL_VALUES = {
    "v": "8.17.1.9",
    "i": "4AMC0001000001",
    "{daemon_name}": "MTA-v4",
    "{if_name}": "mta.example",
    "{if_addr}": "192.0.2.25",
    "{mail_mailer}": "relay",
    "{rcpt_mailer}": "relay",
}

_POSTFIX = Offer(6, ALL_ACTIONS, ALL_STEPS, POSTFIX_MACROS, {}, _TLS, _AUTH)

OFFERS: Mapping[str, Offer] = {
    "postfix": _POSTFIX,
    "sendmail": Offer(
        6,
        ALL_ACTIONS,
        ALL_STEPS,
        _SENDMAIL_MACROS,
        _SENDMAIL_VALUES,
        {**_TLS, "{cert_subject}": "", "{cert_issuer}": ""},
        {**_AUTH, "{auth_ssf}": "0"},
    ),
    "v2": Offer(2, ALL_ACTIONS, Steps(0x7F), POSTFIX_MACROS, {}, _TLS, _AUTH),
}
