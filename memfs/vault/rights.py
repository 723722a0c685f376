"""Owner, group, mode and access list of a cube's files: those of ``payload.md``, for all of them.

A KV cache holds the token ids of the text, an adapter was trained on it, and the header describes
it: who may not read the one may not read the others. So what is changed on ``payload.md`` through
the mount is carried over to them, and what memfs makes takes them from there. A user or group that
the access list names is also let into the cube's directory. Any thread.

A name makes no file the cube's: anybody who may rename another's file can call it ``meta.json``. So
a file's rights are changed for nobody who could not change them himself: see ``carry_over``.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator

from memfs.cube import layout
from memfs.cube.acl import READ, SEARCH, XATTR, Acl, Who
from memfs.vault.store import Store

_NONE = (errno.ENODATA, errno.EOPNOTSUPP)

_CARRIED = ("", (layout.KV, layout.META, layout.REJECTED))
_CARRIED_BELOW = (layout.ADAPTER, (layout.ADAPTER_CONFIG, layout.ADAPTER_WEIGHTS))


def acl_bytes(store: Store, path: str) -> bytes | None:
    """The access list of a file as the kernel has it; None where it has none but its mode.

    Raises OSError where the file is not there.
    """
    with _at(store, path) as reference:
        return read_acl(reference)


def acl_of(store: Store, path: str) -> Acl:
    """The access list of a file, which its mode alone may be."""
    with _at(store, path) as reference:
        raw = read_acl(reference)
        return Acl.parse(raw) if raw else Acl.of_mode(os.stat(reference).st_mode)


def set_acl(store: Store, path: str, acl: Acl) -> None:
    """Gives a file an access list. Raises OSError (EOPNOTSUPP) where its filesystem has none."""
    with _at(store, path) as reference:
        write_acl(reference, acl.render() if acl.named else None)
        if not acl.named:
            mode = os.stat(reference).st_mode & ~0o777
            os.chmod(reference, stat.S_IMODE(mode | acl.owner << 6 | acl.group << 3 | acl.other))


def carry_over(
    store: Store, cube: str, caller: int, *, was: int | None = None, before: Acl | None = None
) -> None:
    """Gives the other files of a cube the owner, group, mode and access list of its payload.md.

    Only the caller's own files follow; where that is root, the files of whom the text belongs to,
    or did before a ``chown``, and root's. All others stay as they are, and so does what this
    process may not change (another's file, on a mount that is not root's).

    Args:
        caller: the user who changed the text, or gave one of the files its name.
        was: the owner the text had.
        before: the list it had: who stood in it, and does no longer, needs no way to it any more.
    """
    payload = layout.join(cube, layout.PAYLOAD)
    try:
        found, acl = store.stat(payload), acl_bytes(store, payload)
    except OSError:
        return
    if not stat.S_ISREG(found.st_mode):
        return
    owners = {caller} if caller else {0, found.st_uid, was}
    for below, names in (_CARRIED, _CARRIED_BELOW):
        for name in names:
            path = layout.join(layout.join(cube, below) if below else cube, name)
            absent = FileNotFoundError, NotADirectoryError
            with contextlib.suppress(*absent, PermissionError), _at(store, path) as reference:
                if os.stat(reference).st_uid in owners:
                    _dress(reference, found, acl)
    with contextlib.suppress(PermissionError):
        _let_in(store, cube, acl, before)


def dress(store: Store, cube: str, fd: int) -> None:
    """Gives an open file that is to be one of a cube's the rights of its payload.md, if any."""
    payload = layout.join(cube, layout.PAYLOAD)
    with contextlib.suppress(FileNotFoundError, PermissionError):
        found = store.stat(payload)
        if stat.S_ISREG(found.st_mode):
            _dress(f"/proc/self/fd/{fd}", found, acl_bytes(store, payload))


def _dress(reference: str, like: os.stat_result, acl: bytes | None) -> None:
    found = os.stat(reference)
    if not stat.S_ISREG(found.st_mode):
        return
    if (found.st_uid, found.st_gid) != (like.st_uid, like.st_gid):
        os.chown(reference, like.st_uid, like.st_gid)
    if read_acl(reference) != acl:
        write_acl(reference, acl)
    if stat.S_IMODE(os.stat(reference).st_mode) != like.st_mode & 0o666:
        os.chmod(reference, like.st_mode & 0o666)


def _let_in(store: Store, cube: str, acl: bytes | None, before: Acl | None) -> None:
    """Lets those who may read or write into the directory, where not everybody may enter it."""
    named = Acl.parse(acl).effective if acl else {}
    gone = (before.named.keys() if before else set()) - named.keys()
    there = acl_of(store, cube)
    wanted: dict[Who, int] = {who: 0 for who in gone if who in there.named}
    if store.stat(cube).st_mode & 0o055 != 0o055:
        for who, bits in named.items():
            if bits and there.named.get(who, 0) & (READ | SEARCH) != READ | SEARCH:
                wanted[who] = there.named.get(who, 0) | READ | SEARCH
    if wanted:
        set_acl(store, cube, there.with_entries(wanted))


@contextlib.contextmanager
def _at(store: Store, path: str) -> Iterator[str]:
    """A path that names this very file or directory, never what a symlink there leads to."""
    parent, name = layout.split(path)
    with store.opened(parent) as directory:
        fd = os.open(name or ".", os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    try:
        if stat.S_ISLNK(os.fstat(fd).st_mode):
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
        yield f"/proc/self/fd/{fd}"
    finally:
        os.close(fd)


def read_acl(reference: str | int) -> bytes | None:
    """The access list of a file, by a descriptor or a path; None where it has none."""
    try:
        return os.getxattr(reference, XATTR)
    except OSError as e:
        if e.errno in _NONE:
            return None
        raise


def write_acl(reference: str | int, acl: bytes | None) -> None:
    """Sets or removes the access list of a file."""
    if acl is not None:
        os.setxattr(reference, XATTR, acl)
        return
    try:
        os.removexattr(reference, XATTR)
    except OSError as e:
        if e.errno not in _NONE:
            raise
