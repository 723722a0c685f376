"""Renaming with the kernel's flags, which ``os.rename`` does not know.

Used by the mount and by what publishes whole directories; any thread.
"""

from __future__ import annotations

import ctypes
import os

RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2

_libc = ctypes.CDLL(None, use_errno=True)
_libc.renameat2.argtypes = (
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.c_uint,
)


def renameat2(old_dir: int, old: str, new_dir: int, new: str, flags: int) -> None:
    """Renames with RENAME_* flags, which the kernel applies at once."""
    if _libc.renameat2(old_dir, os.fsencode(old), new_dir, os.fsencode(new), flags) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), old)
