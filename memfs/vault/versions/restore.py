"""Bringing a version back: its files become the cube's again, and what they replace is a version.

A mounted store is written through its mount, with the caller's rights, so that everything hears of
it; one that is not mounted under its lock. What comes back is content: owner, group, mode and
access list of a living cube stay as they are today, as does whether it is frozen. A cube that is
gone comes back whole, as it was, by a rename. Used by ``memfs restore``; any thread.
"""

from __future__ import annotations

import contextlib
import os
import stat

from memfs.cube import layout, metadata
from memfs.cube.metadata import Meta
from memfs.errors import InvalidMetadata, InvalidRequest, NotAllowed
from memfs.vault import rights
from memfs.vault.identity import read_meta
from memfs.vault.publish import incoming, sync_directory, write_all
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
        OSError: it cannot be written; where the cube was gone, nothing is there.
    """
    present = look(store, path, None)
    names = differing(store, source, version, present)
    for name in names:
        if name in version.files and not version.files[name].kept:
            raise InvalidRequest(f"{name} of that version was too large to be kept")
    if _is_there(store, path):
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
            parent = layout.split(f"{path}/{name}")[0]
            if not _is_there(store, parent):
                _make_directory(store, parent, 0o777)
            _rename(store, staged[name], f"{path}/{name}")
    for name in names:
        if name not in version.files:
            parent, last = layout.split(f"{path}/{name}")
            with store.opened(parent) as directory:
                os.unlink(last, dir_fd=directory)


def _bring_back(store: Store, source: str, version: Version, path: str) -> None:
    """Put together beside its place, and renamed."""
    parent, _ = layout.split(path)
    parts = parent.split("/") if parent else []
    for depth in range(len(parts)):
        above = "/".join(parts[: depth + 1])
        if not _is_there(store, above):
            recorded = version.path == path
            _make_directory(store, above, version.parents[depth + 1].mode if recorded else 0o777)
    with incoming(store, parent) as aside:
        staged = f"{aside}/0"
        _make_directory(store, staged, 0o700)
        for name, entry in version.files.items():
            holder = layout.split(f"{staged}/{name}")[0]
            if not _is_there(store, holder):
                _make_directory(store, holder, version.parents[-1].mode)
            _write(store, f"{source}/{name}", f"{staged}/{name}", entry, None, keep_time=True)
        with store.opened(staged) as directory:
            _dress(directory, version.parents[-1])
        _rename(store, staged, path)


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
            _dress(fd, like)
            if keep_time:
                found = os.fstat(read)
                os.utime(fd, ns=(found.st_atime_ns, found.st_mtime_ns))
        finally:
            os.close(read)
        os.fsync(fd)
    finally:
        os.close(fd)


def _dress(fd: int, like: Entry | Parent) -> None:
    """The owner, as far as this process may give files away, the mode and the access list."""
    with contextlib.suppress(PermissionError):
        os.fchown(fd, like.uid, like.gid)
    os.fchmod(fd, like.mode)
    if like.acl is not None:
        rights.write_acl(fd, bytes.fromhex(like.acl))


def _rename(store: Store, old: str, new: str) -> None:
    (holder, name), (parent, last) = layout.split(old), layout.split(new)
    with store.opened(holder) as source, store.opened(parent) as target:
        os.rename(name, last, src_dir_fd=source, dst_dir_fd=target)
        sync_directory(target)


def _make_directory(store: Store, path: str, mode: int) -> None:
    parent, name = layout.split(path)
    with store.opened(parent) as directory:
        os.mkdir(name, mode, dir_fd=directory)


def _exists(store: Store, path: str) -> bool:
    try:
        store.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _is_there(store: Store, path: str) -> bool:
    """Whether there is a directory. Raises NotAllowed where there is something else."""
    try:
        found = store.stat(path)
    except FileNotFoundError:
        return False
    if not stat.S_ISDIR(found.st_mode):
        raise NotAllowed(f"{path} is not a directory")
    return True
