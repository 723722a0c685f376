"""What is wrong with the versions of a store, and how each is mended. For ``memfs fsck``.

Every file is read. Nothing is deleted: what is damaged is set aside, in ``.memfs/aside/``, where it
can be looked at. Used with the store's lock, or beside a mount without mending.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from functools import partial

from memfs.cube import layout
from memfs.errors import NotAllowed, VersionDamaged
from memfs.vault.aside import Aside
from memfs.vault.problem import Problem
from memfs.vault.store import Store
from memfs.vault.versions import records
from memfs.vault.versions.look import sha256_of
from memfs.vault.versions.making import UNSETTLED, complete, mark
from memfs.vault.versions.records import DESCRIPTION, ROOT, Version

AREA = "versions"


def problems(
    store: Store, *, live: bool = False, progress: Callable[[int], None] | None = None
) -> Iterator[Problem]:
    """Everything that is wrong with the versions.

    Args:
        live: whether a mount is at work on them: what is unfinished, or gone, is no problem then.
        progress: told how many versions were looked at.
    """
    aside, count = Aside(store), 0
    problem = partial(_problem, store, aside)
    for cube_id in records.names_in(store, ROOT):
        base = f"{ROOT}/{cube_id}"
        if cube_id == UNSETTLED:
            continue
        if not records.is_cube_id(cube_id) or not stat.S_ISDIR(store.stat(base).st_mode):
            yield problem(base, "is no directory of a cube's versions")
            continue
        for name in records.names_in(store, base):
            path = f"{base}/{name}"
            if layout.is_temporary(name):
                if not live:
                    yield problem(path, "is a version that was never finished")
            elif not records.is_stamp(name):
                yield problem(path, "has not the name of a version")
            else:
                yield from _in_version(store, aside, cube_id, name, live=live)
            count += 1
            if progress:
                progress(count)


def _in_version(
    store: Store, aside: Aside, cube_id: str, stamp: str, *, live: bool
) -> Iterator[Problem]:
    path = records.directory(cube_id, stamp)
    damage = damage_of(store, cube_id, stamp)
    if damage is not None:
        if not (live and _is_gone(store, path)):
            yield _problem(store, aside, path, damage)
        return
    if live:
        return
    for left in _leftovers(store, path):
        yield _problem(store, aside, left, "is what was left of a copy that was never finished")
    if moved := _moved_on(store, cube_id, stamp):
        mend = partial(_complete, store, cube_id, stamp)
        yield Problem(AREA, path, f"{moved} was changed before it was copied", mend)


def _problem(store: Store, aside: Aside, path: str, what: str) -> Problem:
    return Problem(AREA, path, what, partial(_set_aside, store, aside, path))


def damage_of(store: Store, cube_id: str, stamp: str) -> str | None:
    """What is wrong with one version; None where it is whole."""
    try:
        version = records.read(store, cube_id, stamp)
        found = _files_in(store, version.directory)
    except VersionDamaged as e:
        return e.detail
    except (OSError, NotAllowed) as e:
        return f"cannot be read: {e}"
    wanted = {name for name, entry in version.files.items() if entry.kept}
    # One that is not kept may still be there: it goes once that is written down.
    for what, names in (("lacks", wanted - found), ("has a foreign", found - {*version.files})):
        if names:
            return f"{what} {min(names)}"
    for name in sorted(wanted):
        damage = _damage_in(store, version, name)
        if damage is not None:
            return damage
    return None


def _damage_in(store: Store, version: Version, name: str) -> str | None:
    entry = version.files[name]
    try:
        fd = store.open_regular(f"{version.directory}/{name}")
    except (OSError, NotAllowed) as e:
        return f"{name} cannot be read: {e}"
    try:
        if entry.linked:
            return None  # it is the cube's own still, which may be changed
        found = os.fstat(fd)
        if found.st_size != entry.size:
            return f"{name} has {found.st_size} bytes, and had {entry.size}"
        if entry.sha256 is None and found.st_mtime_ns != entry.mtime_ns:
            return f"{name} is not what it was: its time is another"
        if entry.sha256 is not None and sha256_of(fd) != entry.sha256:
            return f"{name} is not what it was: its SHA-256 is another"
    finally:
        os.close(fd)
    return None


def _files_in(store: Store, directory: str) -> set[str]:
    """The files of a version, by path within it, but for its description and temporary ones."""
    found = set()
    for name in records.names_in(store, directory):
        if name == layout.ADAPTER:
            inner = records.names_in(store, f"{directory}/{name}")
            found |= {f"{name}/{file}" for file in inner if not layout.is_temporary(file)}
        elif name != DESCRIPTION and not layout.is_temporary(name):
            found.add(name)
    return found


def _leftovers(store: Store, directory: str) -> list[str]:
    """Temporary files in a version, by path."""
    holders = (directory, f"{directory}/{layout.ADAPTER}")
    names = [f"{holder}/{name}" for holder in holders for name in records.names_in(store, holder)]
    return [path for path in names if layout.is_temporary(layout.split(path)[1])]


def _moved_on(store: Store, cube_id: str, stamp: str) -> str | None:
    """A file that a version shares with the cube, and that was changed since."""
    version = records.read(store, cube_id, stamp)
    for name, entry in version.files.items():
        if entry.kept and entry.linked:
            found = store.stat(f"{version.directory}/{name}")
            if (found.st_size, found.st_mtime_ns) != (entry.size, entry.mtime_ns):
                return name
    return None


def _complete(store: Store, cube_id: str, stamp: str) -> str:
    complete(store, cube_id, stamp)
    mark(store)
    return "the version says that it is not kept"


def _set_aside(store: Store, aside: Aside, path: str) -> str:
    mark(store)  # so that the next mount looks whether the cube needs a version now
    return f"set aside in {aside.put(path)}"


def _is_gone(store: Store, path: str) -> bool:
    try:
        store.stat(path)
    except FileNotFoundError:
        return True
    return False
