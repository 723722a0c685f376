# ruff: noqa: ARG002  a verb that a kind of file does not have takes its arguments all the same
"""Open files of the mount, and the plain kinds of them.

A handle keeps its path up to date through renames; None says that its file was unlinked. Handles
are used by several FUSE threads at once; a kind that keeps more than a descriptor says how it
locks.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator

from memfs.filesystem import syscalls
from memfs.filesystem.attributes import Status
from memfs.filesystem.backing import Backing


class Handle:
    """An open file. A verb that a kind does not define fails as the kernel would say it."""

    direct_io = False
    """Whether every read and write comes to us, past the kernel's page cache."""
    keep_cache = False
    """Whether pages cached by an earlier open are still good."""
    frozen = False
    """Whether its cube was frozen since it was opened."""
    noflush = False
    """Whether nobody needs to hear of a descriptor that is closed."""
    passes = False
    """Whether the kernel may read it from the store by itself: nobody needs to see the reads."""
    file: tuple[int, int] | None = None
    """Device and inode of the file in the store, where that is the same all the while."""
    refused = False
    """Whether a write was not taken since: the kernel may have cached what is nowhere else."""
    writes = False
    """Whether a cube changes by it: its closes tell of that."""

    def __init__(self, path: str | None) -> None:
        self.path = path

    def read(self, buffer: memoryview, offset: int) -> int:
        """Fills the buffer from the file's bytes at ``offset``; how many there were."""
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    def write(self, buffer: memoryview, offset: int) -> int:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    def truncate(self, length: int) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    def fallocate(self, mode: int, offset: int, length: int) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    def seek(self, offset: int, whence: int) -> int:
        """Where data or a hole begins from ``offset`` on: SEEK_DATA, SEEK_HOLE.

        Whoever copies a file goes without, where a kind of file cannot say it.
        """
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    def status(self) -> Status | None:
        """What ``fstat`` answers; None where the path is to be asked."""
        return None

    def flush(self) -> None:
        """A descriptor of it is being closed, and the closing program waits for this."""

    def fsync(self, *, data_only: bool) -> None:
        """Everything written is to be on the disk."""

    def release(self) -> None:
        """The last descriptor is gone. Nobody waits, and nobody hears of an error."""

    def moved(self, old: str, new: str) -> None:
        """``old``, a file or a directory with all below it, is now at ``new``."""
        if self.path == old:
            self.path = new
        elif self.path is not None and self.path.startswith(old + "/"):
            self.path = new + self.path[len(old) :]

    def unlinked(self, hidden: str | None) -> None:
        """Its name was taken away; ``hidden`` is the path that FUSE goes on to know it by."""
        self.path = None

    def named(self, path: str) -> None:
        """It has the name again that was taken away."""
        self.path = path


class OpenFile(Handle):
    """A file of the store, as it is."""

    noflush = True

    def __init__(self, path: str | None, fd: int, *, passes: bool = False) -> None:
        super().__init__(path)
        self.fd = fd
        self.passes = passes

    def read(self, buffer: memoryview, offset: int) -> int:
        return os.preadv(self.fd, [buffer], offset)

    def write(self, buffer: memoryview, offset: int) -> int:
        self._require_writable()
        return os.pwrite(self.fd, buffer, offset)

    def truncate(self, length: int) -> None:
        self._require_writable()
        os.ftruncate(self.fd, length)

    def fallocate(self, mode: int, offset: int, length: int) -> None:
        self._require_writable()
        syscalls.fallocate(self.fd, mode, offset, length)

    def seek(self, offset: int, whence: int) -> int:
        return os.lseek(self.fd, offset, whence)  # nothing else uses the descriptor's position

    def status(self) -> Status | None:
        return os.fstat(self.fd)

    def fsync(self, *, data_only: bool) -> None:
        if data_only:
            os.fdatasync(self.fd)
        else:
            os.fsync(self.fd)

    def release(self) -> None:
        os.close(self.fd)

    def _require_writable(self) -> None:
        if self.frozen:
            self.refused = True
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), self.path)


class OpenPayload(OpenFile):
    """The text of a cube, or its adapter's configuration: passed through, but its close is heard.

    ``changed`` is called with the path at every close, and at every ``fsync``, that follows a
    write, before the closing program goes on.
    """

    writes = True
    noflush = False

    def __init__(self, path: str, fd: int, changed: Callable[[str], None], *, dirty: bool) -> None:
        super().__init__(path, fd)
        self._changed = changed
        self._dirty = dirty

    def write(self, buffer: memoryview, offset: int) -> int:
        self._dirty = True
        return super().write(buffer, offset)

    def truncate(self, length: int) -> None:
        self._dirty = True
        super().truncate(length)

    def fallocate(self, mode: int, offset: int, length: int) -> None:
        self._dirty = True
        super().fallocate(mode, offset, length)

    def flush(self) -> None:
        if self._dirty:
            self._dirty = False  # before the look: a write meanwhile is looked at by its own close
            if self.path is not None:
                self._changed(self.path)

    def fsync(self, *, data_only: bool) -> None:
        super().fsync(data_only=data_only)
        self.flush()

    def release(self) -> None:
        super().release()
        self.flush()  # pages that were written through a mapping after the last close


class Snapshot(Handle):
    """Bytes made up at the open, the same for as long as it is open."""

    direct_io = True  # so that the kernel takes the end of it from us, not from an older size

    def __init__(self, path: str, data: bytes, status: Status) -> None:
        super().__init__(path)
        self.data = data
        self._status = status

    def read(self, buffer: memoryview, offset: int) -> int:
        return copy_into(buffer, self.data, offset)

    def status(self) -> Status | None:
        return self._status


class OpenDirectory(Handle):
    """A directory of the store."""

    def __init__(self, path: str, fd: int, backing: Backing) -> None:
        super().__init__(path)
        self.fd = fd
        self._backing = backing

    def entries(self) -> Iterator[tuple[str, int, int]]:
        """Name, kind and inode of each entry."""
        for name in (".", ".."):
            # An entry without an inode number would be left out by the C library.
            up = self.path and name == ".."
            yield name, stat.S_IFDIR, os.stat("..", dir_fd=self.fd).st_ino if up else self._ino()
        yield from self._backing.listing(self.fd, self.path or "")

    def _ino(self) -> int:
        return os.fstat(self.fd).st_ino

    def fsync(self, *, data_only: bool) -> None:
        os.fsync(self.fd)

    def release(self) -> None:
        os.close(self.fd)


def copy_into(buffer: memoryview, data: bytes, offset: int) -> int:
    """Copies ``data`` from ``offset`` on into the buffer; how many bytes that were."""
    part = data[offset : offset + len(buffer)]
    buffer[: len(part)] = part
    return len(part)
