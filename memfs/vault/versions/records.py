"""Versions: what a cube's memories were, kept in the store as ordinary files.

``.memfs/versions/<id of the cube>/<time>/`` holds ``payload.md``, ``meta.json`` and the files of
``adapter/`` as they were, and ``version.json``, which says of which path they are and proves them.
Everything that is known of a cube's past, where it was and when it was deleted included, is found
from these directories alone. A version appears whole, by a rename, and its files are never changed:
``making`` makes them, this module finds and reads them. Used by the mount, the commands and
the checks; any thread, any process.
"""

from __future__ import annotations

import json
import os
import re
import stat
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

from memfs.cube import layout
from memfs.errors import VersionDamaged
from memfs.vault.store import Store

ROOT = f"{layout.CONTROL}/versions"
DESCRIPTION = "version.json"
FORMAT = 1

LARGE = 8 << 20
"""A file of an adapter from so many bytes on is linked at once and copied, or read, later."""
CHAIN = 32
"""Earlier contents that a version knows of."""

DELETED = "deleted"
"""The event of a version that has no files: there was no such cube from then on."""

_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_STAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z")
_STAMP_FORMAT = "%Y-%m-%dT%H:%M:%S.%fZ"
MAX_DESCRIPTION = 4 << 20


@dataclass(frozen=True)
class Entry:
    """A file of a version."""

    size: int
    mtime_ns: int
    uid: int
    gid: int
    mode: int
    """Owner, group and permission bits that it had."""
    acl: str | None = None
    """Its POSIX access list, in hexadecimal; None where it had none."""
    sha256: str | None = None
    """None while nobody had the time to read a large one."""
    large: bool = False
    """Whether it is one of an adapter, and so long that it is known by its time."""
    linked: bool = False
    """Whether it is still the cube's own file under a second name, and not yet a copy."""
    kept: bool = True
    """False where there was no room for it within the budget: it is described, and not there."""

    @property
    def content(self) -> str:
        """Stands for its bytes; of a large one, which may not be read yet, its time does."""
        if self.large or self.sha256 is None:
            return f"{self.size}:{self.mtime_ns}"
        return self.sha256


class Parent(NamedTuple):
    """The rights that a directory, or a text, had, as in ``Entry``."""

    uid: int
    gid: int
    mode: int
    acl: str | None = None


@dataclass(frozen=True)
class Link:
    """One step of the chain of contents that a cube had."""

    stamp: str
    """"" where another store's header tells of it."""
    content: str
    payload_sha256: str | None


@dataclass(frozen=True)
class Version:
    """A version of a cube."""

    cube_id: str
    stamp: str
    """When it was made, in UTC to the microsecond; the name of its directory."""
    path: str
    """Where the cube was."""
    event: str
    """created, changed, moved, copied, restored or deleted."""
    files: dict[str, Entry] = field(default_factory=dict)
    """By path within the cube."""
    meaning: str | None = None
    """SHA-256 of what people have set in its meta.json; None where it had none."""
    parents: tuple[Parent, ...] = ()
    """The directories from the store's root down to the cube's own."""
    origin: str | None = None
    """The version that a restored one is equal to; the id of the cube that a copy was made of."""
    chain: tuple[Link, ...] = ()
    """The contents it had, oldest first, its own last."""
    last: Parent | None = None
    """Of a deletion: the rights that the text had in the end, of which no version tells."""

    @property
    def owner(self) -> int:
        """The user whose text it was; without a text, whose directory."""
        return (self.last or self.files.get(layout.PAYLOAD) or self.parents[-1]).uid

    @property
    def deleted(self) -> bool:
        return self.event == DELETED

    @property
    def directory(self) -> str:
        """Where it lies in the store."""
        return directory(self.cube_id, self.stamp)

    @property
    def content(self) -> str:
        """Stands for all that it holds: two versions with the same are the same memory."""
        return self.chain[-1].content if self.chain and not self.deleted else ""

    @property
    def payloads(self) -> list[str]:
        """Digests of the texts that the cube had, oldest first, none twice in a row."""
        found: list[str] = []
        for link in self.chain:
            if link.payload_sha256 is not None and link.payload_sha256 not in found[-1:]:
                found.append(link.payload_sha256)
        return found

    def to_json(self) -> dict[str, Any]:
        """What ``version.json`` holds."""
        return {
            "memfs_version": FORMAT,
            "path": self.path,
            "event": self.event,
            "origin": self.origin,
            "meaning": self.meaning,
            "files": {name: entry.__dict__ for name, entry in self.files.items()},
            "parents": self.parents,
            "last": self.last,
            "chain": [(link.stamp, link.content, link.payload_sha256) for link in self.chain],
        }


def directory(cube_id: str, stamp: str = "") -> str:
    """Where a cube's versions, or one of them, lie in the store."""
    return f"{ROOT}/{cube_id}/{stamp}".rstrip("/")


def stamp_after(previous: str | None, now: datetime | None = None) -> str:
    """A stamp for now; just after the previous one where the clock went back."""
    moment = stamp_of(now or datetime.now(UTC))
    if previous is None or moment > previous:
        return moment
    return stamp_of(moment_of(previous) + timedelta(microseconds=1))


def stamp_of(moment: datetime) -> str:
    """The stamp that says a time, which is in UTC."""
    return moment.strftime(_STAMP_FORMAT)


def moment_of(stamp: str) -> datetime:
    """The time that a stamp says."""
    return datetime.strptime(stamp, _STAMP_FORMAT).replace(tzinfo=UTC)


def is_stamp(name: str) -> bool:
    """Whether a name may be that of a version."""
    return _STAMP.fullmatch(name) is not None


def is_cube_id(name: str) -> bool:
    """Whether a name may be that of the directory of a cube's versions."""
    return _ID.fullmatch(name) is not None


def names_in(store: Store, path: str) -> list[str]:
    """The names in a directory of the store, sorted; none where there is no such directory."""
    try:
        fd = store.open_dir(path)
    except (FileNotFoundError, NotADirectoryError):
        return []
    try:
        return sorted(os.listdir(fd))
    finally:
        os.close(fd)


def cube_ids(store: Store) -> list[str]:
    """Every cube that has versions, the deleted ones too."""
    return [name for name in names_in(store, ROOT) if is_cube_id(name)]


def stamps(store: Store, cube_id: str) -> list[str]:
    """The versions of a cube, oldest first."""
    if not is_cube_id(cube_id):
        return []
    return [name for name in names_in(store, directory(cube_id)) if is_stamp(name)]


def read(store: Store, cube_id: str, stamp: str) -> Version:
    """A version as its description says it is; its files are not looked at.

    Raises VersionDamaged, or OSError where it cannot be read.
    """
    raw = store.read(f"{directory(cube_id, stamp)}/{DESCRIPTION}", MAX_DESCRIPTION)
    return parse(cube_id, stamp, raw)


def parse(cube_id: str, stamp: str, raw: bytes) -> Version:
    """The version that the bytes of a description are of. Raises VersionDamaged."""
    try:
        data = json.loads(raw)
        if data["memfs_version"] != FORMAT:
            raise VersionDamaged(f"{cube_id}/{stamp}: its format is {data['memfs_version']!r}")
        return Version(
            cube_id,
            stamp,
            _path(data["path"]),
            str(data["event"]),
            {_name(name): Entry(**entry) for name, entry in data["files"].items()},
            data["meaning"],
            tuple(Parent(*parent) for parent in data["parents"]),
            data["origin"],
            tuple(Link(*link) for link in data["chain"]),
            Parent(*data["last"]) if data.get("last") else None,
        )
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise VersionDamaged(f"{cube_id}/{stamp}: {DESCRIPTION}: {e!r}") from e


def newest(store: Store, cube_id: str, until: str | None = None) -> Version | None:
    """The last version, or the last one up to a stamp, that can be read; None for none."""
    for stamp in reversed(stamps(store, cube_id)):
        if until is None or stamp <= until:
            try:
                return read(store, cube_id, stamp)
            except (VersionDamaged, FileNotFoundError):
                continue
    return None


def blocks(store: Store, cube_id: str, stamp: str) -> dict[int, int]:
    """The bytes on the disk of everything in a version, by inode number."""
    found = {}
    pending = [directory(cube_id, stamp)]
    while pending:
        path = pending.pop()
        for name in names_in(store, path):
            status = store.stat(f"{path}/{name}")
            found[status.st_ino] = status.st_blocks * 512
            if stat.S_ISDIR(status.st_mode):
                pending.append(f"{path}/{name}")
    return found


def _path(value: Any) -> str:
    """A cube's path from a description, which might have been written by anybody."""
    if not isinstance(value, str) or any(p in ("", ".", "..") for p in value.split("/")):
        raise ValueError(f"{value!r} is no path")
    return value


def _name(value: str) -> str:
    """Likewise the name of a version's file."""
    holder, name = layout.split(value)
    plain = name not in ("", ".", "..") and "\0" not in name
    if not plain or (holder != layout.ADAPTER if holder else name not in _FILES):
        raise ValueError(f"{value!r} is no file of a cube")
    return value


_FILES = (layout.PAYLOAD, layout.META)
