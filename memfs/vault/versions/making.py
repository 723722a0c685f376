"""Making versions: cheaply, whole or not at all, and never in the way of what is versioned.

What did not change is a second name (a hard link) of the previous version's file. New content
shares its blocks with the cube's file where the disk can do that (reflink, on btrfs and xfs) and is
copied elsewhere: the cube's own files may be changed in place, beside the mount, so a mere link
would change with them. An adapter's weights are large, and nobody is made to wait for their copy:
they are linked at once, and ``complete`` makes the copy and the digest. Only the process that holds
the store's lock makes versions, and one thread at a time those of one cube.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

from memfs.cube import layout
from memfs.vault.publish import publish_bytes, write_all
from memfs.vault.store import Store, give_to_owner
from memfs.vault.versions import records
from memfs.vault.versions.files import NEW, clear, completed, keep
from memfs.vault.versions.look import Present, content_of, event_for
from memfs.vault.versions.records import CHAIN, DESCRIPTION, Entry, Link, Parent, Version

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

UNSETTLED = "unsettled"
"""The name of the note beside the cubes' directories that says that a mount makes versions."""

Finish = Callable[[Version], None]


class Last(NamedTuple):
    """Rights of a cube whose text has just gone."""

    text: Parent
    parents: tuple[Parent, ...]
    """As in ``Version``."""


def make(
    store: Store,
    cube_id: str,
    present: Present,
    previous: Version | None,
    *,
    budget: int,
    patient: bool,
) -> Version | None:
    """Makes the version of what a cube holds now; None where that is what the newest one holds.

    Args:
        budget: bytes; a file that is larger, and would have to be copied, is described only.
        patient: whether a large file may be copied here and now.

    Raises:
        Unfinished: it would have to be, and may not.
        FileNotFoundError: the cube changed meanwhile, and is to be looked at again.
        OSError: it cannot be made, as the disk is full or the store cannot be written.
    """
    happened = event_for(previous, present)
    if happened is None:
        return None
    with _making(store, cube_id) as (temporary, finish):
        files = {}
        for name, entry in present.files.items():
            files[name] = keep(
                store, temporary, present.path, name, entry, previous, budget, patient
            )
        # What was copied counts, and not what was there when it was looked at.
        stamp = records.stamp_after(previous.stamp if previous else None)
        payload = files.get(layout.PAYLOAD)
        chain = previous.chain if previous else tuple(Link("", "", p) for p in present.payloads)
        own = Link(stamp, content_of(files, present.meaning), payload.sha256 if payload else None)
        version = Version(
            cube_id,
            stamp,
            present.path,
            happened[0],
            files,
            present.meaning,
            present.parents,
            happened[1],
            (*chain, own)[-CHAIN:],
        )
        finish(version)
    return version


def bury(store: Store, previous: Version, last: Last | None) -> Version:
    """Records that a cube is gone: a version without files. Raises OSError.

    Args:
        last: the rights that were seen last. Where its end was not seen, they may have become less
            than any version tells, and are taken to have been its owner's alone.
    """
    if last is None:
        then = previous.files.get(layout.PAYLOAD) or previous.parents[-1]
        last = Last(Parent(then.uid, then.gid, then.mode & 0o700), previous.parents)
    with _making(store, previous.cube_id) as (_, finish):
        stamp = records.stamp_after(previous.stamp)
        version = replace(
            previous,
            stamp=stamp,
            event=records.DELETED,
            files={},
            meaning=None,
            parents=last.parents,
            origin=None,
            last=last.text,
        )
        finish(version)
    return version


def complete(store: Store, cube_id: str, stamp: str) -> Version:
    """Copies and reads the large files of a version that were only linked.

    Raises VersionDamaged, or OSError where it cannot be done, or it is not there any more.
    """
    version = records.read(store, cube_id, stamp)
    if not is_wanting(version):
        return version
    before = [other for other in records.stamps(store, cube_id) if other < stamp]
    previous = records.newest(store, cube_id, before[-1]) if before else None
    files = dict(version.files)
    with store.opened(version.directory) as directory:
        for name, entry in version.files.items():
            if _is_wanting(entry):
                files[name] = completed(store, directory, name, entry, previous)
    version = replace(version, files=files)
    path = f"{version.directory}/{DESCRIPTION}"
    publish_bytes(store, path, _rendered(version), like=store.stat(path))
    clear(store, version)
    return version


def is_wanting(version: Version) -> bool:
    """Whether some of its files are still only linked, or were never read."""
    return any(map(_is_wanting, version.files.values()))


def _is_wanting(entry: Entry) -> bool:
    return entry.kept and (entry.linked or entry.sha256 is None)


def remove(store: Store, cube_id: str, stamp: str) -> None:
    """Removes a version; others have names of their own for the files that they share with it."""
    with store.opened(records.directory(cube_id)) as base:
        gone = layout.TEMPORARY + secrets.token_hex(8)
        os.rename(stamp, gone, src_dir_fd=base, dst_dir_fd=base)
        shutil.rmtree(gone, dir_fd=base)
        empty = not os.listdir(base)
    if empty:
        _remove_base(store, cube_id)


def take_over(store: Store, old_id: str, new_id: str) -> None:
    """A cube got another id where it stands: what is known of it goes with it.

    Of a cube that was made a moment ago, and has got its real header just now, nothing is: its one
    version differs from the next by nothing but the header that memfs gave it.
    """
    old = records.stamps(store, old_id)
    if len(old) == 1:
        remove(store, old_id, old[0])
        return
    source, target = store.open_dir(records.directory(old_id)), _base(store, new_id)
    taken = set(records.stamps(store, new_id))  # made within one microsecond: that one stays
    try:
        for stamp in old:
            if stamp not in taken:
                os.rename(stamp, stamp, src_dir_fd=source, dst_dir_fd=target)
    finally:
        os.close(source)
        os.close(target)
    _remove_base(store, old_id)


def _remove_base(store: Store, cube_id: str) -> None:
    """Removes the directory of a cube's versions, where it is empty."""
    with store.opened(records.ROOT) as versions, contextlib.suppress(OSError):
        os.rmdir(cube_id, dir_fd=versions)


def remove_leftovers(store: Store, cube_id: str, before: float) -> None:
    """Removes what was being made or removed before a time, when a process was killed."""
    with store.opened(records.directory(cube_id)) as base:
        for name in filter(layout.is_temporary, os.listdir(base)):
            if os.stat(name, dir_fd=base, follow_symlinks=False).st_ctime < before:
                shutil.rmtree(name, dir_fd=base)


def mark(store: Store) -> float | None:
    """Notes on the disk that versions are being made.

    Where that stood there already, a process was killed: then gives the time, in seconds since
    1970, until which all that it made was flushed to the disk.
    """
    base = _base(store)
    try:
        os.close(os.open(UNSETTLED, NEW, 0o600, dir_fd=base))
    except FileExistsError:
        return os.stat(UNSETTLED, dir_fd=base, follow_symlinks=False).st_mtime
    finally:
        os.close(base)
    return None


def mark_flushed(store: Store, seconds: float) -> None:
    """Notes that what was made before a time is on the disk."""
    base = _base(store)
    try:
        os.utime(UNSETTLED, (seconds, seconds), dir_fd=base, follow_symlinks=False)
    finally:
        os.close(base)


def unmark(store: Store) -> None:
    """Takes the note away: nothing is left to be done."""
    base = _base(store)
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(UNSETTLED, dir_fd=base)
    finally:
        os.close(base)


@contextlib.contextmanager
def _making(store: Store, cube_id: str) -> Iterator[tuple[int, Finish]]:
    """A new directory, and what gives it its name in the end; it is removed where that fails."""
    base = _base(store, cube_id)
    temporary = layout.TEMPORARY + secrets.token_hex(8)
    try:
        os.mkdir(temporary, 0o700, dir_fd=base)
        try:
            fd = os.open(temporary, _DIRECTORY, dir_fd=base)
            try:
                give_to_owner(store, fd)

                def finish(version: Version) -> None:
                    _describe(store, fd, version)
                    os.rename(temporary, version.stamp, src_dir_fd=base, dst_dir_fd=base)

                yield fd, finish
            finally:
                os.close(fd)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True, dir_fd=base)
            raise
    finally:
        os.close(base)


def _base(store: Store, cube_id: str = "") -> int:
    """The directory of a cube's versions, or of all, made where there is none."""
    path = records.directory(cube_id)
    try:
        return store.open_dir(path)
    except FileNotFoundError:
        pass
    above = store.open_dir(layout.CONTROL)
    for name in path.split("/")[1:]:
        try:
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, 0o700, dir_fd=above)
            fd = os.open(name, _DIRECTORY, dir_fd=above)
        finally:
            os.close(above)
        give_to_owner(store, fd)
        above = fd
    return above


def _describe(store: Store, directory: int, version: Version) -> None:
    fd = os.open(DESCRIPTION, NEW, 0o400, dir_fd=directory)
    try:
        give_to_owner(store, fd)
        write_all(fd, _rendered(version))
    finally:
        os.close(fd)


def _rendered(version: Version) -> bytes:
    return (json.dumps(version.to_json()) + "\n").encode()
