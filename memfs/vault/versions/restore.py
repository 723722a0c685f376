"""Bringing a version back: its files become the cube's again, and what they replace is a version.

A mounted store is written through its mount, with the caller's rights, so that everything hears of
it; one that is not mounted under its lock. What comes back is content: owner, group, mode and
access list of a living cube stay as they are today, as does whether it is frozen. A cube that is
gone comes back whole, as it was, by a rename. Used by ``memfs restore``; any thread.
"""

from __future__ import annotations

import os

from memfs.cube import layout, metadata
from memfs.cube.metadata import Meta
from memfs.errors import InvalidMetadata, InvalidRequest, NotAllowed, VersionDamaged
from memfs.vault.identity import read_meta
from memfs.vault.publish import dress, sync_directory, write_all
from memfs.vault.staging import incoming, is_directory, movable, new_directory, put, way
from memfs.vault.store import Store
from memfs.vault.versions.look import Present, look
from memfs.vault.versions.records import Entry, Parent, Version

_KEPT_TODAY = (("governance", "access"), ("state", "frozen"))
"""What of a living cube's header is a right, and no content."""
_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_BLOCK = 1 << 20


def differing(store: Store, source: str, version: Version, present: Present | None) -> list[str]:
    """The files in which a version and what a cube holds now are not the same.

    The access list, which is a right, is left out: through a mount it reads as the kernel has it.

    Args:
        source: the version's directory in the store.
    """
    files = present.files if present else {}
    found = []
    for name in sorted(version.files.keys() | files.keys()):
        then, now = version.files.get(name), files.get(name)
        same = then is not None and now is not None and then.content == now.content
        if name == layout.META and present is not None and not same and then and now:
            same = version.meaning == present.meaning
            same = same or _content(store, source) == _content(store, present.path)
        if not same:
            found.append(name)
    return found


def unkept(
    store: Store, source: str, newest: Version, present: Present | None, path: str, names: list[str]
) -> list[str]:
    """Those of a cube's files that the newest version does not hold as they are now.

    Args:
        source: the directory of the newest version in the store.
        path: of the cube.
        names: the files that are asked about.
    """
    changed = differing(store, source, newest, present)
    held = [name for name, entry in newest.files.items() if entry.kept and name not in changed]
    return [name for name in names if name not in held and _exists(store, f"{path}/{name}")]


def restore(store: Store, source: str, version: Version, path: str) -> list[str]:
    """Gives the cube at ``path`` what a version holds; which files were changed, made or removed.

    Args:
        store: as it is to be written: the mount, where there is one.
        source: the version's directory in it.

    Raises:
        InvalidRequest: a file of the version was not kept.
        NotAllowed: something on the way is no directory.
        VersionDamaged: it does not say whose the cube was.
        OSError: it cannot be written; where the cube was gone, nothing is there.
    """
    if not version.parents:
        raise VersionDamaged(f"{version.cube_id}/{version.stamp}: it has no parents")
    present = look(store, path, None)
    names = differing(store, source, version, present)
    for name in names:
        if name in version.files and not version.files[name].kept:
            raise InvalidRequest(f"{name} of that version was too large to be kept")
    if is_directory(store, path):
        _put_back(store, source, version, present, path, names)
    else:
        _bring_back(store, source, version, path)
    return names


def _content(store: Store, directory: str) -> Meta | None:
    """What people have set in a header but for its rights; None where it is no valid one."""
    try:
        meta = metadata.user_set(read_meta(store, directory))
    except (FileNotFoundError, InvalidMetadata, NotAllowed):
        return None
    return without_rights(meta)


def without_rights(meta: Meta) -> Meta:
    """A header without the access list."""
    governance = {k: v for k, v in meta.get("governance", {}).items() if k != "access"}
    return {**meta, "governance": governance}


def _put_back(
    store: Store,
    source: str,
    version: Version,
    present: Present | None,
    path: str,
    names: list[str],
) -> None:
    """File by file, each by a rename."""
    rights = (present or version).parents[-1]
    with incoming(store, path) as aside:
        staged = {}
        for number, name in enumerate(name for name in names if name in version.files):
            staged[name] = f"{aside}/{number}"
            like = _like(version, present, name)
            data = _header(store, source, path) if name == layout.META else None
            keep_time = name not in (layout.PAYLOAD, layout.META)  # a tool shall see these change
            _write(store, f"{source}/{name}", staged[name], like, data, keep_time=keep_time)
        # The text before the header, so that the last step makes the version that is asked for.
        for name in sorted(staged, key=lambda name: name == layout.META):
            with way(store, f"{path}/{name}", lambda _: rights):  # the cube's, for adapter/
                put(store, staged[name], f"{path}/{name}")
    for name in names:
        if name not in version.files:
            parent, last = layout.split(f"{path}/{name}")
            with store.opened(parent) as directory:
                os.unlink(last, dir_fd=directory)
                sync_directory(directory)


def _bring_back(store: Store, source: str, version: Version, path: str) -> None:
    """Put together beside its place, and renamed."""
    rights = version.parents[-1]
    staged: dict[str, dict[str, Entry]] = {"": {}, layout.ADAPTER: {}}
    for name, entry in version.files.items():
        staged[layout.split(name)[0]][name] = entry
    with (
        way(store, path, lambda above: _recorded(version, path, above)),
        incoming(store, layout.split(path)[0]) as aside,
        new_directory(store, f"{aside}/0", rights) as cube,
    ):
        if staged[layout.ADAPTER]:
            with new_directory(store, f"{aside}/0/{layout.ADAPTER}", rights) as adapter:
                _fill(store, source, staged[layout.ADAPTER], f"{aside}/0", adapter)
        _fill(store, source, staged[""], f"{aside}/0", cube)
        put(store, f"{aside}/0", path)


def _fill(store: Store, source: str, files: dict[str, Entry], cube: str, directory: int) -> None:
    """Copies files of one directory of a version, and flushes that directory."""
    for name, entry in files.items():
        _write(store, f"{source}/{name}", f"{cube}/{name}", entry, None, keep_time=True)
    sync_directory(directory)


def _recorded(version: Version, path: str, above: str) -> Parent:
    """Whose rights a collection gets that has to be made again; where it is not known which it
    had, those of the cube."""
    depth = above.count("/") + 1
    if version.path == path and depth < len(version.parents):
        return version.parents[depth]
    return version.parents[-1]._replace(mode=movable(version.parents[-1].mode))


def _header(store: Store, source: str, path: str) -> bytes:
    """A version's header with the rights, and what memfs counts and finds, as they are now."""
    then = metadata.parse(store.read(f"{source}/{layout.META}", metadata.MAX_BYTES))
    try:
        now = read_meta(store, path)
    except (FileNotFoundError, InvalidMetadata, NotAllowed):
        return metadata.render(then)
    for group, keys in metadata.LIVE.items():
        for key in keys:
            _take(then, now, group, key)
    for group, key in _KEPT_TODAY:
        _take(then, now, group, key)
    return metadata.render(then)


def _take(then: Meta, now: Meta, group: str, key: str) -> None:
    if key in now.get(group, {}):
        then.setdefault(group, {})[key] = now[group][key]
    else:
        then.get(group, {}).pop(key, None)


def _like(version: Version, present: Present | None, name: str) -> Entry:
    """Whose rights a file gets that is put back: its own, else those of the text, as they are."""
    files = present.files if present else {}
    return files.get(name) or files.get(layout.PAYLOAD) or version.files[name]


def _write(
    store: Store, source: str, target: str, like: Entry, data: bytes | None, *, keep_time: bool
) -> None:
    """Writes a new file, flushed, from ``data`` or as a copy."""
    fd = store.open_file(target, _NEW)
    try:
        read = store.open_regular(source)
        try:
            if data is not None:
                write_all(fd, data)
            else:
                while part := os.read(read, _BLOCK):
                    write_all(fd, part)
            acl = None if like.acl is None else bytes.fromhex(like.acl)
            # Without the set-uid bit, which anybody might have written into a description.
            dress(fd, like.uid, like.gid, like.mode & 0o777, acl)
            if keep_time:
                found = os.fstat(read)
                os.utime(fd, ns=(found.st_atime_ns, found.st_mtime_ns))
        finally:
            os.close(read)
        os.fsync(fd)
    finally:
        os.close(fd)


def _exists(store: Store, path: str) -> bool:
    try:
        store.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True
