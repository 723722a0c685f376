"""One operation in two directories: one of a mount, and one of the disk that its store lies on.

Used by ``test_model``. What an operation gives, or the errno it fails with, must be the same in
both, and so must everything that can be seen afterwards.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

UTIME_NOW, UTIME_OMIT = (1 << 30) - 1, (1 << 30) - 2
_AT_FDCWD, _AT_SYMLINK_NOFOLLOW = -100, 0x100
_LONG_AGO = 1_500_000_000 * 10**9
"""Times before this one were set by the test, and must be the same to the nanosecond."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def _checked(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def renameat2(old: str, new: str, flags: int) -> None:
    """Renames with the kernel's RENAME_* flags."""
    _checked(_libc.renameat2(_AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new), flags))


def utimensat(path: str, accessed: tuple[int, int], modified: tuple[int, int]) -> None:
    """Sets times; nanoseconds may be UTIME_NOW or UTIME_OMIT."""
    times = (ctypes.c_long * 4)(*accessed, *modified)
    _checked(_libc.utimensat(_AT_FDCWD, os.fsencode(path), times, _AT_SYMLINK_NOFOLLOW))


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """Reserves, punches or zeroes."""
    _checked(_libc.fallocate(fd, mode, offset, length))


def write_mapped(fd: int, offset: int, data: bytes) -> None:
    """Writes through a shared mapping, within the file."""
    size = os.fstat(fd).st_size
    if offset < size:
        with mmap.mmap(fd, size) as mapped:
            part = data[: size - offset]
            mapped[offset : offset + len(part)] = part
            mapped.flush()


def read_mapped(fd: int) -> bytes:
    """Reads the whole file through a shared mapping."""
    if os.fstat(fd).st_size == 0:
        return b""
    with mmap.mmap(fd, 0, access=mmap.ACCESS_READ) as mapped:
        return bytes(mapped)


class User(NamedTuple):
    """Who does an operation."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()


@contextlib.contextmanager
def acting_as(user: User) -> Iterator[None]:
    """Makes this process, for the kernel's checks of files, another user's."""
    if user.uid == os.geteuid():
        yield
        return
    os.setgroups(user.groups)
    os.setegid(user.gid)
    os.seteuid(user.uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups([])


@dataclass
class Side:
    """One of the two directories, and what is open there."""

    root: Path
    handles: dict[int, int] = field(default_factory=dict)
    """Descriptors by the number that both sides know them by."""

    def __post_init__(self) -> None:
        self._fd = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY)

    def do(self, user: User, function: Callable[..., Any], *args: Any) -> Any:
        """What ``function`` gives with this directory as the working one, or its errno."""
        os.fchdir(self._fd)
        with acting_as(user):
            try:
                return function(*args)
            except OSError as e:
                return f"errno {e.errno}: {e.strerror}"

    def close(self) -> None:
        for fd in [*self.handles.values(), self._fd]:
            os.close(fd)
        os.chdir("/")

    def seen(self) -> dict[str, dict[str, Any]]:
        """All that can be seen of the directory, by path, and of what is open, by number."""
        os.fchdir(self._fd)
        found: dict[str, dict[str, Any]] = {}
        links: dict[int, str] = {}
        for path, status in _walk("."):
            seen = _fields(status)
            seen["first link"] = links.setdefault(status.st_ino, path)
            if stat.S_ISLNK(status.st_mode):
                seen["target"] = os.readlink(path)
            else:
                seen["xattrs"] = {n: os.getxattr(path, n) for n in sorted(os.listxattr(path))}
            if stat.S_ISREG(status.st_mode):
                seen["content"] = Path(path).read_bytes()
            found[path] = seen
        for number, fd in self.handles.items():
            found[f"open {number}"] = _fields(os.fstat(fd))
        return found


def _walk(top: str) -> Iterator[tuple[str, os.stat_result]]:
    status = os.lstat(top)
    yield top, status
    if stat.S_ISDIR(status.st_mode):
        with os.scandir(top) as entries:
            listed = sorted((e.name, e.inode(), stat.S_IFMT(_mode(e))) for e in entries)
        for name, ino, kind in listed:
            below = os.path.join(top, name)
            found = os.lstat(below)
            assert (ino, kind) == (found.st_ino, stat.S_IFMT(found.st_mode)), below
            yield from _walk(below)


def _mode(entry: os.DirEntry[str]) -> int:
    """The mode of an entry, its kind taken from the listing where that says it."""
    for kind, is_kind in (
        (stat.S_IFLNK, entry.is_symlink()),
        (stat.S_IFDIR, entry.is_dir(follow_symlinks=False)),
        (stat.S_IFREG, entry.is_file(follow_symlinks=False)),
    ):
        if is_kind:
            return kind
    return entry.stat(follow_symlinks=False).st_mode


def _fields(status: os.stat_result) -> dict[str, Any]:
    names = ["st_ino", "st_mode", "st_uid", "st_gid", "st_nlink", "st_rdev"]
    names += ["st_mtime_ns", "st_ctime_ns"]
    if not stat.S_ISDIR(status.st_mode):
        names.append("st_size")
    return {name: getattr(status, name) for name in names}


def comparable(
    before: dict[str, dict[str, Any]], after: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """``after``, with times that no test has set told only as changed or not since ``before``.

    Those of another file than was there before are not compared: two files that were made in one
    tick of the clock have the same times on one side and not on the other.
    """
    told = {}
    for path, now in after.items():
        old, seen = before.get(path, {}), {n: value for n, value in now.items() if n != "st_ino"}
        another = old.get("st_ino", now["st_ino"]) != now["st_ino"]
        told[path] = seen | {
            name: "another's"
            if another
            else "changed"
            if seen[name] != old.get(name)
            else "the same"
            for name in ("st_mtime_ns", "st_ctime_ns")
            if name == "st_ctime_ns" or seen[name] > _LONG_AGO
        }
    return told


def difference(
    first: dict[str, dict[str, Any]], second: dict[str, dict[str, Any]]
) -> dict[str, dict[str, tuple[Any, Any]]]:
    """What is not the same in both, by path and field."""
    found = {}
    for path in first.keys() | second.keys():
        here, there = first.get(path, {}), second.get(path, {})
        if here != there:
            fields = [f for f in here.keys() | there.keys() if here.get(f) != there.get(f)]
            found[path] = {field: (here.get(field), there.get(field)) for field in fields}
    return found
