"""The past as files: a cube's ``.versions/``, and the whole store at a moment in ``.memfs/at/``.

Neither is listed, both can be opened, and nothing in them can be changed: it ends with EROFS, as
on a disk that is mounted read-only, whatever the modes say; so ``cp -a`` brings back the modes too.

| path | what it is |
| --- | --- |
| ``CUBE/.versions/TIME/`` | a version of the cube: its files as they were |
| ``.memfs/at/TIME/PATH/`` | the cube that was at that path when that time ended, deleted or not |

A version may be read by those who may read the cube now and could read it then (``rights``).
Through ``at`` a cube can be reached by a path that is not its own any more, so the way to where it
is now is checked for the caller as well. Where a cube is gone, the rights that it had in the end
take the place of today's. Used by the tree; any thread.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import xxhash

from memfs.cube import layout
from memfs.cube.acl import XATTR, Acl
from memfs.errors import VersionDamaged
from memfs.filesystem.attributes import Attributes, Status, altered
from memfs.filesystem.catalogue import Catalogue
from memfs.filesystem.context import Context
from memfs.filesystem.handles.handle import Handle, OpenFile, Snapshot
from memfs.filesystem.past.moments import Moments
from memfs.filesystem.past.rights import Rights, may_read
from memfs.operation.moment import end_of
from memfs.vault.versions import records
from memfs.vault.versions.records import DESCRIPTION, Version

_KEPT = 1024


@dataclass(frozen=True)
class Node:
    """A file or directory of the past."""

    status: Attributes
    acl: Acl
    entries: tuple[tuple[str, int], ...] = ()
    """Names and kinds of what is in a directory."""
    stored: str | None = None
    """Where in the store a file's bytes are."""
    data: bytes = b""
    """The bytes of a file that has no place of its own."""


class Past:
    """The read-only trees of one mount."""

    def __init__(self, catalogue: Catalogue, context: Callable[[], Context]) -> None:
        self._catalogue = catalogue
        self._store = catalogue.store
        self._context = context
        self._moments = Moments(catalogue)
        self._read: dict[tuple[str, str], Version] = {}

    def status(self, path: str) -> Status:
        """What ``stat`` answers. Raises FileNotFoundError, or PermissionError."""
        return self._node(path).status

    def entries(self, path: str) -> Iterator[tuple[str, int, int]]:
        """Name, kind and inode of what is in a directory."""
        node = self._node(path)
        yield ".", stat.S_IFDIR, node.status.st_ino
        yield "..", stat.S_IFDIR, _inode(layout.split(path)[0])
        for name, kind in node.entries:
            yield name, kind, _inode(f"{path}/{name}")

    def open(self, path: str, flags: int) -> Handle:
        """Opens a file to be read."""
        if flags & os.O_ACCMODE != os.O_RDONLY or flags & os.O_TRUNC:
            raise read_only(path)
        node = self._node(path)
        if node.stored is None:
            return Snapshot(path, node.data, node.status)
        return _OpenVersion(path, self._store.open_regular(node.stored), node.status)

    def getxattr(self, path: str, name: str) -> bytes:
        """The access list, which the kernel holds. ENODATA for any other attribute."""
        node = self._node(path)
        if name != XATTR or not node.acl.named:
            raise OSError(errno.ENODATA, os.strerror(errno.ENODATA), path)
        return node.acl.render()

    def open_directory(self, path: str) -> Handle:
        """Opens a directory."""
        self._node(path)
        return PastDirectory(path, self)

    def deleted(self) -> list[dict[str, Any]]:
        """The deleted cubes that the caller may know of, in the order of their ends.

        Each with its path, its id, when it was deleted, and its versions: where it was at which.
        """
        found = []
        for cube_id in records.cube_ids(self._store):
            newest = self._catalogue.history.newest(cube_id)
            if newest is None or not newest.deleted or not self._may_read(newest):
                continue
            places = []
            for stamp in records.stamps(self._store, cube_id):
                with contextlib.suppress(VersionDamaged):
                    version = records.read(self._store, cube_id, stamp)
                    if not version.deleted:
                        places.append((stamp, version.path))
            found.append(
                {"path": newest.path, "id": cube_id, "deleted": newest.stamp, "versions": places}
            )
        return sorted(found, key=lambda line: line["deleted"])

    # Finding

    def _node(self, path: str) -> Node:
        if path == layout.AT:
            rights = Rights(0, 0, Acl.of_mode(0o555))
            return _directory(path, rights, self._catalogue.history.started)
        if path.startswith(layout.AT + "/"):
            return self._at(path, *path[len(layout.AT) + 1 :].split("/"))
        _, cube = layout.classify(path)
        rest = [part for part in path[len(cube) :].split("/") if part][1:]
        return self._of_cube(path, cube, rest)

    def _of_cube(self, path: str, cube: str, rest: list[str]) -> Node:
        """In a living cube's ``.versions/``."""
        facts = self._catalogue.facts(cube)
        stamps = records.stamps(self._store, facts.id) if facts and facts.id else []
        if facts is None or facts.id is None or (rest and rest[0] not in stamps):
            raise _missing(path)
        if not rest:
            when = records.moment_of(stamps[-1]).timestamp() if stamps else 0.0
            listed = [(stamp, stat.S_IFDIR) for stamp in stamps]
            return _directory(path, Rights.of(self._store, cube), when, listed)
        return self._in_version(path, self._version(facts.id, rest[0]), cube, rest[1:])

    def _at(self, path: str, text: str, *rest: str) -> Node:
        """In the view of a moment."""
        try:
            end, now = end_of(text), datetime.now(UTC)
        except ValueError:
            raise _missing(path) from None
        moment = self._moments.at(min(end, now), over=end < now)
        inner = "/".join(rest)
        version, below = moment.find(inner)
        if version is not None:
            if not self._may_read(version):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
            newest = self._catalogue.history.newest(version.cube_id)
            node = self._in_version(path, version, newest or version, below)
            children = moment.children(inner) if not below else ()
            if not children:
                return node
            names = dict.fromkeys(children, stat.S_IFDIR) | dict(node.entries)
            return replace(node, entries=tuple(sorted(names.items())))
        if not moment.is_collection(inner):
            raise _missing(path)
        listed = [(name, stat.S_IFDIR) for name in sorted(moment.children(inner))]
        rights = Rights.recorded(moment.parent(inner)).and_now(self._store, inner)
        return _directory(path, rights, records.moment_of(moment.stamp).timestamp(), listed)

    def _in_version(self, path: str, version: Version, now: str | Version, rest: list[str]) -> Node:
        """A version's directory, or something in it.

        Args:
            now: where the cube is; where it may be gone, its newest version.
        """
        when = records.moment_of(version.stamp).timestamp()
        kept = {name: entry for name, entry in version.files.items() if entry.kept}
        name = "/".join(rest)
        if name in kept:
            rights = self._rights(version, name, now)
            stored = f"{version.directory}/{name}"
            return _file(path, rights, kept[name].size, kept[name].mtime_ns, stored=stored)
        if name == DESCRIPTION:  # it has the text's digest, and is for who may read that
            rights = self._rights(version, layout.PAYLOAD, now)
            data = self._store.read(f"{version.directory}/{name}", records.MAX_DESCRIPTION)
            return _file(path, rights, len(data), int(when * 1e9), data=data)
        rights = self._rights(version, "", now)
        holders = {layout.split(file)[0] for file in version.files} - {""}
        if name and name not in holders:
            raise _missing(path)
        inside = [file for file in kept if layout.split(file)[0] == name]
        listed = [(layout.split(file)[1], stat.S_IFREG) for file in inside]
        if not name:
            listed += [(holder, stat.S_IFDIR) for holder in holders]
        return _directory(path, rights, when, sorted(listed))

    def _rights(self, version: Version, name: str, now: str | Version) -> Rights:
        """Those of a file of a version; where it has no such file, those of its directory."""
        rights = Rights.recorded(version.files.get(name) or version.parents[-1])
        if isinstance(now, Version) and now.deleted:
            return rights.within(Rights.in_the_end(now, directory=not name))
        cube = now.path if isinstance(now, Version) else now
        return rights.and_now(self._store, *(_places(cube, name) if name else [cube]))

    def _may_read(self, version: Version) -> bool:
        context = self._context()
        if context.uid in (0, os.geteuid()):
            return True
        newest = self._catalogue.history.newest(version.cube_id)
        caller = context.caller()
        return may_read(self._store, caller, newest or version)

    def _version(self, cube_id: str, stamp: str) -> Version:
        key = (cube_id, stamp)
        if key not in self._read:
            if len(self._read) >= _KEPT:
                self._read.clear()
            try:
                self._read[key] = records.read(self._store, cube_id, stamp)
            except VersionDamaged as e:
                raise OSError(errno.EIO, str(e)) from e
        return self._read[key]


class PastDirectory(Handle):
    """A directory of the past."""

    def __init__(self, path: str, past: Past) -> None:
        super().__init__(path)
        self._past = past

    def entries(self) -> Iterator[tuple[str, int, int]]:
        """Name, kind and inode of each entry."""
        return self._past.entries(self.path or "")

    def fsync(self, *, data_only: bool) -> None:
        """It is never changed."""


class _OpenVersion(OpenFile):
    """A file of a version: the bytes are the store's, the status is the view's."""

    def __init__(self, path: str, fd: int, status: Status) -> None:
        super().__init__(path, fd)
        self._status = status

    def status(self) -> Status | None:
        return self._status


def read_only(path: str) -> OSError:
    """What every change of the past ends with."""
    return OSError(errno.EROFS, os.strerror(errno.EROFS), path)


def _missing(path: str) -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)


def _places(cube: str, name: str) -> tuple[str, ...]:
    """Whose rights are those of a file of a living cube: the first of them that is there.

    Without its text a cube's header still has the rights that the text had.
    """
    names = (name, layout.PAYLOAD, layout.META)
    return (*(layout.join(cube, each) for each in names), cube)


def _directory(
    path: str, rights: Rights, seconds: float, entries: Iterable[tuple[str, int]] = ()
) -> Node:
    status = _status(path, stat.S_IFDIR | rights.acl.mode, rights, 0, int(seconds * 1e9))
    return Node(altered(status, st_nlink=2), rights.acl, tuple(entries))


def _file(
    path: str,
    rights: Rights,
    size: int,
    mtime_ns: int,
    *,
    stored: str | None = None,
    data: bytes = b"",
) -> Node:
    mode = stat.S_IFREG | (rights.acl.mode & 0o666)
    return Node(_status(path, mode, rights, size, mtime_ns), rights.acl, (), stored, data)


def _status(path: str, mode: int, rights: Rights, size: int, when: int) -> Attributes:
    return Attributes(
        st_mode=mode,
        st_ino=_inode(path),
        st_uid=rights.uid,
        st_gid=rights.gid,
        st_size=size,
        st_blocks=(size + 511) // 512,
        st_atime_ns=when,
        st_mtime_ns=when,
        st_ctime_ns=when,
    )


def _inode(path: str) -> int:
    """A number of its own for a path of the past, apart from those of the store's disk."""
    return xxhash.xxh3_64_intdigest(os.fsencode(path)) | 1 << 63
