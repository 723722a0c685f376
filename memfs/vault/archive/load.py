"""Loading cubes from a checked archive: each is put together aside and appears whole.

All of an archive's files are first written into one directory of memfs's own in the collection that
they are loaded into, hashed again on the way and flushed; then each cube is renamed to its place. A
crash in between leaves whole cubes or none, and that directory, which the next mount removes. A
mounted store is written through its mount, which so learns of each cube as of any rename, and which
gives the caller's rights; one that is not mounted under its lock. Used by ``memfs load``; any
thread.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from memfs.cube import layout
from memfs.errors import BadArchive, InvalidRequest, NotAllowed, NotFound
from memfs.vault.archive.check import CHUNK, Checked, File
from memfs.vault.archive.contents import PackedCube, wrong_with
from memfs.vault.frozen import Frozen
from memfs.vault.publish import write_all
from memfs.vault.staging import close_up, incoming, movable, put, way
from memfs.vault.store import Store

_SLACK = 1 << 20
"""Bytes to be free beyond those of the files: directories take some."""


@dataclass(frozen=True)
class Place:
    """Where a cube goes."""

    cube: PackedCube
    path: str
    """In the store."""
    replaces: bool
    """Whether there is a cube of this name, which goes."""


def plan(
    store: Store, below: str, cubes: Sequence[PackedCube], *, name: str | None, force: bool
) -> list[Place]:
    """Where the cubes of an archive would go; nothing is changed.

    Args:
        below: the collection that they are loaded into.
        name: another name for the archive's only cube.
        force: whether a cube of the same name is replaced.

    Raises:
        InvalidRequest: a name is taken, or there are several cubes and one name.
        NotFound: there is no such collection.
        NotAllowed: what would be replaced is frozen, or no cube, or has others in it; or something
            on the way is not a directory.
        OSError: there is no room.
    """
    if name is not None:
        if len(cubes) != 1:
            raise InvalidRequest(f"one name for {len(cubes)} cubes: load them without --as")
        reason = wrong_with(name)
        if reason is not None:
            raise InvalidRequest(f"{name!r} {reason}")
    _require_collection(store, below)
    places = []
    for cube in cubes:
        path = layout.join(below, name or cube.path)
        _require_way(store, path)
        frozen = Frozen(store).over(path)
        if frozen is not None:
            raise NotAllowed(f"{frozen} is frozen")
        found = _status(store, path)
        if found is not None:
            if not force:
                raise InvalidRequest(
                    f"{path} is there already: --force replaces it, --as gives another name"
                )
            _require_replaceable(store, path, found)
        places.append(Place(cube, path, found is not None))
    room, needed = os.fstatvfs(store.fd), sum(cube.size for cube in cubes) + _SLACK
    if room.f_bavail * room.f_frsize < needed:
        raise OSError(errno.ENOSPC, f"{needed} bytes are needed", str(store.root))
    return places


def load(
    archive: int,
    checked: Checked,
    store: Store,
    below: str,
    places: Sequence[Place],
    progress: Callable[[int], None],
) -> None:
    """Puts the cubes of a checked archive into their places.

    Args:
        archive: the descriptor that was checked.
        progress: told of the bytes written so far.

    Raises:
        BadArchive: the file was changed after it was checked.
        InvalidRequest: a name was taken meanwhile.
        OSError: it cannot be written.

    Where it fails, what was not yet in its place is removed again.
    """
    writer = _Writer(archive, store, progress)
    with incoming(store, below) as aside:
        staged = [layout.join(aside, str(number)) for number in range(len(places))]
        for path, place in zip(staged, places, strict=True):
            writer.write(path, place.cube, checked.files[place.cube.path])
        _publish(store, staged, places)


class _Writer:
    """Writes cubes from an archive's bytes, each file hashed on its way."""

    def __init__(self, archive: int, store: Store, progress: Callable[[int], None]) -> None:
        self._archive = archive
        self._store = store
        self._progress = progress
        self._done = 0

    def write(self, path: str, cube: PackedCube, files: Sequence[File]) -> None:
        """A cube's whole directory, flushed, with the modes and times that it had."""
        named = {file.entry.name: file for file in files}
        for entry in cube.entries:
            parent, name = layout.split(layout.join(path, entry.name) if entry.name else path)
            with self._store.opened(parent) as directory:
                if entry.size is None:
                    os.mkdir(name, 0o700, dir_fd=directory)
                else:
                    self._file(directory, name, named[entry.name])
        for entry in reversed(cube.entries):  # what is in a directory before its own time and mode
            if entry.size is None:
                inner = layout.join(path, entry.name) if entry.name else path
                with self._store.opened(inner) as directory:
                    os.fchmod(directory, entry.mode if entry.name else movable(entry.mode))
                    os.utime(directory, ns=(entry.mtime_ns, entry.mtime_ns))
                    os.fsync(directory)

    def _file(self, directory: int, name: str, file: File) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        size, digest, done = file.entry.size or 0, hashlib.sha256(), 0
        fd = os.open(name, flags, 0o600, dir_fd=directory)
        try:
            while done < size:
                part = os.pread(self._archive, min(CHUNK, size - done), file.offset + done)
                if not part:
                    break
                digest.update(part)
                write_all(fd, part)
                done += len(part)
                self._done += len(part)
                self._progress(self._done)
            if digest.hexdigest() != file.sha256:
                raise BadArchive(f"{file.entry.name!r} was changed while it was loaded")
            os.fchmod(fd, file.entry.mode)
            os.utime(fd, ns=(file.entry.mtime_ns, file.entry.mtime_ns))
            os.fsync(fd)
        finally:
            os.close(fd)


def _publish(store: Store, staged: Sequence[str], places: Sequence[Place]) -> None:
    """Renames cubes to their places; each gets its own mode when those that lie in it are there."""
    moved: list[tuple[Place, int]] = []
    try:
        for path, place in zip(staged, places, strict=True):
            while moved and not place.path.startswith(f"{moved[-1][0].path}/"):
                _close(*moved.pop())
            mode = place.cube.entries[0].mode
            if mode != movable(mode):
                moved.append((place, store.open_dir(path)))
            with way(store, place.path):
                _exchange(store, path, place) if place.replaces else _put(store, path, place)
    finally:
        while moved:
            _close(*moved.pop())


def _close(place: Place, fd: int) -> None:
    try:
        close_up(fd, place.cube.entries[0].mode)
    finally:
        os.close(fd)


def _put(store: Store, staged: str, place: Place) -> None:
    try:
        put(store, staged, place.path)  # onto a directory with something in it, or a file, it fails
    except OSError as e:
        if e.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        raise InvalidRequest(f"{place.path} has come to be there meanwhile") from None


def _exchange(store: Store, staged: str, place: Place) -> None:
    with store.opened(place.path) as old:
        mode = stat.S_IMODE(os.fstat(old).st_mode)
        if mode != movable(mode):
            os.fchmod(old, movable(mode))
        try:
            put(store, staged, place.path, exchange=True)
        except BaseException:
            close_up(old, mode)
            raise


def _require_way(store: Store, path: str) -> None:
    """All that stands above a path is a directory."""
    above = layout.split(path)[0]
    if above:
        _require_way(store, above)
        found = _status(store, above)
        if found is not None and not stat.S_ISDIR(found.st_mode):
            raise NotAllowed(f"{above} is not a directory")


def _require_collection(store: Store, path: str) -> None:
    if layout.classify(path)[0] is layout.Role.CONTROL or layout.is_temporary(path):
        raise NotAllowed(f"{path} is memfs's own")
    try:
        with store.opened(path) as directory:
            names = os.listdir(directory)
    except FileNotFoundError:
        raise NotFound(f"{store.root}/{path}") from None
    if path and layout.is_cube(names):
        raise InvalidRequest(f"{path} is a cube: name the collection that it is in")


def _require_replaceable(store: Store, path: str, found: os.stat_result) -> None:
    """It is a cube and nothing more."""
    if not stat.S_ISDIR(found.st_mode):
        raise NotAllowed(f"{path} is not a cube, and is not replaced")
    below = {top: layout.is_cube(names) for top, names in store.walk(path)}
    if not below.pop(path, False):
        raise NotAllowed(f"{path} is not a cube, and is not replaced")
    inside = [top for top, is_cube in below.items() if is_cube]
    if inside:
        raise NotAllowed(f"{path} is not replaced: another cube is in it, {inside[0]}")


def _status(store: Store, path: str) -> os.stat_result | None:
    try:
        return store.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
