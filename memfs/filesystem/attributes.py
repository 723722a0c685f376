"""The status of a file that memfs makes up or alters. Used by the tree; immutable, any thread."""

from __future__ import annotations

import ctypes
import os
import stat
from dataclasses import dataclass, fields
from typing import Any

ATTRIBUTE_SECONDS = 0.02
"""For how long the kernel believes what it was told of a file, where it has it open."""


@dataclass(frozen=True, slots=True)
class Attributes:
    """The fields of ``os.stat_result`` that a mount answers with, by the same names."""

    st_mode: int
    st_ino: int
    st_nlink: int = 1
    st_uid: int = 0
    st_gid: int = 0
    st_rdev: int = 0
    st_size: int = 0
    st_blksize: int = 4096
    st_blocks: int = 0
    st_atime_ns: int = 0
    st_mtime_ns: int = 0
    st_ctime_ns: int = 0


Status = os.stat_result | Attributes

_FIELDS = tuple(field.name for field in fields(Attributes))


def altered(found: Status, **changes: int) -> Attributes:
    """``found`` with some fields changed."""
    return Attributes(**({name: getattr(found, name) for name in _FIELDS} | changes))


def shown_as(found: Status, size: int) -> Attributes:
    """``found`` for a file that reads as ``size`` bytes, whatever its length is on disk.

    It takes the room that it takes, for ``du``; but never so little that it seems to have holes.
    """
    return altered(found, st_size=size, st_blocks=max(found.st_blocks, (size + 511) // 512))


def regular(mode: int, ino: int, size: int, seconds: float = 0.0) -> Attributes:
    """An ordinary file of root's that stands nowhere on disk."""
    when = int(seconds * 1e9)
    return Attributes(
        st_mode=stat.S_IFREG | mode,
        st_ino=ino,
        st_size=size,
        st_blocks=(size + 511) // 512,
        st_atime_ns=when,
        st_mtime_ns=when,
        st_ctime_ns=when,
    )


def fill(buffer: Any, found: Status) -> None:
    """Writes a status into the ``struct stat`` that a ctypes pointer leads to."""
    status = buffer.contents
    ctypes.memset(buffer, 0, ctypes.sizeof(status))
    status.st_mode = found.st_mode
    status.st_ino = found.st_ino
    status.st_nlink = found.st_nlink
    status.st_uid = found.st_uid
    status.st_gid = found.st_gid
    status.st_rdev = found.st_rdev
    status.st_size = found.st_size
    status.st_blksize = found.st_blksize
    status.st_blocks = found.st_blocks
    for name, nanoseconds in (
        ("st_atimespec", found.st_atime_ns),
        ("st_mtimespec", found.st_mtime_ns),
        ("st_ctimespec", found.st_ctime_ns),
    ):
        when = getattr(status, name)
        when.tv_sec, when.tv_nsec = divmod(nanoseconds, 10**9)
