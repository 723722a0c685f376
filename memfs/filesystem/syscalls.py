"""System calls that Python does not offer as they are. Used by ``backing``; any thread.

``os.utime`` cannot leave one time alone or take the kernel's own clock, ``posix_fallocate`` has no
mode, and there is no ``os.syncfs``. (Renaming with flags is in ``memfs.vault.rename``.)
"""

from __future__ import annotations

import ctypes
import os
from typing import Any

UTIME_NOW = (1 << 30) - 1
UTIME_OMIT = (1 << 30) - 2

AT_SYMLINK_NOFOLLOW = 0x100

Time = tuple[int, int]
"""Seconds and nanoseconds; the nanoseconds may be UTIME_NOW or UTIME_OMIT."""


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


_libc = ctypes.CDLL(None, use_errno=True)
_libc.utimensat.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int)
_fallocate = getattr(_libc, "fallocate64", None) or _libc.fallocate
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def utimensat(directory: int, name: str, accessed: Time, modified: Time) -> None:
    """Sets both times of a file, of a symlink itself where it is one."""
    times = (_Timespec * 2)(_Timespec(*accessed), _Timespec(*modified))
    encoded = os.fsencode(name)
    _check(_libc.utimensat(directory, encoded, ctypes.byref(times), AT_SYMLINK_NOFOLLOW), name)


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """Reserves, punches or zeroes space of an open file, as ``mode`` says."""
    _check(_fallocate(fd, mode, offset, length), "")


def syncfs(fd: int) -> None:
    """Flushes the whole filesystem that a file lies on."""
    _check(_libc.syncfs(fd), "")


def _check(result: Any, name: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), name)
