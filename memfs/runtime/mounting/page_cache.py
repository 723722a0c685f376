"""What the kernel has of a file in its page cache: how much, and asking it to read ahead.

Blocking; the service's I/O threads. A file that is cut short meanwhile harms nothing: the mapping
that ``mincore`` needs is never touched.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os

import numpy as np

PROBES = 32
"""Places in a file."""

_libc = ctypes.CDLL(None, use_errno=True)


def cached_bytes(fd: int) -> int:
    """Bytes of an open file that are in memory.

    Of a file that this user neither owns nor may write, the kernel says that all are. Raises
    OSError where the file cannot be mapped.
    """
    size = os.fstat(fd).st_size
    if size == 0:
        return 0
    pages = np.zeros(-(-size // mmap.PAGESIZE), dtype=np.uint8)
    with mmap.mmap(fd, size, prot=mmap.PROT_READ, flags=mmap.MAP_SHARED) as mapped:
        start = np.frombuffer(mapped, dtype=np.uint8).ctypes.data
        address, length = ctypes.c_void_p(start), ctypes.c_size_t(size)
        if _libc.mincore(address, length, ctypes.c_void_p(pages.ctypes.data)):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
    return min(size, int((pages & 1).sum()) * mmap.PAGESIZE)


def missing_share(fd: int) -> float:
    """The share of an open file that is not in memory, asked at ``PROBES`` places: it takes tens of
    microseconds, where counting takes milliseconds.

    0 where the filesystem cannot say.
    """
    size, missing, byte = os.fstat(fd).st_size, 0, bytearray(1)
    for probe in range(PROBES):
        try:
            os.preadv(fd, [byte], size * probe // PROBES, os.RWF_NOWAIT)
        except BlockingIOError:
            missing += 1
        except OSError as e:
            if e.errno != errno.EOPNOTSUPP:
                raise
            return 0.0
    return missing / PROBES


def read_ahead(fd: int) -> None:
    """Asks the kernel to read an open file into memory; does not wait for all of it."""
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_WILLNEED)


def drop(fd: int) -> None:
    """Has the kernel forget an open file's pages, once they are on the disk."""
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
