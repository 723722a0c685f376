"""The store: the plain directory behind a mount, reached by directory descriptors only.

No symlink is followed in any path, by ``openat2`` or one component at a time with ``O_NOFOLLOW``,
so nothing that memfs opens lies outside the store, whatever is put into it and whenever. Used by
every package above; one ``Store`` is shared by all threads (it holds one descriptor and changes
nothing after ``open``).
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from memfs.cube import layout
from memfs.errors import NotAllowed, NotFound
from memfs.vault.beneath import OFFERED, open_beneath

HIDDEN_DIR = f"{layout.CONTROL}/unlinked"
"""Where files stay that were unlinked while open; emptied at every mount."""

_NO_CONTROL = frozenset(
    {errno.ENOENT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT}
)
"""Why there may be no control directory, and none to be made."""
_DIRECTORY = os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_STEP = os.O_PATH | _DIRECTORY
"""A directory passed through needs the right to search it, not to read it."""
_OUTSIDE = re.compile(r"(?:^|/)\.{0,2}(?:/|\Z)|\0")
"""What no path in a store has: an empty part, ``.``, ``..``, or a NUL."""
_LONGEST = 1000
"""Characters that are fewer bytes than the kernel takes in one path."""


class Store:
    """An open store. Paths are as in ``memfs.cube.layout``: relative, ``""`` being the root."""

    def __init__(self, root: Path, fd: int, *, writable: bool) -> None:
        self.root = root
        """The root's real path: names the store, and is never used to open anything in it."""
        self.fd = fd
        self.writable = writable
        """Whether ``control_dir`` can be written; where not, the index lives elsewhere."""

    @classmethod
    def open(cls, root: Path, *, create_control: bool = True) -> Store:
        """The store at ``root``, its control directory made unless that was not asked or cannot be.

        Raises:
            NotFound: there is no such directory.
            NotAllowed: its control directory is a symlink or a file.
        """
        real = Path(os.path.realpath(root))
        try:
            fd = os.open(real, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError) as e:
            raise NotFound(f"{root}: no such directory") from e
        try:
            return cls(real, fd, writable=_control(fd, real, create=create_control))
        except BaseException:
            os.close(fd)
            raise

    @property
    def read_only(self) -> bool:
        """Whether nothing can be written: a read-only filesystem, or no right to the directory."""
        return not self.writable and not os.access(".", os.W_OK, dir_fd=self.fd)

    @property
    def control_dir(self) -> Path:
        """memfs's own directory on disk: the index and the lock; no part of the store's content."""
        return self.root / layout.CONTROL

    def close(self) -> None:
        """Gives the descriptor back. The store is not used any more."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def open_dir(self, path: str) -> int:
        """A descriptor of a directory, to be closed by the caller. A symlink gives ``ELOOP``."""
        if path and _at_once(path):
            _require_inside(path)
            return open_beneath(self.fd, path, os.O_RDONLY | os.O_DIRECTORY)
        parent, name = self._parent(path)
        try:
            return _step(name or ".", parent, os.O_RDONLY | _DIRECTORY, path)
        finally:
            os.close(parent)

    @contextlib.contextmanager
    def opened(self, path: str) -> Iterator[int]:
        """``open_dir`` for as long as the body runs."""
        fd = self.open_dir(path)
        try:
            yield fd
        finally:
            os.close(fd)

    def enter(self, path: str, look: Callable[[int, str], None] = lambda _fd, _path: None) -> int:
        """A descriptor of a directory, good for what is in it (O_PATH), reached step by step.

        Args:
            look: is given each directory on the way and its path, the root first and this one
                last, before anything in it is touched; what it raises ends the walk.
        """
        _require_inside(path)
        fd, reached = os.dup(self.fd), ""
        try:
            look(fd, reached)
            for name in path.split("/") if path else ():
                below = _step(name, fd, _STEP, path)
                os.close(fd)
                fd, reached = below, layout.join(reached, name)
                look(fd, reached)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def open_file(self, path: str, flags: int = os.O_RDONLY, mode: int = 0o600) -> int:
        """A descriptor of a file, opened (or made) with ``flags``. A symlink gives ``ELOOP``."""
        if not flags & os.O_CREAT and _at_once(path):
            _require_inside(path)
            return open_beneath(self.fd, path or ".", flags | os.O_NOFOLLOW)
        parent, name = self._parent(path)
        try:
            return os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, mode, dir_fd=parent)
        finally:
            os.close(parent)

    def open_regular(self, path: str, flags: int = os.O_RDONLY) -> int:
        """A descriptor of a file that is an ordinary one, which every file of a cube must be.

        Raises NotAllowed for anything else. No device is opened, and no fifo can make us wait.
        """
        parent, name = self._parent(path)
        try:
            return open_regular_at(parent, name, flags, shown=path)
        finally:
            os.close(parent)

    def stat(self, path: str) -> os.stat_result:
        """The status of what is at ``path``, of a symlink itself where it is one."""
        if "/" not in path:
            if not path:
                return os.fstat(self.fd)
            _require_inside(path)
            return os.stat(path, dir_fd=self.fd, follow_symlinks=False)
        if _at_once(path):
            _require_inside(path)
            fd = open_beneath(self.fd, path, os.O_PATH | os.O_NOFOLLOW)
            try:
                return os.fstat(fd)
            finally:
                os.close(fd)
        parent, name = self._parent(path)
        try:
            return os.stat(name, dir_fd=parent, follow_symlinks=False)
        finally:
            os.close(parent)

    def read(self, path: str, limit: int) -> bytes:
        """The whole of an ordinary file; ``EFBIG`` where it is longer than ``limit`` bytes."""
        fd = self.open_regular(path)
        try:
            return read_all(fd, limit, shown=path)
        finally:
            os.close(fd)

    def walk(
        self, top: str = "", failed: Callable[[str, OSError], None] | None = None
    ) -> Iterator[tuple[str, list[str]]]:
        """Every directory from ``top`` down with the names in it, but for the control directory.

        Never through a symlink, nor into what is being published. What vanishes or may not be read
        meanwhile is left out; ``failed`` is told of it.
        """
        pending = [top]
        while pending:
            path = pending.pop()
            try:
                with self.opened(path) as fd, os.scandir(fd) as entries:
                    found = [(e.name, e.is_dir(follow_symlinks=False)) for e in entries]
            except OSError as e:
                if failed is not None:
                    failed(path, e)
                continue
            if not path:
                found = [item for item in found if item[0] != layout.CONTROL]
            yield path, [name for name, _ in found]
            below = [name for name, is_dir in found if is_dir and not layout.is_temporary(name)]
            pending += [layout.join(path, name) for name in below]

    def _parent(self, path: str) -> tuple[int, str]:
        """A descriptor of the directory that ``path`` is in, and its name there; root is ``""``."""
        _require_inside(path)
        above, _, name = path.rpartition("/")
        if above and _at_once(above):
            return open_beneath(self.fd, above, os.O_PATH | os.O_DIRECTORY), name
        return self.enter(above), name


def _at_once(path: str) -> bool:
    """Whether a path can be opened in one call: a longer one is walked."""
    return OFFERED and len(path) < _LONGEST


def _require_inside(path: str) -> None:
    if path and _OUTSIDE.search(path):
        raise OSError(errno.EINVAL, "not a path within the store", path)


def give_to_owner(store: Store, fd: int) -> None:
    """Makes an open file of ours the store owner's, so that root's mount does not shut him out."""
    if os.geteuid() == 0:
        owner = os.fstat(store.fd)
        os.fchown(fd, owner.st_uid, owner.st_gid)


def remove_tree(directory: int, name: str) -> None:
    """Removes what is below a name in an open directory, and that; what is read-only there, too.

    Raises OSError where something cannot be removed.
    """
    _open_up(directory, name)
    try:
        for _, below, _, fd in os.fwalk(name, dir_fd=directory):
            for inner in below:
                _open_up(fd, inner)
        shutil.rmtree(name, dir_fd=directory)
    except RecursionError:
        raise OSError(errno.ENAMETOOLONG, "too deep to be removed", name) from None


def _open_up(parent: int, name: str) -> None:
    """Lets the owner of a directory into it, and take things out of it."""
    with contextlib.suppress(OSError):  # another's, or a symlink
        fd = os.open(name, _STEP, dir_fd=parent)
        try:
            mode = stat.S_IMODE(os.fstat(fd).st_mode)
            if mode & stat.S_IRWXU != stat.S_IRWXU:
                os.chmod(f"/proc/self/fd/{fd}", mode | stat.S_IRWXU)
        finally:
            os.close(fd)


def open_regular_at(parent: int, name: str, flags: int = os.O_RDONLY, *, shown: str = "") -> int:
    """``Store.open_regular`` for a name in an open directory; ``shown`` is what errors call it."""
    shown = shown or name
    found = os.stat(name, dir_fd=parent, follow_symlinks=False)
    if not stat.S_ISREG(found.st_mode):
        raise NotAllowed(f"{shown} is not a regular file")
    # Another file may stand there by now, so the descriptor is asked again.
    fd = os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=parent)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise NotAllowed(f"{shown} is not a regular file")
    return fd


def read_all(fd: int, limit: int, *, shown: str = "") -> bytes:
    """Everything in an open file; ``EFBIG`` where that is more than ``limit`` bytes."""
    parts = []
    left = limit + 1
    while left and (part := os.read(fd, min(left, 1 << 20))):
        parts.append(part)
        left -= len(part)
    if not left:
        raise OSError(errno.EFBIG, f"longer than {limit} bytes", shown)
    return b"".join(parts)


def _step(name: str, parent: int, flags: int, path: str) -> int:
    """Opens a directory in ``parent``; a symlink there is ELOOP, where the kernel says ENOTDIR."""
    try:
        return os.open(name, flags, dir_fd=parent)
    except NotADirectoryError:
        if stat.S_ISLNK(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path) from None
        raise


def _control(fd: int, root: Path, *, create: bool) -> bool:
    """Makes the control directory where it is missing; whether it is there and can be written.

    It is the store owner's, so that a mount made by root does not shut the owner out.
    """
    try:
        if create:
            _make_control(fd, os.fstat(fd))
        found = os.stat(layout.CONTROL, dir_fd=fd, follow_symlinks=False)
    except OSError as e:
        if e.errno in _NO_CONTROL:
            return False
        raise
    if not stat.S_ISDIR(found.st_mode):
        raise NotAllowed(f"{root / layout.CONTROL} is not a directory")
    return os.access(layout.CONTROL, os.W_OK | os.X_OK, dir_fd=fd, follow_symlinks=False)


def _make_control(fd: int, owner: os.stat_result) -> None:
    try:
        os.mkdir(layout.CONTROL, 0o700, dir_fd=fd)
    except FileExistsError:
        return
    control = os.open(layout.CONTROL, os.O_RDONLY | _DIRECTORY, dir_fd=fd)
    try:
        ignore = os.open(".gitignore", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644, dir_fd=control)
        try:
            os.write(ignore, b"*\n")
            if os.geteuid() == 0:
                os.fchown(ignore, owner.st_uid, owner.st_gid)
                os.fchown(control, owner.st_uid, owner.st_gid)
        finally:
            os.close(ignore)
    finally:
        os.close(control)
