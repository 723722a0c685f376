"""What a cube holds now, and whether that is another thing than its newest version.

Used by ``making`` and by who decides when to make one; any thread.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from dataclasses import dataclass, replace

from memfs.cube import layout, metadata
from memfs.errors import InvalidMetadata, NotAllowed
from memfs.vault.facts import MAX_PAYLOAD
from memfs.vault.rights import acl_bytes, read_acl
from memfs.vault.store import Store, open_regular_at, read_all
from memfs.vault.versions.records import LARGE, Entry, Parent, Version

_BLOCK = 1 << 20
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True)
class Present:
    """What a cube holds now."""

    path: str
    inode: int
    """Of its directory."""
    files: dict[str, Entry]
    meaning: str | None
    parents: tuple[Parent, ...]
    copied_from: str | None = None
    payloads: tuple[str, ...] = ()
    """The texts that it had elsewhere, as its header says."""

    @property
    def content(self) -> str:
        """As ``Version.content``."""
        return content_of(self.files, self.meaning)


def look(store: Store, path: str, previous: Version | None) -> Present | None:
    """What the cube at ``path`` holds now; None where there is no cube.

    A ``meta.json`` that is not valid is no finished change: the previous one counts.
    """
    try:
        directory = store.open_dir(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        if not layout.is_cube(os.listdir(directory)):
            return None
        files: dict[str, Entry] = {}
        payload = _payload(directory)
        if payload is not None:
            files[layout.PAYLOAD] = payload
        meta: metadata.Meta = {}
        meaning = None
        try:
            files[layout.META], meta = _header(directory)
            meaning = meaning_of(meta)
        except InvalidMetadata:
            meaning = previous.meaning if previous else None
            if previous is not None and layout.META in previous.files:
                files[layout.META] = previous.files[layout.META]
        except (FileNotFoundError, NotAllowed):
            pass  # it has none for now, or none that could be kept
        files |= _adapter(directory)
        inode = os.fstat(directory).st_ino
    finally:
        os.close(directory)
    origin = meta.get("descriptive", {}).get("origin", {})
    known = meta.get("behavioural", {}).get("versions", ())
    return Present(
        path,
        inode,
        files,
        meaning,
        parents_of(store, path),
        origin.get("copied_from"),
        tuple(known),
    )


def event_for(previous: Version | None, present: Present) -> tuple[str, str | None] | None:
    """What happened to a cube since its newest version, and out of what; None for nothing."""
    if previous is None:
        return ("copied", present.copied_from) if present.copied_from else ("created", None)
    content = present.content
    if content == previous.content:
        return None if present.path == previous.path else ("moved", None)
    for link in reversed(previous.chain):
        if link.content == content and link.stamp:
            return "restored", link.stamp
    return ("created" if previous.deleted else "changed"), None


def meaning_of(meta: metadata.Meta) -> str:
    """Digest of what people have set in a header."""
    text = json.dumps(metadata.user_set(meta), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def content_of(files: dict[str, Entry], meaning: str | None) -> str:
    """Stands for all that a cube or a version holds: see ``Version.content``."""
    lines = [
        f"{name} {meaning if name == layout.META else entry.content}"
        for name, entry in sorted(files.items())
    ]
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _payload(directory: int) -> Entry | None:
    try:
        fd = open_regular_at(directory, layout.PAYLOAD)
    except (FileNotFoundError, NotAllowed):
        return None
    try:
        if os.fstat(fd).st_size > MAX_PAYLOAD:
            return entry_of(fd, None, kept=False)
        return entry_of(fd, sha256_of(fd))
    finally:
        os.close(fd)


def _header(directory: int) -> tuple[Entry, metadata.Meta]:
    fd = open_regular_at(directory, layout.META)
    try:
        try:
            data = read_all(fd, metadata.MAX_BYTES)
        except OSError as e:
            if e.errno == errno.EFBIG:
                raise InvalidMetadata(f"longer than {metadata.MAX_BYTES} bytes") from e
            raise
        return entry_of(fd, hashlib.sha256(data).hexdigest()), metadata.parse(data)
    finally:
        os.close(fd)


def _adapter(directory: int) -> dict[str, Entry]:
    """The ordinary files of ``adapter/``, which PEFT keeps in one directory."""
    try:
        holder = os.open(layout.ADAPTER, _DIRECTORY, dir_fd=directory)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    found = {}
    try:
        for name in os.listdir(holder):
            if layout.is_temporary(name):
                continue
            try:
                fd = _open_unread(holder, name)
            except (FileNotFoundError, NotAllowed):
                continue
            try:
                large = os.fstat(fd).st_size >= LARGE
                entry = entry_of(fd, None if large else sha256_of(fd))
                found[f"{layout.ADAPTER}/{name}"] = replace(entry, large=large)
            finally:
                os.close(fd)
    finally:
        os.close(holder)
    return found


def _open_unread(directory: int, name: str) -> int:
    """Opens a file so that a mount, if this is one, does not take it for a wish to use it."""
    try:
        return open_regular_at(directory, name, os.O_RDONLY | os.O_NOATIME)
    except PermissionError:  # the kernel lets only the owner
        return open_regular_at(directory, name)


def entry_of(fd: int, digest: str | None, *, kept: bool = True) -> Entry:
    """How an open file of a cube is described."""
    found = os.fstat(fd)
    mode, acl = stat.S_IMODE(found.st_mode), _hex(read_acl(fd))
    times = found.st_size, found.st_mtime_ns
    return Entry(*times, found.st_uid, found.st_gid, mode, acl, digest, kept=kept)


def _hex(acl: bytes | None) -> str | None:
    return None if acl is None else acl.hex()


def parents_of(store: Store, path: str) -> tuple[Parent, ...]:
    """The rights of the directories from the store's root to a cube's own. Raises OSError."""
    parts = path.split("/")
    above = ["", *("/".join(parts[: i + 1]) for i in range(len(parts)))]
    found = [(store.stat(directory), acl_bytes(store, directory)) for directory in above]
    return tuple(
        Parent(status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode), _hex(acl))
        for status, acl in found
    )


def sha256_of(fd: int) -> str:
    """Digest of an open file from its beginning, wherever it is read."""
    digest, offset = hashlib.sha256(), 0
    while part := os.pread(fd, _BLOCK, offset):
        digest.update(part)
        offset += len(part)
    return digest.hexdigest()
