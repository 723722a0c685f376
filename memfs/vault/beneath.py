"""Opening what lies below a directory in one system call, never through a symlink: ``openat2``.

Used by the store, which walks one directory at a time where there is no such call (Linux before
5.6, some sandboxes). Any thread.
"""

from __future__ import annotations

import ctypes
import errno
import os

_OPENAT2 = 437
"""Its number, the same on every machine."""
_RESOLVE = 0x02 | 0x04 | 0x08
"""RESOLVE_NO_MAGICLINKS, RESOLVE_NO_SYMLINKS, RESOLVE_BENEATH."""
_SIZE = 24

_How = ctypes.c_uint64 * 3
"""struct open_how: flags, mode, resolve."""

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.argtypes = (
    ctypes.c_long,
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.c_void_p,
    ctypes.c_size_t,
)
_syscall.restype = ctypes.c_long
_hows: dict[int, tuple[object, int]] = {}
"""The struct for each combination of flags, and its address."""


_FLAGS = (
    os.O_ACCMODE
    | os.O_TRUNC
    | os.O_APPEND
    | os.O_NONBLOCK
    | os.O_SYNC
    | os.O_DIRECT
    | os.O_NOATIME
    | os.O_NOFOLLOW
    | os.O_DIRECTORY
    | os.O_PATH
)
"""``open`` passes over what it does not know (and the kernel marks what it executes); this call
fails with it.
"""


def open_beneath(directory: int, path: str, flags: int) -> int:
    """A descriptor of what is at ``path``; a symlink anywhere in it gives ``ELOOP``.

    Args:
        path: relative, without NUL and ``..``.
        flags: as for ``open``; nothing is made.
    """
    known = _hows.get(flags)
    if known is None:
        how = _How(flags & _FLAGS | os.O_CLOEXEC, 0, _RESOLVE)
        known = _hows[flags] = (how, ctypes.addressof(how))
    while True:
        fd = int(_syscall(_OPENAT2, directory, os.fsencode(path), known[1], _SIZE))
        if fd >= 0:
            return fd
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number), path)


def _is_offered() -> bool:
    root = os.open("/", os.O_PATH | os.O_CLOEXEC)
    try:
        os.close(open_beneath(root, ".", os.O_PATH))
    except OSError:
        return False
    finally:
        os.close(root)
    return True


OFFERED = _is_offered()
"""Whether this machine has the call."""
