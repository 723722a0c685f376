"""The store's files as the mount works on them: one system call a verb, by directory descriptor.

Nothing here knows what a cube is. A file that is being written beside its place (see ``staged``),
or that was unlinked while open, lies under another name than the mount shows: ``elsewhere`` says
where, and every verb on a path goes there; only what is renamed arrives at the very path. Used by
the tree and its handles; any thread.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
from collections.abc import Iterator

from memfs.cube import layout
from memfs.filesystem import syscalls
from memfs.filesystem.context import Context
from memfs.filesystem.elsewhere import Elsewhere, is_hidden
from memfs.vault.rename import renameat2
from memfs.vault.store import Store

_DEFAULT_LIST = "system.posix_acl_default"

_DROPPED = os.O_DIRECT | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_NOCTTY
"""Flags of an open that are not the backing file's: the kernel has acted on them already, and with
O_APPEND ``pwrite`` would ignore its offset."""


class Backing:
    """The verbs. All of them raise OSError."""

    def __init__(self, store: Store, *, noatime: bool = False) -> None:
        """``noatime`` says that reading a file through this mount leaves no access time."""
        self.store = store
        self._always = os.O_NOATIME if noatime else 0
        self.elsewhere = Elsewhere()
        self.moving = threading.RLock()
        """Held while a name in ``elsewhere`` comes, goes or is used, and while a directory is
        renamed: a file must not be put into its place through a path that no longer is, nor be
        looked for where it no longer lies.
        """

    @contextlib.contextmanager
    def at(self, path: str) -> Iterator[tuple[int, str]]:
        """A descriptor of the directory that a file is in, and its name there."""
        with self._placed(path) as real:
            parent, name = layout.split(real)
            with self.store.opened(parent) as fd:
                yield fd, name or "."

    @contextlib.contextmanager
    def _placed(self, path: str) -> Iterator[str]:
        """Where the file at a path lies, and goes on to lie for now."""
        if path not in self.elsewhere:  # and what leaves it is in its place before that
            yield path
        else:
            with self.moving:
                yield self.elsewhere.get(path, path)

    def status(self, path: str) -> os.stat_result:
        if path not in self.elsewhere:
            return self.store.stat(path)
        with self._placed(path) as real:
            return self.store.stat(real)

    def exists(self, path: str) -> bool:
        try:
            self.status(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def open(self, path: str, flags: int) -> int:
        """A descriptor; one to be written can be read too, as the kernel fills pages around a
        write.
        """
        flags = flags & ~_DROPPED | self._always
        if flags & os.O_ACCMODE == os.O_WRONLY:
            flags = flags & ~os.O_ACCMODE | os.O_RDWR
        with self._placed(path) as real:
            try:
                return self.store.open_file(real, flags)
            except PermissionError:
                # A file that may be written but not read, on a mount that is not root's; or an
                # O_NOATIME that the kernel gives only to the owner.
                if flags & os.O_ACCMODE == os.O_RDWR:
                    flags = flags & ~os.O_ACCMODE | os.O_WRONLY
                return self.store.open_file(real, flags & ~os.O_NOATIME)
            except FileNotFoundError:
                if is_hidden(path):  # it was replaced since its name was looked up, and then closed
                    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), path) from None
                raise

    def take_setuid(self, fd: int, context: Context) -> None:
        """Takes the setuid and setgid bits of a file whose content somebody has just emptied.

        The kernel leaves that to us where the open itself empties it, and root's mount keeps them.
        """
        mode = os.fstat(fd).st_mode
        if context.uid != 0 and mode & (stat.S_ISUID | stat.S_ISGID):
            os.fchmod(fd, stat.S_IMODE(mode) & ~(stat.S_ISUID | stat.S_ISGID))

    def create(self, path: str, mode: int, context: Context) -> int:
        """A descriptor of a new, empty file that belongs to the caller."""
        with self.at(path) as (parent, name):
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = os.open(name, flags, mode_of_new(mode, parent, context), dir_fd=parent)
            try:
                give(fd, parent, context)
            except BaseException:
                os.close(fd)
                raise
            return fd

    def mkdir(self, path: str, mode: int, context: Context) -> None:
        with self.at(path) as (parent, name):
            os.mkdir(name, mode_of_new(mode, parent, context), dir_fd=parent)
            _give_name(parent, name, context)

    def mknod(self, path: str, mode: int, device: int, context: Context) -> None:
        with self.at(path) as (parent, name):
            kind = stat.S_IFMT(mode)
            os.mknod(name, kind | mode_of_new(mode, parent, context), device, dir_fd=parent)
            _give_name(parent, name, context)

    def symlink(self, path: str, target: str, context: Context) -> None:
        with self.at(path) as (parent, name):
            os.symlink(target, name, dir_fd=parent)
            _give_name(parent, name, context)

    def link(self, old: str, new: str) -> None:
        with self.at(old) as (source, old_name), self.at(new) as (parent, name):
            os.link(old_name, name, src_dir_fd=source, dst_dir_fd=parent, follow_symlinks=False)

    def readlink(self, path: str) -> str:
        with self.at(path) as (parent, name):
            return os.readlink(name, dir_fd=parent)

    def unlink(self, path: str) -> None:
        with self.at(path) as (parent, name):
            os.unlink(name, dir_fd=parent)

    def rmdir(self, path: str) -> None:
        with self.at(path) as (parent, name):
            os.rmdir(name, dir_fd=parent)

    def rename(self, old: str, new: str, flags: int = 0) -> None:
        with self._placed(old) as real:
            self.move(real, new, flags)

    def move(self, old: str, new: str, flags: int = 0) -> None:
        """``rename`` of a file by its path in the store."""
        below, old_name = layout.split(old)
        above, name = layout.split(new)
        with self.store.opened(below) as source, self.store.opened(above) as parent:
            if flags:
                renameat2(source, old_name, parent, name, flags)
            else:
                os.rename(old_name, name, src_dir_fd=source, dst_dir_fd=parent)

    def chmod(self, path: str, mode: int) -> None:
        with self.at(path) as (parent, name), _reference(parent, name) as reference:
            os.chmod(reference, stat.S_IMODE(mode))

    def chown(self, path: str, uid: int, gid: int) -> None:
        with self.at(path) as (parent, name):
            os.chown(name, uid, gid, dir_fd=parent, follow_symlinks=False)

    def utimens(self, path: str, accessed: syscalls.Time, modified: syscalls.Time) -> None:
        with self.at(path) as (parent, name):
            syscalls.utimensat(parent, name, accessed, modified)

    def truncate(self, path: str, length: int) -> None:
        fd = self.open(path, os.O_WRONLY | os.O_NONBLOCK)
        try:
            os.ftruncate(fd, length)
        finally:
            os.close(fd)

    def statfs(self) -> os.statvfs_result:
        return os.fstatvfs(self.store.fd)

    def getxattr(self, path: str, name: str) -> bytes:
        with self.at(path) as (parent, last):
            return os.getxattr(_below(parent, last), name, follow_symlinks=False)

    def listxattr(self, path: str) -> list[str]:
        with self.at(path) as (parent, last):
            return os.listxattr(_below(parent, last), follow_symlinks=False)

    def setxattr(self, path: str, name: str, value: bytes, flags: int) -> None:
        with self.at(path) as (parent, last):
            os.setxattr(_below(parent, last), name, value, flags, follow_symlinks=False)

    def removexattr(self, path: str, name: str) -> None:
        with self.at(path) as (parent, last):
            os.removexattr(_below(parent, last), name, follow_symlinks=False)

    def listing(self, fd: int, path: str) -> Iterator[tuple[str, int, int]]:
        """Name, kind (as in st_mode) and inode of everything in an open directory of the store.

        memfs's own files are left out; a file that is being written beside its place is in.
        """
        aside = dict(self.elsewhere.below(path))
        with os.scandir(fd) as entries:
            for entry in entries:
                shown = not layout.is_temporary(entry.name)
                if shown and layout.join(path, entry.name) != layout.CONTROL:
                    aside.pop(entry.name, None)
                    yield entry.name, _kind(entry), entry.inode()
        for name, real in aside.items():
            try:
                found = self.store.stat(real)
            except FileNotFoundError:
                continue
            yield name, stat.S_IFMT(found.st_mode), found.st_ino


def is_reserved(path: str) -> bool:
    """Whether a name is memfs's own: never shown, and not to be made by anybody else.

    Directories for cubes that are put together are: they are never listed, but for ``memfs load``
    to make and use.
    """
    name = layout.split(path)[1]
    own = layout.is_temporary(name) and not name.startswith(layout.INCOMING)
    return own or path == layout.CONTROL


@contextlib.contextmanager
def _reference(parent: int, name: str) -> Iterator[str]:
    """A path that names this very file, never what a symlink there points to."""
    fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    try:
        yield f"/proc/self/fd/{fd}"
    finally:
        os.close(fd)


def mode_of_new(mode: int, parent: int, context: Context) -> int:
    """Permissions of a file to be made in an open directory.

    A default access list of the directory, which its disk applies, takes the place of the umask.
    """
    mode = stat.S_IMODE(mode)
    if mode & context.umask:
        try:
            os.getxattr(parent, _DEFAULT_LIST)
        except OSError:  # there is none, or the disk knows no such thing
            return mode & ~context.umask
    return mode


def give(fd: int, parent: int, context: Context) -> None:
    """Gives an open file that this process made in the directory ``parent`` to the caller."""
    found = os.fstat(fd)
    uid, gid = _owner(found, os.fstat(parent), context)
    if (uid, gid) != (found.st_uid, found.st_gid):
        os.fchown(fd, uid, gid)
        os.fchmod(fd, stat.S_IMODE(found.st_mode))  # chown took the setuid and setgid bits


def _give_name(parent: int, name: str, context: Context) -> None:
    found = os.stat(name, dir_fd=parent, follow_symlinks=False)
    uid, gid = _owner(found, os.fstat(parent), context)
    if (uid, gid) != (found.st_uid, found.st_gid):
        os.chown(name, uid, gid, dir_fd=parent, follow_symlinks=False)
        if not stat.S_ISLNK(found.st_mode) and found.st_mode & (stat.S_ISUID | stat.S_ISGID):
            with _reference(parent, name) as reference:
                os.chmod(reference, stat.S_IMODE(found.st_mode))  # chown took these bits


def _owner(found: os.stat_result, parent: os.stat_result, context: Context) -> tuple[int, int]:
    """Owner and group that a new file should have. Only root's mount makes files for others."""
    if os.geteuid() != 0:
        return found.st_uid, found.st_gid
    inherited = bool(parent.st_mode & stat.S_ISGID)
    return context.uid, found.st_gid if inherited else context.gid


def _below(parent: int, name: str) -> str:
    return f"/proc/self/fd/{parent}/{name}"


def _kind(entry: os.DirEntry[str]) -> int:
    """The file type bits of an entry, from the listing itself where the filesystem says them."""
    if entry.is_symlink():
        return stat.S_IFLNK
    if entry.is_dir(follow_symlinks=False):
        return stat.S_IFDIR
    if entry.is_file(follow_symlinks=False):
        return stat.S_IFREG
    try:
        return stat.S_IFMT(entry.stat(follow_symlinks=False).st_mode)
    except FileNotFoundError:
        return stat.S_IFREG
