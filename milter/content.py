# SPDX-License-Identifier: GPL-3.0-or-later
"""What was gathered of a message while it arrived, until when it may be edited, and a file over it.

The content itself belongs to the shim: memory of which nobody in Python owns a byte, or a spool file. It is gone
when the handler has returned. Whoever reads of it gets a copy.
"""

import errno
import io
import os
from collections.abc import Iterable
from typing import Any, Protocol

from milter.errors import ContextError

__all__ = ["Content", "MemoryContent"]


class Content(Protocol):
    """What was gathered of a message: its header fields, then its body, as one run of bytes.

    The header area is ``name NUL value NUL name NUL value NUL …``, the strings as libmilter gave
    them, that is with LF where a field is folded. NUL cannot be in them: they are C strings.
    """

    @property
    def header_size(self) -> int:
        """The bytes of the header area."""
        ...

    @property
    def size(self) -> int:
        """The bytes of header area and body together."""
        ...

    def read(self, offset: int, size: int) -> bytes:
        """A copy of a part. Raises :class:`ContextError` when the handler is over and the memory is gone."""
        ...

    def spool_file(self) -> int | None:
        """A descriptor of the unlinked file in which header area and body lie; None when they lie in memory.

        A duplicate: the caller closes it. The file must stay as it is as long as anybody has it open.
        """
        ...


class Editable:
    """What a handler may change until it returns. An edit that nobody sends must not look like one."""

    __slots__ = ("_frozen",)
    _frozen: bool

    def _require_open(self) -> None:
        if self._frozen:
            raise ContextError(
                "this message can no longer be changed: its handler has returned, and its edits were made use of. "
                "Edit it before the handler returns"
            )


class MemoryContent:
    """A :class:`Content` of fields and a body that Python has: for trying a handler without an MTA.

    The values are what follows the colon, with its space:

    >>> from milter.addresses import Address
    >>> from milter.message import Message
    >>> content = MemoryContent([(b"Subject", b" hello")], b"Hi.\\r\\n")
    >>> message = Message(content, Address("ann@client.example"), [Address("bob@mta.example")])
    >>> message.headers["Subject"], message.body
    ('hello', b'Hi.\\r\\n')
    """

    __slots__ = ("_data", "header_size", "size")

    def __init__(self, fields: Iterable[tuple[bytes, bytes]], body: bytes = b"") -> None:
        area = b"".join(b"%b\0%b\0" % field for field in fields)
        self._data = area + body
        self.header_size = len(area)
        self.size = len(self._data)

    def read(self, offset: int, size: int) -> bytes:
        return self._data[offset : offset + size]

    def spool_file(self) -> int | None:
        return None


# ---- The message as a file ---------------------------------------------------------------------


def memory_file(head: bytes, body: bytes) -> io.BufferedReader:
    """A file over a message in memory."""
    return io.BufferedReader(_MessageFile(head, _MemoryBody(body)))


def spooled_file(head: bytes, descriptor: int, start: int, end: int) -> io.BufferedReader:
    """A file over a message whose body lies in a file, from `start` to `end`. It closes the descriptor."""
    return io.BufferedReader(_MessageFile(head, _SpooledBody(descriptor, start, end)), 1 << 16)


class _Body(Protocol):
    """A body to be read from anywhere. `read` gives at most `size` bytes; none only at the end."""

    size: int

    def read(self, offset: int, size: int) -> bytes: ...
    def close(self) -> None: ...


class _MemoryBody:
    def __init__(self, body: bytes) -> None:
        self._body = body
        self.size = len(body)

    def read(self, offset: int, size: int) -> bytes:
        return self._body[offset : offset + size]

    def close(self) -> None:
        self._body = b""


class _SpooledBody:
    """Read without the position of the file, which duplicates of the descriptor share."""

    def __init__(self, descriptor: int, start: int, end: int) -> None:
        self._descriptor = descriptor
        self._start = start
        self.size = end - start

    def read(self, offset: int, size: int) -> bytes:
        due = max(min(size, self.size - offset), 0)
        data = os.pread(self._descriptor, due, self._start + offset)
        if due and not data:
            raise OSError(errno.EIO, "the spool file of this message is shorter than the message")
        return data

    def close(self) -> None:
        os.close(self._descriptor)


class _MessageFile(io.RawIOBase):
    """The header fields and the body, one behind the other, as a file."""

    def __init__(self, head: bytes, body: _Body) -> None:
        self._head = head
        self._body = body
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        wanted, position = len(buffer), self._position
        if position < len(self._head):
            data = self._head[position : position + wanted]
        else:
            data = self._body.read(position - len(self._head), wanted)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: len(self._head) + self._body.size}[whence]
        if base + offset < 0:
            raise OSError(errno.EINVAL, "a position before the beginning of the message")
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def close(self) -> None:
        if not self.closed:
            self._body.close()
        super().close()
