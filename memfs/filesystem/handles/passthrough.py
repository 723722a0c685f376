"""Files of the store that the kernel reads by itself for those who have them open in the mount.

The kernel is told of an open file of ours by an ioctl on its connection to libfuse, and gives a
number, which the answer to an ``open`` then names. Used by ``modes``, which decides what is passed
through, under its lock; the connection is offered and declined by ``fuse`` as the mount begins.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import struct

log = logging.getLogger(__name__)

_BACKING_OPEN, _BACKING_CLOSE = 0x4010E501, 0x4004E502
"""FUSE_DEV_IOC_BACKING_OPEN and _CLOSE of linux/fuse.h."""
_MAP = struct.Struct("=iIQ")
"""struct fuse_backing_map: a descriptor, flags, padding."""


class Passed:
    """A file of the store that is passed through, for all who have one node of the mount open."""

    def __init__(self, number: int, file: tuple[int, int]) -> None:
        self.number = number
        self.file = file
        """Its device and inode."""
        self.users = 1


class Passthrough:
    """The kernel's end of one mount."""

    def __init__(self) -> None:
        self.reason = ""
        """Why nothing is passed through; "" where that is done, from the offer on."""
        self._connection = -1

    def offer(self, connection: int) -> None:
        """The kernel takes files; ``connection`` is libfuse's descriptor."""
        self._connection = connection

    def decline(self, reason: str) -> None:
        """It takes none, or no more."""
        self.reason = reason

    def begin(self, fd: int, file: tuple[int, int]) -> Passed | None:
        """Has a file that is open here passed through; None where that is not to be had."""
        if self.reason or self._connection < 0:
            return None
        try:
            backing = bytearray(_MAP.pack(fd, 0, 0))  # or Python would not give us the number
            return Passed(fcntl.ioctl(self._connection, _BACKING_OPEN, backing), file)
        except OSError as e:
            if e.errno == errno.ELOOP:
                self.decline("the store is on a filesystem that is stacked on another")
            elif e.errno == errno.EPERM:
                self.decline("only root may (CAP_SYS_ADMIN)")
            else:
                log.warning("a file is not passed through: %s", e.strerror)
            return None

    def end(self, passed: Passed) -> None:
        """The last who had it open has closed it."""
        number = bytearray(struct.pack("=I", passed.number))
        with contextlib.suppress(OSError):  # the mount has ended, and the kernel has let go
            fcntl.ioctl(self._connection, _BACKING_CLOSE, number)
