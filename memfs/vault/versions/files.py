"""The files of a version: shared with the previous one, cloned, linked or copied.

Used by ``making``, and by the mount to clear up; one thread at a time for each cube.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
from dataclasses import replace

from memfs.cube import layout
from memfs.vault.store import Store, open_regular_at
from memfs.vault.versions.look import entry_of, sha256_of
from memfs.vault.versions.records import LARGE, Entry, Version, names_in

NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC

_FICLONE = 0x40049409
_CANNOT_CLONE = (errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS)
_BLOCK = 1 << 20


class Unfinished(Exception):
    """A large file can be neither shared nor linked: it has to be copied, which takes a while."""


def keep(
    store: Store,
    temporary: int,
    cube: str,
    name: str,
    entry: Entry,
    previous: Version | None,
    budget: int,
    patient: bool,
) -> Entry:
    """Puts a file of the cube into a version that is being made; how it is described there."""
    if not entry.kept:
        return entry
    holder, _ = layout.split(name)
    if holder:
        with contextlib.suppress(FileExistsError):
            os.mkdir(holder, 0o700, dir_fd=temporary)
    linked = _linked(store, temporary, name, entry, previous)
    if linked is not None:
        return linked
    source = store.open_regular(layout.join(cube, name))
    try:
        found = os.fstat(source)
        large = bool(holder) and found.st_size >= LARGE
        entry = replace(entry_of(source, None), large=large)
        target = os.open(name, NEW, 0o600, dir_fd=temporary)
        try:
            if not _clone(source, target):
                if found.st_size > budget:
                    os.unlink(name, dir_fd=temporary)
                    return replace(entry, kept=False)
                if large and not patient:
                    os.unlink(name, dir_fd=temporary)
                    _link_own(store, temporary, cube, name)
                    return replace(entry, linked=True)
                _copy(source, target)
                if large and _has_changed(source, found):
                    raise OSError(errno.EAGAIN, "it was changed while it was copied", name)
            if patient or not large:
                entry = replace(entry, sha256=sha256_of(target), size=os.fstat(target).st_size)
            _dress(target, found)
        finally:
            os.close(target)
    finally:
        os.close(source)
    return entry


def _linked(
    store: Store, temporary: int, name: str, entry: Entry, previous: Version | None
) -> Entry | None:
    """Gives the previous version's file a second name, where it holds the same."""
    known = previous.files.get(name) if previous else None
    if previous is None or known is None or not known.kept or known.content != entry.content:
        return None
    try:
        _link(store, previous.directory, name, temporary, name)
    except OSError:  # no hard links, too many of them, or the version was removed just now
        return None
    return replace(entry, linked=known.linked, sha256=known.sha256)


def _link_own(store: Store, temporary: int, cube: str, name: str) -> None:
    try:
        _link(store, cube, name, temporary, name)
    except FileNotFoundError:
        raise
    except OSError as e:
        raise Unfinished from e


def _link(store: Store, holder: str, name: str, directory: int, new: str) -> None:
    parent, last = layout.split(f"{holder}/{name}")
    with store.opened(parent) as source:
        os.link(last, new, src_dir_fd=source, dst_dir_fd=directory, follow_symlinks=False)


def completed(
    store: Store, directory: int, name: str, entry: Entry, previous: Version | None
) -> Entry:
    """A large file that was linked becomes the version's own, and gets its digest.

    One that was changed in place, beside the mount, before it was copied is not kept: it is for the
    caller to remove it once the version says so.
    """
    given_up = replace(entry, kept=False, linked=False)
    source = open_regular_at(directory, name)
    try:
        found = os.fstat(source)
        if (found.st_size, found.st_mtime_ns) != (entry.size, entry.mtime_ns):
            return given_up
        if not entry.linked:
            return replace(entry, sha256=sha256_of(source))
        holder, _ = layout.split(name)
        beside = layout.join(holder, layout.TEMPORARY + secrets.token_hex(8))
        known = previous.files.get(name) if previous else None
        own = known is not None and known.kept and not known.linked
        try:
            if previous and known and own and known.content == entry.content:
                _link(store, previous.directory, name, directory, beside)
                digest = known.sha256
            else:
                target = os.open(beside, NEW, 0o600, dir_fd=directory)
                try:
                    _copy(source, target)
                    if _has_changed(source, found):
                        return given_up
                    digest = sha256_of(target)
                    _dress(target, found)
                    os.fsync(target)
                finally:
                    os.close(target)
            os.rename(beside, name, src_dir_fd=directory, dst_dir_fd=directory)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(beside, dir_fd=directory)
    finally:
        os.close(source)
    return replace(entry, sha256=digest, linked=False)


def clear(store: Store, version: Version) -> None:
    """Removes from a version's directory what it does not keep, and what a kill left of copying."""
    adapter = f"{version.directory}/{layout.ADAPTER}"
    names = names_in(store, version.directory)
    names += [layout.join(layout.ADAPTER, name) for name in names_in(store, adapter)]
    with store.opened(version.directory) as directory:
        for name in names:
            entry = version.files.get(name)
            if layout.is_temporary(name) or (entry is not None and not entry.kept):
                os.unlink(name, dir_fd=directory)


def _dress(fd: int, found: os.stat_result) -> None:
    """The owner and the time of the file that it was taken of. Nobody else gets to it by its mode:
    who may read it is up to the mount.
    """
    if os.geteuid() == 0:
        os.fchown(fd, found.st_uid, found.st_gid)
    os.fchmod(fd, 0o400)
    os.utime(fd, ns=(found.st_atime_ns, found.st_mtime_ns))


def _clone(source: int, target: int) -> bool:
    """Lets a file share another's blocks; whether the disk can."""
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError as e:
        if e.errno not in _CANNOT_CLONE:
            raise
        return False
    return True


def _has_changed(fd: int, before: os.stat_result) -> bool:
    found = os.fstat(fd)
    return (found.st_size, found.st_mtime_ns) != (before.st_size, before.st_mtime_ns)


def _copy(source: int, target: int) -> None:
    offset = 0
    while done := os.sendfile(target, source, offset, _BLOCK):
        offset += done
