"""The past as files: a cube's ``.versions/``, and the whole store at a moment in ``.memfs/at/``.

Neither is listed, both can be opened, and nothing in them can be changed: it ends with EROFS, as
on a disk that is mounted read-only, whatever the modes say; so ``cp -a`` brings back the modes too.

| path | what it is |
| --- | --- |
| ``CUBE/.versions/TIME/`` | a version of the cube: its files as they were |
| ``.memfs/at/TIME/PATH/`` | the cube that was at that path when that time ended, deleted or not |

A version may be read by those who may read the cube now and could read it then: owner, group and
mode are today's, less what was not given then. Through ``at`` a cube can be reached by a path that
is not its own any more, so the way to where it is now is checked for the caller as well. Where a
cube is gone, the modes that were recorded count. Used by the tree; any thread.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

import xxhash

from memfs.cube import layout
from memfs.cube.access import READ, SEARCH, Caller, allowed
from memfs.errors import VersionDamaged
from memfs.filesystem.attributes import Attributes, Status
from memfs.filesystem.catalogue import Catalogue
from memfs.filesystem.context import Context
from memfs.filesystem.handles import Handle, OpenFile, Snapshot
from memfs.filesystem.moments import Moment, Moments
from memfs.operation.moment import end_of
from memfs.vault import versions
from memfs.vault.versions import DESCRIPTION, Entry, Version

_KEPT = 1024

Rights = tuple[int, int, int]
"""Owner, group and permission bits."""


@dataclass(frozen=True)
class Node:
    """A file or directory of the past."""

    status: Attributes
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

    def open_directory(self, path: str) -> Handle:
        """Opens a directory."""
        self._node(path)
        return PastDirectory(path, self)

    def deleted(self) -> list[tuple[Version, str | None]]:
        """The ends of deleted cubes that the caller may know of, each with its last version."""
        found = []
        for cube_id in versions.cube_ids(self._store):
            newest = self._catalogue.history.newest(cube_id)
            if newest is not None and newest.deleted and self._may_read(newest):
                before = [s for s in versions.stamps(self._store, cube_id) if s < newest.stamp]
                found.append((newest, before[-1] if before else None))
        return sorted(found, key=lambda item: item[0].stamp)

    # Finding

    def _node(self, path: str) -> Node:
        if path == layout.AT:
            return Node(_directory(path, (0, 0, 0o555), self._catalogue.history.started))
        if path.startswith(layout.AT + "/"):
            return self._at(path, *path[len(layout.AT) + 1 :].split("/"))
        _, cube = layout.classify(path)
        rest = [part for part in path[len(cube) :].split("/") if part][1:]
        return self._of_cube(path, cube, rest)

    def _of_cube(self, path: str, cube: str, rest: list[str]) -> Node:
        """In a living cube's ``.versions/``."""
        facts = self._catalogue.facts(cube)
        stamps = versions.stamps(self._store, facts.id) if facts and facts.id else []
        if facts is None or facts.id is None or (rest and rest[0] not in stamps):
            raise _missing(path)
        if not rest:
            now = _rights(self._store.stat(cube))
            when = versions.moment_of(stamps[-1]).timestamp() if stamps else 0.0
            listed = tuple((stamp, stat.S_IFDIR) for stamp in stamps)
            return Node(_directory(path, now, when), listed)
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
            live = newest.path if newest is not None and not newest.deleted else ""
            node = self._in_version(path, version, live, below)
            children = moment.children(inner) if not below else ()
            if not children:
                return node
            listed = dict.fromkeys(children, stat.S_IFDIR) | dict(node.entries)
            return Node(node.status, tuple(sorted(listed.items())))
        if not moment.is_collection(inner):
            raise _missing(path)
        listed = dict.fromkeys(moment.children(inner), stat.S_IFDIR)
        rights = self._collection(moment, inner)
        when = versions.moment_of(moment.stamp).timestamp()
        return Node(_directory(path, rights, when), tuple(sorted(listed.items())))

    def _in_version(self, path: str, version: Version, live: str, rest: list[str]) -> Node:
        """A version's directory, or something in it; ``live`` is where the cube is now, or ""."""
        when = versions.moment_of(version.stamp).timestamp()
        kept = {name: entry for name, entry in version.files.items() if entry.kept}
        name = "/".join(rest)
        if name in kept:
            now = self._now(live, name) or (kept[name].uid, kept[name].gid, kept[name].mode)
            stored = f"{version.directory}/{name}"
            return Node(_file(path, kept[name], now), stored=stored)
        directory = _both(version.parents[-1], self._now(live, "") or version.parents[-1])
        if name == DESCRIPTION:
            stored = f"{version.directory}/{DESCRIPTION}"
            data = self._store.read(stored, versions.MAX_DESCRIPTION)
            mode = directory[2] & 0o666
            size = Entry(len(data), int(when * 1e9), *directory[:2], mode)
            return Node(_file(path, size, (*directory[:2], mode)), data=data)
        holders = {layout.split(file)[0] for file in version.files} - {""}
        if name and name not in holders:
            raise _missing(path)
        inside = [file for file in kept if layout.split(file)[0] == name]
        listed = [(layout.split(file)[1], stat.S_IFREG) for file in inside]
        if not name:
            listed += [(holder, stat.S_IFDIR) for holder in holders]
        return Node(_directory(path, directory, when), tuple(sorted(listed)))

    def _version(self, cube_id: str, stamp: str) -> Version:
        key = (cube_id, stamp)
        if key not in self._read:
            if len(self._read) >= _KEPT:
                self._read.clear()
            try:
                self._read[key] = versions.read(self._store, cube_id, stamp)
            except VersionDamaged as e:
                raise OSError(errno.EIO, str(e)) from e
        return self._read[key]

    # Rights

    def _now(self, cube: str, name: str) -> Rights | None:
        """The rights of a living cube's file, of its text where it has no such file any more."""
        wanted = (name, layout.PAYLOAD, "") if name else ("",)
        for candidate in wanted if cube else ():
            try:
                found = self._store.stat(f"{cube}/{candidate}".rstrip("/"))
            except (FileNotFoundError, NotADirectoryError):
                continue
            return _rights(found)
        return None

    def _collection(self, moment: Moment, path: str) -> Rights:
        """A directory that stands still has today's rights, less what was not given then."""
        then = moment.rights(path)
        try:
            found = self._store.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            return then
        return _both(then, _rights(found))

    def _may_read(self, version: Version) -> bool:
        """Whether the caller could read the cube where it is now; if it is gone, where it was."""
        context = self._context()
        if context.uid in (0, os.geteuid()):
            return True
        caller = Caller.of(context.uid, context.gid)
        newest = self._catalogue.history.newest(version.cube_id)
        if newest is None or newest.deleted:
            return all(_allows(caller, rights, SEARCH) for rights in version.parents)
        parts = newest.path.split("/")
        try:
            above = ["", *("/".join(parts[: i + 1]) for i in range(len(parts)))]
            if not all(allowed(caller, self._store.stat(path), SEARCH) for path in above):
                return False
            rights = self._now(newest.path, layout.PAYLOAD)
        except OSError:
            return False
        return rights is not None and _allows(caller, rights, READ)


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


def _both(then: Rights, now: Rights) -> Rights:
    """Today's rights, less what was not given then. Another group was everybody else."""
    mode = then[2] & now[2]
    if then[1] != now[1]:
        mode &= ~0o070 & ~(~then[2] >> 3 & 0o007)
    return now[0], now[1], mode


def _rights(found: os.stat_result) -> Rights:
    return found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)


def _allows(caller: Caller, rights: Rights, wanted: int) -> bool:
    uid, gid, mode = rights
    return allowed(caller, os.stat_result((mode, 0, 0, 1, uid, gid, 0, 0, 0, 0)), wanted)


def _directory(path: str, rights: Rights, seconds: float) -> Attributes:
    uid, gid, mode = rights
    when = int(seconds * 1e9)
    return Attributes(
        st_mode=stat.S_IFDIR | mode,
        st_ino=_inode(path),
        st_nlink=2,
        st_uid=uid,
        st_gid=gid,
        st_atime_ns=when,
        st_mtime_ns=when,
        st_ctime_ns=when,
    )


def _file(path: str, entry: Entry, now: Rights) -> Attributes:
    uid, gid, mode = _both((entry.uid, entry.gid, entry.mode), now)
    return Attributes(
        st_mode=stat.S_IFREG | mode,
        st_ino=_inode(path),
        st_uid=uid,
        st_gid=gid,
        st_size=entry.size,
        st_blocks=(entry.size + 511) // 512,
        st_atime_ns=entry.mtime_ns,
        st_mtime_ns=entry.mtime_ns,
        st_ctime_ns=entry.mtime_ns,
    )


def _inode(path: str) -> int:
    """A number of its own for a path of the past, apart from those of the store's disk."""
    return xxhash.xxh3_64_intdigest(os.fsencode(path)) | 1 << 63
