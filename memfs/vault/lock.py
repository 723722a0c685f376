"""The lock of a store: one process at a time writes its index.

Taken by a mount for as long as it lives and by ``memfs index rebuild``. It is an ``flock``, so the
kernel gives it back when the holder ends, however it ends; a forked child keeps it.
"""

from __future__ import annotations

import fcntl
import os

from memfs.cube import layout
from memfs.errors import MountFailed
from memfs.vault.store import Store, give_to_owner, open_regular_at

_NAME = "lock"


class StoreLock:
    """A held lock; ``release`` (or the end of the process and its children) gives it back."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def release(self) -> None:
        """Closes our descriptor: a child forked meanwhile goes on holding the lock."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> StoreLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def lock(store: Store, holder: str = "") -> StoreLock:
    """Takes the lock of ``store`` or fails at once.

    Args:
        holder: what others are told, after the store's name: ``is mounted at /home/ann/mem``.

    Raises:
        MountFailed: another process holds it, with what that one said.
    """
    if not store.writable:
        # Its index is a private one in a temporary directory: there is nothing to fight over.
        return StoreLock(-1)
    with store.opened(layout.CONTROL) as control:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            fd = os.open(_NAME, flags, 0o600, dir_fd=control)
            give_to_owner(store, fd)
        except FileExistsError:
            fd = open_regular_at(control, _NAME, os.O_RDWR)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(fd, 0)
        os.pwrite(fd, os.fsencode(holder or f"is in use by process {os.getpid()}"), 0)
    except BlockingIOError:
        said = os.fsdecode(os.pread(fd, 4096, 0)).strip()
        os.close(fd)
        raise MountFailed(f"{store.root} {said or 'is in use by another process'}") from None
    except OSError:
        os.close(fd)
        raise
    return StoreLock(fd)
