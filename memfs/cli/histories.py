"""Cubes and their versions as the commands see them: through a mount, or in a store without one.

Through a mount a version is read as everybody reads it, in ``.versions/`` and ``.memfs/at/``, so
nobody is told more than the mount tells him. Used by ``versions``, ``diff`` and ``restore``.
"""

from __future__ import annotations

import contextlib
import json
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from memfs.cli import targets
from memfs.cube import layout, metadata
from memfs.errors import InvalidMetadata, NotACube, NotAllowed, NotFound, VersionDamaged
from memfs.operation.moment import end_of
from memfs.vault.identity import read_meta
from memfs.vault.store import Store
from memfs.vault.versions import records
from memfs.vault.versions.look import Present, look
from memfs.vault.versions.records import DESCRIPTION, Version
from memfs.vault.versions.restore import differing, unkept


@dataclass(frozen=True)
class History:
    """A cube that has versions."""

    store: Store
    """As its files are read and written: the mount, where there is one."""
    mounted: bool
    path: str
    cube_id: str
    lives: bool
    versions: list[Version]
    """Oldest first; those that are damaged left out."""

    def place(self, version: Version) -> str:
        """The directory of a version."""
        if not self.mounted:
            return version.directory
        if self.lives:
            return f"{self.path}/{layout.VERSIONS}/{version.stamp}"
        return f"{layout.AT}/{version.stamp}/{version.path}"

    def present(self) -> Present | None:
        """What the cube holds now."""
        return look(self.store, self.path, None)

    def version(self, text: str) -> Version:
        """The version of that name, or the last one up to the end of a time.

        Raises NotFound.
        """
        try:
            end = records.stamp_of(end_of(text))
        except ValueError as e:
            raise NotFound(str(e)) from None
        found = [v for v in self.versions if v.stamp <= end]
        if not found:
            raise NotFound(f"{self.path} has no version from before {text}")
        if found[-1].deleted:
            raise NotFound(f"{self.path} was deleted at {found[-1].stamp}")
        return found[-1]

    def before_now(self) -> Version:
        """The newest version that is another thing than the cube is now; if none is, the newest.

        Raises NotFound where there is none at all.
        """
        present = self.present()
        kept = [version for version in self.versions if not version.deleted]
        if not kept:
            raise NotFound(f"{self.path} has no versions")
        return next((v for v in reversed(kept) if self.differing(v, present)), kept[-1])

    def differing(self, version: Version, present: Present | None) -> list[str]:
        """The files in which a version is not what the cube holds now."""
        return differing(self.store, self.place(version), version, present)

    def unkept(self, version: Version) -> list[str]:
        """The files that a version would take the place of, and that the newest does not hold."""
        newest, present = self.versions[-1], self.present()
        names = self.differing(version, present)
        return unkept(self.store, self.place(newest), newest, present, self.path, names)


@contextlib.contextmanager
def opened(given: str) -> Iterator[History]:
    """The cube at a path, or that was there. Raises NotACube."""
    where = targets.place(given)
    mounted = where.mountpoint is not None
    with targets.open_store(where.store) as store:
        path = where.path
        if path and _is_file(store, path):  # a file of a cube names the cube
            path = _holder(path)
        if path and layout.is_cube(_names(store, path)):
            yield _living(store, path, mounted=mounted)
            return
        ended = [line for line in deleted(store, mounted=mounted) if line["path"] == where.path]
        if not ended:
            raise NotACube(f"{given}, nor was there lately")
        yield _ended(store, ended[-1], mounted=mounted)


def deleted(store: Store, *, mounted: bool) -> list[dict[str, Any]]:
    """The deleted cubes that can be brought back: see ``Past.deleted``."""
    if mounted:
        fd = store.open_regular(f"{layout.CONTROL}/deleted")
        with open(fd, encoding="ascii") as file:
            return [json.loads(line) for line in file]
    found = []
    for cube_id in records.cube_ids(store):
        known = _read(store, cube_id, records.stamps(store, cube_id))
        if known and known[-1].deleted:
            places = [(v.stamp, v.path) for v in known if not v.deleted]
            line = {"path": known[-1].path, "id": cube_id}
            found.append(line | {"deleted": known[-1].stamp, "versions": places})
    return sorted(found, key=lambda line: str(line["deleted"]))


def _living(store: Store, path: str, *, mounted: bool) -> History:
    try:
        cube_id = metadata.cube_id(read_meta(store, path))
    except (FileNotFoundError, InvalidMetadata, NotAllowed) as e:
        raise NotFound(f"{path}: nothing says which versions it has ({e})") from e
    if not mounted:
        found = _read(store, cube_id, records.stamps(store, cube_id))
    else:
        base = f"{path}/{layout.VERSIONS}"
        found = _described(store, cube_id, [(s, f"{base}/{s}") for s in _names(store, base)])
    return History(store, mounted, path, cube_id, True, found)


def _ended(store: Store, line: dict[str, Any], *, mounted: bool) -> History:
    cube_id = line["id"]
    if not mounted:
        found = _read(store, cube_id, records.stamps(store, cube_id))
    else:
        places = [(stamp, f"{layout.AT}/{stamp}/{path}") for stamp, path in line["versions"]]
        found = _described(store, cube_id, places)
        found.append(Version(cube_id, line["deleted"], line["path"], records.DELETED))
    return History(store, mounted, line["path"], cube_id, False, found)


def _read(store: Store, cube_id: str, stamps: list[str]) -> list[Version]:
    return _described(store, cube_id, [(s, records.directory(cube_id, s)) for s in stamps])


def _described(store: Store, cube_id: str, places: list[tuple[str, str]]) -> list[Version]:
    found = []
    for stamp, place in places:
        with contextlib.suppress(VersionDamaged, FileNotFoundError):
            raw = store.read(f"{place}/{DESCRIPTION}", records.MAX_DESCRIPTION)
            found.append(records.parse(cube_id, stamp, raw))
    return found


def _is_file(store: Store, path: str) -> bool:
    try:
        return not stat.S_ISDIR(store.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def _holder(path: str) -> str:
    """The cube that a file belongs to."""
    parent, _ = layout.split(path)
    above, name = layout.split(parent)
    return above if name == layout.ADAPTER else parent


def _names(store: Store, path: str) -> list[str]:
    try:
        return records.names_in(store, path)
    except PermissionError:
        return []
