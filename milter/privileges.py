# SPDX-License-Identifier: GPL-3.0-or-later
"""Who the filter is: another user than the one that opened the socket."""

import grp
import os
import pwd
from dataclasses import dataclass

from milter.errors import MilterError

__all__ = ["Identity", "identity"]


@dataclass(frozen=True)
class Identity:
    """A user, with the group and the home that go with it."""

    name: str
    user: int
    group: int
    home: str

    def take_on(self) -> None:
        """Become this user for good; user and group, real, effective and saved. Raises :class:`MilterError`."""
        try:
            os.initgroups(self.name, self.group)
            os.setgid(self.group)
            os.setuid(self.user)
        except OSError as failure:
            raise MilterError(
                f"cannot become the user {self.name}: {failure.strerror}; only root may become another user"
            ) from failure
        if self.user != 0 and _is_root_again():  # pragma: no cover (setuid does what it says where tests run)
            raise MilterError(f"the process became the user {self.name}, but could become root again: not started")
        os.environ.update(HOME=self.home, USER=self.name, LOGNAME=self.name)


def identity(user: str | int, group: str | int | None) -> Identity:
    """The user of a name or number, with its own group, or the one given. Raises :class:`MilterError`."""
    try:
        entry = pwd.getpwuid(user) if isinstance(user, int) else pwd.getpwnam(user)
    except KeyError:
        raise MilterError(f"there is no user {user!r} to run as") from None
    return Identity(entry.pw_name, entry.pw_uid, entry.pw_gid if group is None else _group(group), entry.pw_dir)


def _group(group: str | int) -> int:
    if isinstance(group, int):
        return group
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        raise MilterError(f"there is no group {group!r} to run as") from None


def _is_root_again() -> bool:
    try:
        os.setuid(0)
    except OSError:
        return False
    return True
