# SPDX-License-Identifier: GPL-3.0-or-later
"""The protocol's vocabulary: stages, actions, options and macros. Plain values, used by everyone.

Sources: libmilter's mfapi.h and mfdef.h for the numbers; libmilter's documentation of
``xxfi_negotiate`` and ``smfi_setsymlist``; Postfix's MILTER_README and Sendmail's cf/README
for the macros that each MTA sends when it is not asked for others.
"""

from collections.abc import Iterable
from enum import Enum, IntFlag

__all__ = ["Actions", "ProtocolOptions", "Stage"]


class Stage(Enum):
    """A stage of the conversation between an SMTP client and the MTA.

    >>> Stage.RCPT.decorator
    'on_rcpt'
    """

    CONNECT = 0
    HELO = 1
    MAIL = 2
    RCPT = 3
    DATA = 4
    HEADER = 5
    EOH = 6
    BODY = 7
    EOM = 8
    UNKNOWN = 9
    ABORT = 10
    CLOSE = 11
    NEGOTIATE = 12

    @property
    def decorator(self) -> str:
        """The name of the decorator of :class:`milter.Milter` that registers handlers of this stage."""
        return f"on_{self.name.lower()}"


class Actions(IntFlag):
    """What a filter may do at the end of a message (``SMFIF_*``).

    >>> Actions.ADD_HEADER | Actions.QUARANTINE
    <Actions.ADD_HEADER|QUARANTINE: 33>
    """

    NONE = 0
    ADD_HEADER = 0x01
    """Add and insert header fields."""
    REPLACE_BODY = 0x02
    ADD_RECIPIENT = 0x04
    """Add recipients without ESMTP parameters."""
    REMOVE_RECIPIENT = 0x08
    REPLACE_HEADER = 0x10
    """Change and delete header fields."""
    QUARANTINE = 0x20
    REPLACE_SENDER = 0x40
    ADD_RECIPIENT_EXT = 0x80
    """Add recipients with ESMTP parameters."""
    REQUEST_MACROS = 0x100
    """Say which macros are wanted. The library asks for this by itself."""
    ALL = 0x1FF


class ProtocolOptions(IntFlag):
    """What an MTA can leave out, or do besides (``SMFIP_*``).

    The library chooses these from the handlers that are registered: nobody has to set them.
    They can be read: in ``on_negotiate`` what the MTA offers, later what was agreed.
    """

    NONE = 0
    NO_CONNECT = 0x01
    NO_HELO = 0x02
    NO_MAIL = 0x04
    NO_RCPT = 0x08
    NO_BODY = 0x10
    NO_HEADER = 0x20
    NO_EOH = 0x40
    NOREPLY_HEADER = 0x80
    NO_UNKNOWN = 0x100
    NO_DATA = 0x200
    SKIP = 0x400
    """The MTA understands :attr:`Status.SKIP <milter.Status.SKIP>`."""
    REJECTED_RCPT = 0x800
    """The MTA shows recipients, too, that it refuses itself."""
    NOREPLY_CONNECT = 0x1000
    NOREPLY_HELO = 0x2000
    NOREPLY_MAIL = 0x4000
    NOREPLY_RCPT = 0x8000
    NOREPLY_DATA = 0x10000
    NOREPLY_UNKNOWN = 0x20000
    NOREPLY_EOH = 0x40000
    NOREPLY_BODY = 0x80000
    LEADING_SPACE = 0x100000
    """Header values come and go with the space after the colon."""


# The standard library remembers each combination of flags that it has once made. An MTA may offer any 32 bits.
_ALL_OPTIONS = (int(ProtocolOptions.LEADING_SPACE) << 1) - 1


def known_actions(bits: int) -> Actions:
    """Those of the bits that have a name here."""
    return Actions(bits & Actions.ALL)


def known_options(bits: int) -> ProtocolOptions:
    """Those of the bits that have a name here."""
    return ProtocolOptions(bits & _ALL_OPTIONS)


class MacroList(Enum):
    """The lists of macros that a filter can ask for, by libmilter's numbers (``SMFIM_*``)."""

    CONNECT = 0
    HELO = 1
    MAIL = 2
    RCPT = 3
    DATA = 4
    EOM = 5
    EOH = 6


# Which list brings a macro in time for the handlers of a stage. The MTAs have no list for
# headers and body; what is sent with DATA stays visible until the end of the message.
MACRO_LISTS = {
    Stage.CONNECT: MacroList.CONNECT,
    Stage.HELO: MacroList.HELO,
    Stage.MAIL: MacroList.MAIL,
    Stage.RCPT: MacroList.RCPT,
    Stage.DATA: MacroList.DATA,
    Stage.HEADER: MacroList.DATA,
    Stage.EOH: MacroList.EOH,
    Stage.BODY: MacroList.DATA,
    Stage.EOM: MacroList.EOM,
}

# What Postfix and Sendmail send unasked. A list that is asked for replaces these.
DEFAULT_MACROS = {
    MacroList.CONNECT: ("{daemon_name}", "{daemon_addr}", "v", "_", "{if_name}", "{if_addr}"),
    MacroList.HELO: ("{tls_version}", "{cipher}", "{cipher_bits}", "{cert_subject}", "{cert_issuer}"),
    MacroList.MAIL: (
        "i",
        "{auth_type}",
        "{auth_authen}",
        "{auth_ssf}",
        "{auth_author}",
        "{mail_mailer}",
        "{mail_host}",
        "{mail_addr}",
    ),
    MacroList.RCPT: ("i", "{rcpt_mailer}", "{rcpt_host}", "{rcpt_addr}"),
    MacroList.DATA: ("i",),
    MacroList.EOH: ("i",),
    MacroList.EOM: ("i", "{msg_id}"),
}

# Both MTAs define this one (the MTA's own name) from the first stage on. libmilter keeps the
# macros of the last message where an MTA has none to send, {auth_authen} among them; with
# this one in each list there is always something to send, and nothing is kept.
ALWAYS_DEFINED = "j"

CLIENT_MACROS = (
    "{client_addr}",
    "{client_connections}",
    "{client_name}",
    "{client_port}",
    "{client_ptr}",
    "{daemon_port}",
    "{nrcpts}",
)


def macro_name(name: str) -> str:
    """The form in which MTAs send a macro's name: one letter bare, longer names in braces.

    Wherever a filter or a test names a macro, it may write either form: this is the one rule for all of them.

    >>> macro_name("{i}"), macro_name("i"), macro_name("auth_authen")
    ('i', 'i', '{auth_authen}')

    Raises ``ValueError`` for a name that cannot be one.
    """
    if not isinstance(name, str):
        raise ValueError(f"the name of a macro is a str such as 'i' or '{{auth_authen}}', not {name!r}")
    inner = name[1:-1] if name.startswith("{") and name.endswith("}") else name
    if not inner or not all(33 <= ord(character) < 127 and character not in "{}," for character in inner):
        raise ValueError(f"{name!r} is not the name of a macro: write it as 'i' or '{{auth_authen}}'")
    return inner if len(inner) == 1 else f"{{{inner}}}"


def macro_request(macro_list: MacroList, names: Iterable[str]) -> tuple[str, ...]:
    """The whole list to ask for, so that asking for `names` loses none of the usual ones."""
    wanted = [ALWAYS_DEFINED, *DEFAULT_MACROS[macro_list], *map(macro_name, names)]
    return tuple(dict.fromkeys(wanted))


def known_macros(names: Iterable[str] = ()) -> tuple[str, ...]:
    """All macros that this library knows of, and `names`; libmilter itself cannot list what the MTA sent."""
    usual = [name for defaults in DEFAULT_MACROS.values() for name in defaults]
    return tuple(sorted({ALWAYS_DEFINED, *usual, *CLIENT_MACROS, *map(macro_name, names)}, key=_alphabetic))


def _alphabetic(name: str) -> tuple[bool, str]:
    return len(name) > 1, name
