"""Staging: what is put together aside, in a directory that means nothing, and renamed into place.

A directory can be moved, and filled, only where its owner may write it. So one that is to be
read-only is writable until everything is where it belongs, and gets its mode by a descriptor that
was opened before: a name may be another directory's by then. Used by ``memfs load`` and
``memfs restore``, under the store's lock or through its mount; one thread.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Callable, Iterator

from memfs.cube import layout
from memfs.errors import NotAllowed
from memfs.vault.publish import dress, sync_directory
from memfs.vault.rename import RENAME_EXCHANGE, renameat2
from memfs.vault.store import Store, remove_tree
from memfs.vault.versions.records import Parent

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@contextlib.contextmanager
def incoming(store: Store, below: str) -> Iterator[str]:
    """The path of a directory to put cubes or files together in; what is left in it goes."""
    name = layout.INCOMING + secrets.token_hex(8)
    with store.opened(below) as parent:
        os.mkdir(name, 0o700, dir_fd=parent)
        try:
            yield layout.join(below, name)
        finally:
            with contextlib.suppress(OSError):  # else the next mount does it
                remove_tree(parent, name)


@contextlib.contextmanager
def way(
    store: Store, path: str, like: Callable[[str], Parent | None] = lambda _: None
) -> Iterator[None]:
    """Makes the collections above ``path`` that are missing; where the body raises, they go again.

    Args:
        like: whose rights a collection gets; None for those of any new directory.

    Raises NotAllowed where something above is not a directory.
    """
    parts = layout.split(path)[0].split("/")
    with contextlib.ExitStack() as made:
        for depth in range(len(parts)):
            above = "/".join(parts[: depth + 1])
            if above and not is_directory(store, above):
                made.enter_context(new_directory(store, above, like(above)))
        yield


@contextlib.contextmanager
def new_directory(store: Store, path: str, like: Parent | None = None) -> Iterator[int]:
    """Makes a directory, which its owner can write until the body ends; gives its descriptor.

    Where the body raises, it goes again, unless there is something in it.
    """
    parent, name = layout.split(path)
    with store.opened(parent) as directory:
        os.mkdir(name, 0o777 if like is None else 0o700, dir_fd=directory)
        try:
            fd = os.open(name, _DIRECTORY, dir_fd=directory)
            try:
                if like is not None:
                    acl = None if like.acl is None else bytes.fromhex(like.acl)
                    dress(fd, like.uid, like.gid, movable(like.mode), acl)
                sync_directory(fd)
                sync_directory(directory)
                try:
                    yield fd
                finally:
                    if like is not None:
                        close_up(fd, like.mode)
            finally:
                os.close(fd)
        except BaseException:
            with contextlib.suppress(OSError):
                os.rmdir(name, dir_fd=directory)
            raise


def put(store: Store, staged: str, path: str, *, exchange: bool = False) -> None:
    """Renames what was staged, and flushed, to its place; where that is asked, what was there to
    where this was staged."""
    (holder, name), (parent, last) = layout.split(staged), layout.split(path)
    with store.opened(holder) as source, store.opened(parent) as target:
        renameat2(source, name, target, last, RENAME_EXCHANGE if exchange else 0)
        sync_directory(target)


def movable(mode: int) -> int:
    """A directory's mode for as long as it has to be moved or filled."""
    return mode | stat.S_IRWXU


def close_up(fd: int, mode: int) -> None:
    """Gives a directory that was only ``movable`` the mode that it is to have."""
    if mode != movable(mode):
        with contextlib.suppress(PermissionError):  # a frozen cube takes none through its mount
            os.fchmod(fd, stat.S_IMODE(os.fstat(fd).st_mode) & (mode | ~stat.S_IRWXU))
            sync_directory(fd)


def is_directory(store: Store, path: str) -> bool:
    """Whether there is a directory. Raises NotAllowed where there is something else."""
    try:
        found = store.stat(path)
    except FileNotFoundError:
        return False
    if not stat.S_ISDIR(found.st_mode):
        raise NotAllowed(f"{path} is not a directory")
    return True
