"""Publishing: a file appears whole or not at all, whenever the machine stops.

Written to a temporary name in the same directory, flushed to the disk, renamed over the old file,
and the directory flushed. A published file is always a new inode: what others have open or mapped
is never changed under them. Used by everything that writes into a store; any thread, any process.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import stat
from collections.abc import Iterator

from memfs.cube import layout
from memfs.errors import NotAllowed
from memfs.vault.rights import acl_bytes, write_acl
from memfs.vault.store import Store, remove_tree
from memfs.vault.xattrs import copy_own

Like = str | os.stat_result
"""A file of the store by its path, or a status."""


@contextlib.contextmanager
def publishing(
    store: Store, path: str, *, like: Like | None = None, replace: bool = True
) -> Iterator[tuple[int, str]]:
    """Gives ``(descriptor, a path that opens the same file)`` to write; published at the end.

    Args:
        like: owner, group, mode (its read and write bits) and access list of the new file: those
            that a file of the store has in the end. Without it they are what the kernel gives any
            new file.
        replace: whether a file that is there is replaced, which keeps the extended attributes that
            are its own; otherwise it is FileExistsError.

    The file is left out and removed where the body raises.
    """
    parent, name = layout.split(path)
    directory = store.open_dir(parent)
    temporary = layout.TEMPORARY + secrets.token_hex(8)
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        fd = os.open(temporary, flags, 0o600 if like else 0o666, dir_fd=directory)
        try:
            # Says that it is alive to remove_leftover, which may run in any process.
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield fd, f"/proc/self/fd/{fd}"
            if replace:
                copy_own(directory, name, fd)
            if like is not None:
                found, acl = _rights_of(store, like)
                dress(fd, found.st_uid, found.st_gid, found.st_mode & 0o666, acl)
            os.fsync(fd)
            if replace:
                os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
            else:
                _rename_to_free(directory, temporary, name)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary, dir_fd=directory)
            raise
        finally:
            os.close(fd)
        sync_directory(directory)
    finally:
        os.close(directory)


def publish_bytes(
    store: Store,
    path: str,
    data: bytes,
    *,
    like: Like | None = None,
    replace: bool = True,
) -> os.stat_result:
    """Publishes ``data`` at ``path``, as ``publishing`` does; the status of the new file."""
    kept = -1
    try:
        with publishing(store, path, like=like, replace=replace) as (fd, _):
            kept = os.dup(fd)  # asked after the rename, which changes the status
            write_all(fd, data)
        return os.fstat(kept)
    finally:
        if kept >= 0:
            os.close(kept)


def write_all(fd: int, data: bytes) -> None:
    """Writes all of ``data``, which one system call need not do."""
    left = memoryview(data)
    while left:
        left = left[os.write(fd, left) :]


def remove_leftover(store: Store, path: str, before: float) -> bool:
    """Removes a temporary file, or a directory of them, that a crash left; whether it did.

    Args:
        before: seconds since 1970; what is younger is left alone, as is a file being written.
    """
    parent, name = layout.split(path)
    try:
        if name.startswith(layout.INCOMING):
            return _remove_incoming(store, path, before)
        fd = store.open_regular(path)
    except (OSError, NotAllowed):
        return False
    try:
        if os.fstat(fd).st_mtime >= before:
            return False
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with store.opened(parent) as directory:
            os.unlink(name, dir_fd=directory)
    except OSError:  # being written, gone already, or on a store that we may not write
        return False
    finally:
        os.close(fd)
    return True


def _remove_incoming(store: Store, path: str, before: float) -> bool:
    """Whoever fills such a directory holds the store's lock, or writes through its mount: neither
    is there any more when a mount begins."""
    found = store.stat(path)
    if not stat.S_ISDIR(found.st_mode) or found.st_mtime >= before:
        return False
    parent, name = layout.split(path)
    with store.opened(parent) as directory:
        remove_tree(directory, name)
    return True


def _rename_to_free(directory: int, old: str, new: str) -> None:
    """Renames within an open directory, unless there is something of the new name."""
    try:
        os.link(old, new, src_dir_fd=directory, dst_dir_fd=directory)
    except OSError as e:
        if e.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        # No hard links here. Between these two a file may come and be replaced.
        with contextlib.suppress(FileNotFoundError):
            os.stat(new, dir_fd=directory, follow_symlinks=False)
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), new) from None
        os.rename(old, new, src_dir_fd=directory, dst_dir_fd=directory)
    else:
        os.unlink(old, dir_fd=directory)


def _rights_of(store: Store, like: Like) -> tuple[os.stat_result, bytes | None]:
    if not isinstance(like, str):
        return like, None
    found = store.stat(like)
    return found, acl_bytes(store, like) if stat.S_ISREG(found.st_mode) else None


def dress(fd: int, uid: int, gid: int, mode: int, acl: bytes | None) -> None:
    """Gives an open file or directory owner, group, mode and access list, as far as this process
    may: rights that the wanted group had go to no other group."""
    write_acl(fd, acl)  # also away with what the directory gives every new file
    found = os.fstat(fd)
    if (found.st_uid, found.st_gid) != (uid, gid):
        try:
            os.fchown(fd, uid, gid)
        except PermissionError:
            try:
                os.fchown(fd, -1, gid)
            except PermissionError:
                mode &= ~stat.S_IRWXG
    os.fchmod(fd, mode)


def sync_directory(fd: int) -> None:
    """Flushes the names in an open directory to the disk."""
    try:
        os.fsync(fd)
    except OSError as e:
        if e.errno != errno.EINVAL:  # a filesystem that has nothing to flush for a directory
            raise
