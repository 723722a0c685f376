"""The same random operations on a mount and on the disk: everything that can be seen is the same.

Their number is bounded here; ``tools/conformance model`` sets MODEL_EXAMPLES and does more of them.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from . import posix_model
from .conftest import mounted_at, until
from .posix_model import UTIME_NOW, UTIME_OMIT, Side, User

_BOUNDED = settings(
    max_examples=int(os.environ.get("MODEL_EXAMPLES", "40")),
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)

ROOT = User(0, 0)
USERS = (
    (ROOT, User(1234, 2345), User(1235, 2346, (2345,)))
    if os.geteuid() == 0
    else (User(os.geteuid(), os.getegid()),)
)

FILES = ("a", "b", "sticky/a", "d/a", "d/b", os.fsdecode(b"\xff\xe9"), "n" * 255)
DIRECTORIES = ("d", "d/e", "e", "sticky", "shared")
PATHS = (*FILES, *DIRECTORIES, "shared/a", "n" * 256, "a/b", "d/missing/a", ".")

users = st.sampled_from(USERS)
files = st.sampled_from(FILES)
paths = st.sampled_from((*FILES, *FILES, *PATHS))
directories = st.sampled_from((*DIRECTORIES, *DIRECTORIES, *PATHS))
modes = st.sampled_from((0o666, 0o777, 0o600, 0o644, 0o640, 0o4755, 0o2770, 0o1777, 0o000, 0o2707))
slots = st.integers(0, 2)
offsets = st.sampled_from((0, 1, 100, 4095, 4096, 10_000, 70_000))
lengths = st.sampled_from((0, 1, 3, 4096, 5000, 100_000))
data = st.builds(
    lambda c, n: bytes([c]) * n, st.integers(1, 255), st.sampled_from((1, 5, 4096, 9000))
)
ids = st.sampled_from((-1, 0, 1234, 1235, 2345, 2346))
moments = st.sampled_from(
    ((1_000_000_000, 123_456_789), (1_234_567_890, 1), (0, UTIME_NOW), (0, UTIME_OMIT))
)
open_flags = st.builds(
    lambda access, more: access | sum(set(more)),
    st.sampled_from((os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_RDWR)),
    st.lists(
        st.sampled_from(
            (
                os.O_CREAT,
                os.O_CREAT,
                os.O_EXCL,
                os.O_TRUNC,
                os.O_APPEND,
                os.O_NOFOLLOW,
            )
        ),
        max_size=3,
    ),
)
KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 1, 2, 16
attributes = st.sampled_from(("user.one", "user.two", "trusted.one", "user." + "n" * 250, "bad"))


class Machine(RuleBasedStateMachine):
    """Two directories, of a mount and of the disk, in which the same is done."""

    mounted: ClassVar[Path]
    native: ClassVar[Path]

    def __init__(self) -> None:
        super().__init__()
        self.sides = []
        for place in (self.mounted, self.native):
            root = place / "model"
            root.mkdir()
            root.chmod(0o777)
            for name, mode in (("sticky", 0o1777), ("shared", 0o2777), ("d", 0o777)):
                (root / name).mkdir()
                (root / name).chmod(mode)
            (root / "a").write_bytes(b"x" * 5000)
            (root / "d/a").write_bytes(b"program")
            (root / "d/a").chmod(0o4777)
            if ROOT in USERS:
                os.chown(root / "shared", 1234, 2346)
                (root / "shared").chmod(0o2777)
                os.chown(root / "a", 1234, 2345)
            self.sides.append(Side(root))
            self.sides[-1].handles[0] = os.open(root / "a", os.O_RDWR | os.O_APPEND)
        self.before = [side.seen() for side in self.sides]

    def teardown(self) -> None:
        for side in self.sides:
            side.close()
            shutil.rmtree(side.root)

    def both(self, user: User, function: Callable[..., Any], *args: Any) -> None:
        """Does one thing on both sides, and compares all that can be seen."""
        self._same([side.do(user, function, *args) for side in self.sides])

    def on_open(self, slot: int, function: Callable[..., Any], *args: Any) -> None:
        """Does one thing with an open file on both sides."""
        results = [side.do(ROOT, function, side.handles[slot], *args) for side in self.sides]
        self._same(results)

    def _same(self, results: list[Any]) -> None:
        assert results[0] == results[1]
        after = [side.seen() for side in self.sides]
        mounted, native = map(posix_model.comparable, self.before, after)
        assert posix_model.difference(mounted, native) == {}
        self.before = after

    def has(self, slot: int) -> bool:
        return slot in self.sides[0].handles

    @rule(user=users, path=files | paths, flags=open_flags, mode=modes, slot=slots)
    def open(self, user: User, path: str, flags: int, mode: int, slot: int) -> None:
        if self.has(slot):
            self.close(slot)
        results = []
        for side in self.sides:
            result = side.do(user, os.open, path, flags | os.O_NONBLOCK, mode)
            if isinstance(result, int) and stat.S_ISDIR(os.fstat(result).st_mode):
                os.close(result)  # libfuse forgets a directory that is removed while it is open
                result = "a directory"
            elif isinstance(result, int):
                side.handles[slot] = result
                result = "opened"
            results.append(result)
        self._same(results)

    @rule(slot=slots)
    def close(self, slot: int) -> None:
        if self.has(slot):
            self._same([os.close(side.handles.pop(slot)) for side in self.sides])

    @rule(slot=slots, offset=offsets, data=data)
    def pwrite(self, slot: int, offset: int, data: bytes) -> None:
        if self.has(slot):
            self.on_open(slot, os.pwrite, data, offset)

    @rule(slot=slots, data=data)
    def write(self, slot: int, data: bytes) -> None:
        if self.has(slot):
            self.on_open(slot, os.write, data)

    @rule(slot=slots, offset=offsets, length=lengths)
    def pread(self, slot: int, offset: int, length: int) -> None:
        if self.has(slot):
            self.on_open(slot, os.pread, length, offset)

    @rule(slot=slots, length=lengths)
    def read(self, slot: int, length: int) -> None:
        if self.has(slot):
            self.on_open(slot, os.read, length)

    @rule(
        slot=slots,
        offset=offsets,
        whence=st.sampled_from((os.SEEK_SET, os.SEEK_CUR, os.SEEK_END, os.SEEK_DATA, os.SEEK_HOLE)),
    )
    def seek(self, slot: int, offset: int, whence: int) -> None:
        if self.has(slot):
            self.on_open(slot, os.lseek, offset, whence)

    @rule(slot=slots, length=lengths)
    def ftruncate(self, slot: int, length: int) -> None:
        if self.has(slot):
            self.on_open(slot, os.ftruncate, length)

    @rule(slot=slots, offset=offsets, data=data)
    def write_mapped(self, slot: int, offset: int, data: bytes) -> None:
        if self.has(slot):
            self.on_open(slot, posix_model.write_mapped, offset, data)

    @rule(slot=slots)
    def read_mapped(self, slot: int) -> None:
        if self.has(slot):
            self.on_open(slot, posix_model.read_mapped)

    @rule(
        slot=slots,
        mode=st.sampled_from(
            (0, KEEP_SIZE, KEEP_SIZE | PUNCH_HOLE, ZERO_RANGE, ZERO_RANGE | KEEP_SIZE, PUNCH_HOLE)
        ),
        offset=offsets,
        length=lengths,
    )
    def fallocate(self, slot: int, mode: int, offset: int, length: int) -> None:
        if self.has(slot):
            self.on_open(slot, posix_model.fallocate, mode, offset, length)

    @rule(slot=slots, mode=modes)
    def fchmod(self, slot: int, mode: int) -> None:
        if self.has(slot):
            self.on_open(slot, os.fchmod, mode)

    @rule(slot=slots, uid=ids, gid=ids)
    def fchown(self, slot: int, uid: int, gid: int) -> None:
        if self.has(slot) and (uid, gid) != (-1, -1):
            self.on_open(slot, os.fchown, uid, gid)

    @rule(slot=slots, moment=st.integers(10**18, 10**18 + 10**10))
    def futimens(self, slot: int, moment: int) -> None:
        if self.has(slot):
            self.on_open(slot, lambda fd: os.utime(fd, ns=(moment, moment + 1)))

    @rule(slot=slots)
    def fsync(self, slot: int) -> None:
        if self.has(slot):
            self.on_open(slot, os.fsync)

    @rule(user=users, path=paths, length=lengths)
    def truncate(self, user: User, path: str, length: int) -> None:
        self.both(user, os.truncate, path, length)

    @rule(user=users, path=paths, mode=modes)
    def chmod(self, user: User, path: str, mode: int) -> None:
        self.both(user, os.chmod, path, mode)

    @rule(user=users, path=paths, uid=ids, gid=ids)
    def chown(self, user: User, path: str, uid: int, gid: int) -> None:
        if (uid, gid) == (-1, -1):
            return  # libfuse tells nobody of it, so that not even ctime changes
        self.both(user, os.lchown, path, uid, gid)

    @rule(user=users, path=paths, accessed=moments, modified=moments)
    def utimens(
        self, user: User, path: str, accessed: tuple[int, int], modified: tuple[int, int]
    ) -> None:
        self.both(user, posix_model.utimensat, path, accessed, modified)

    @rule(user=users, old=paths, new=paths, flags=st.sampled_from((0, 0, 1, 2, 3, 8)))
    def rename(self, user: User, old: str, new: str, flags: int) -> None:
        self.both(user, posix_model.renameat2, old, new, flags)

    @rule(user=users, old=paths, new=paths)
    def link(self, user: User, old: str, new: str) -> None:
        self.both(user, lambda: os.link(old, new, follow_symlinks=False))

    @rule(user=users, to=paths, path=paths)
    def symlink(self, user: User, to: str, path: str) -> None:
        self.both(user, os.symlink, to, path)

    @rule(user=users, path=paths)
    def unlink(self, user: User, path: str) -> None:
        self.both(user, os.unlink, path)

    @rule(user=users, path=directories, mode=modes)
    def mkdir(self, user: User, path: str, mode: int) -> None:
        self.both(user, os.mkdir, path, mode)

    @rule(user=users, path=directories)
    def rmdir(self, user: User, path: str) -> None:
        self.both(user, os.rmdir, path)

    @rule(
        user=users,
        path=paths,
        mode=modes,
        kind=st.sampled_from((stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFREG, stat.S_IFCHR)),
    )
    def mknod(self, user: User, path: str, mode: int, kind: int) -> None:
        self.both(user, os.mknod, path, kind | mode, os.makedev(1, 3))

    @rule(user=users, path=paths)
    def listdir(self, user: User, path: str) -> None:
        self.both(user, lambda: sorted(os.listdir(path)))

    @rule(user=users, path=paths, mode=st.sampled_from((os.R_OK, os.W_OK, os.X_OK, os.F_OK)))
    def access(self, user: User, path: str, mode: int) -> None:
        self.both(user, lambda: os.access(path, mode, effective_ids=True))

    @rule(
        user=users,
        path=paths,
        name=attributes,
        value=st.sampled_from((b"", b"1", b"x" * 300, b"x" * 70_000)),
        flags=st.sampled_from((0, 0, os.XATTR_CREATE, os.XATTR_REPLACE)),
    )
    def setxattr(self, user: User, path: str, name: str, value: bytes, flags: int) -> None:
        self.both(user, lambda: os.setxattr(path, name, value, flags, follow_symlinks=False))

    @rule(user=users, path=paths, name=attributes)
    def getxattr(self, user: User, path: str, name: str) -> None:
        self.both(user, lambda: os.getxattr(path, name, follow_symlinks=False))

    @rule(user=users, path=paths, name=attributes)
    def removexattr(self, user: User, path: str, name: str) -> None:
        self.both(user, lambda: os.removexattr(path, name, follow_symlinks=False))


@pytest.fixture(scope="module")
def both_places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    root = tmp_path_factory.mktemp("model")
    native = root / "native"
    native.mkdir()
    options = ("-o", "dev,suid") if ROOT in USERS else ()
    with mounted_at(root, *options) as mount:
        until(mount.has_index)
        yield mount.dir, native


def test_a_mount_is_as_a_disk(both_places: tuple[Path, Path]) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    Machine.mounted, Machine.native = both_places
    umask = os.umask(0o022)
    try:
        run_state_machine_as_test(Machine, settings=_BOUNDED)
    finally:
        os.umask(umask)
