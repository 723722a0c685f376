"""Files that are written beside their place and appear there whole: KV caches, adapters, headers.

A program opens such a file for writing, and its writes go to a temporary file in the same
directory. Closing it checks what was written (a header only), flushes it to the disk and renames it
into place: what others have open or mapped is never changed under them, and a crash leaves the old
file. Until then the mount shows the temporary file under the path, so that ``fchmod`` or
``futimens`` before the close reach it.

Every close of every duplicate of the descriptor is told of, and which is the last is not known: a
shell closes one before the program that it starts has written anything, and a program that starts
another one closes the other's. So the closes of a process that has not written are no ends, a file
that was emptied and nothing else is left alone until the last one is gone, and one that was refused
goes on with what it has.

An ``fsync`` of what is a whole safetensors file puts it into place too: flushed is kept. What is
half written is only flushed, and gone after a crash.

Programs that have the file open for writing at once share one ``Staged``. Any thread; each holds a
lock of its own while it writes, so two writes never both start a copy.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import secrets
import stat
import threading
from collections.abc import Callable

from memfs.cube import adapter, layout
from memfs.errors import MemfsError
from memfs.filesystem import syscalls
from memfs.filesystem.attributes import Status
from memfs.filesystem.backing import Backing, give, mode_of_new
from memfs.filesystem.context import Context
from memfs.filesystem.handles.handle import Handle
from memfs.vault.rights import acl_bytes, dress, write_acl
from memfs.vault.xattrs import copy_own

log = logging.getLogger(__name__)

Published = Callable[[str], None]
"""Is told the path of a file that now stands in its place."""


class Staged(Handle):
    """A file open for writing that is published whole at each close after a change."""

    writes = True
    direct_io = True  # its pages would be taken for those of the file that stands there now
    limit: int | None = None
    """The longest it may be."""

    def __init__(
        self,
        path: str,
        backing: Backing,
        context: Context,
        published: Published,
        require_writable: Callable[[str], None] | None = None,
    ) -> None:
        """``require_writable`` raises where the file may not be published at a path any more."""
        super().__init__(path)
        self._require_writable = require_writable
        self._backing = backing
        self._context = context
        self._published = published
        self._lock = threading.RLock()  # the content; names are under ``backing.moving``
        self._users = 1
        self._fd = -1  # the temporary file, or what it became; -1 before the first use
        self._temporary: str | None = None  # its path in the store while it stands beside
        self._written = False  # since it was emptied, or published
        self._refused: Exception | None = None  # why the present content was not taken
        self._writers: set[int] = set()  # the processes that wrote since, as the kernel calls them

    def share(self) -> bool:
        """One more program opens it; False where the last one is just closing it."""
        with self._lock:
            if self._users:
                self._users += 1
            return self._users > 0

    def written_by(self, owner: int) -> None:
        """A process is about to write; threads of one are one owner, a child is another."""
        self._writers.add(owner)

    def is_closed_by(self, owner: int) -> bool:
        """Whether a close by this process may be the end of what was written."""
        return not self._writers or owner in self._writers

    def begin(self, mode: int | None = None) -> None:
        """Starts from nothing; with a ``mode``, as a new file of the caller's."""
        with self._lock:
            if self._temporary is None:
                self._start(mode)
            else:
                self._show(self._temporary)
                os.ftruncate(self._fd, 0)
            self._written, self._refused = False, None

    def read(self, buffer: memoryview, offset: int) -> int:
        with self._lock:
            if self._fd < 0:
                self._fd = self._open_standing()
            return os.preadv(self._fd, [buffer], offset) if self._fd >= 0 else 0

    def write(self, buffer: memoryview, offset: int) -> int:
        with self._lock:
            self._require_room(offset + len(buffer))
            self._change()
            try:
                return os.pwrite(self._fd, buffer, offset)
            except OSError as e:  # the disk is full: what is there is not what was meant
                self._refused = e
                raise

    def truncate(self, length: int) -> None:
        with self._lock:
            self._require_room(length)
            if length == 0:
                self.begin()
                self._written = True  # it was asked for, and not just how the file was opened
            else:
                self._change()
                os.ftruncate(self._fd, length)

    def fallocate(self, mode: int, offset: int, length: int) -> None:
        with self._lock:
            self._require_room(offset + length)
            self._change()
            syscalls.fallocate(self._fd, mode, offset, length)

    def status(self) -> Status | None:
        with self._lock:
            return os.fstat(self._fd) if self._temporary is not None else None

    def flush(self) -> None:
        with self._lock:
            if self._temporary is None or self.path is None or not self._written:
                return
            if self._refused is not None:
                self._withdraw()
                raise self._refused
            try:
                if not self._accept(self.path):
                    self._discard()
                    return
                placed = self._place()
            except Exception as e:
                self._refused = e
                self._withdraw()
                raise
        if placed is not None:
            self._published(placed)

    def settle(self) -> None:
        """What was written is put into place before its name is used for something else."""
        self.flush()
        with self._lock:
            self._end_empty()

    def fsync(self, *, data_only: bool) -> None:  # noqa: ARG002
        """To the disk, and into place where it is whole: a program may flush half a file."""
        with self._lock:
            if self._fd >= 0:
                os.fsync(self._fd)
            whole = self._temporary is not None and adapter.is_whole(self._fd)
        if whole:
            self.flush()

    def release(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users:
                return
            try:
                self.flush()  # where no close was told of: a file served on by NFS
                self._end_empty()
            except (OSError, MemfsError) as e:
                log.warning("%s was not put into place: %s", self.path, e)
            self._discard()
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1

    def moved(self, old: str, new: str) -> None:
        """Called under ``backing.moving``, which has moved the path of the temporary file too."""
        super().moved(old, new)
        if self._temporary is not None and self._temporary.startswith(old + "/"):
            self._temporary = new + self._temporary[len(old) :]

    def unlinked(self, hidden: str | None) -> None:
        """What was shown under its path has been linked or moved to where ``hidden`` lies."""
        with self._backing.moving:
            temporary = self._temporary if self._is_shown() else None
            self._withdraw()
            self.path = None
            if temporary is not None and hidden is not None:
                self._temporary = self._backing.elsewhere.get(hidden, temporary)
                if self._temporary != temporary:
                    with contextlib.suppress(FileNotFoundError):  # it was moved
                        self._backing.unlink(temporary)

    def named(self, path: str) -> None:
        with self._backing.moving:
            super().named(path)
            if self._temporary is not None:
                self._show(self._temporary)

    def _accept(self, path: str) -> bool:
        """Looks at what was written; False where there is nothing to publish after all."""
        if self._require_writable is not None:
            self._require_writable(path)
        return True

    def _end_empty(self) -> None:
        """If it was emptied when it was opened, and nothing was written, that is how it stays."""
        if self._temporary is not None and self.path is not None and not self._written:
            self._accept(self.path)
            placed = self._place()
            if placed is not None:
                self._published(placed)

    def _require_room(self, size: int) -> None:
        if self.limit is not None and size > self.limit:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))

    def _change(self) -> None:
        """There is a temporary file with the present content, to be changed."""
        self._written, self._refused = True, None
        if self._temporary is not None:
            self._show(self._temporary)
        else:
            standing = self._fd if self._fd >= 0 else self._open_standing()
            self._fd = -1
            try:
                self._start(None)
                if standing >= 0:
                    self._fill(standing)
            except BaseException:
                self._discard()
                raise
            finally:
                if standing >= 0:
                    os.close(standing)

    def _fill(self, standing: int) -> None:
        """Copies what the file holds now into the new temporary file."""
        offset, size = 0, os.fstat(standing).st_size
        while offset < size:
            done = os.sendfile(self._fd, standing, offset, size - offset)
            if not done:
                break
            offset += done

    def _start(self, mode: int | None) -> None:
        """Makes the temporary file, empty, and shows it under the path."""
        with self._backing.moving:
            path = self._named()
            name = layout.TEMPORARY + secrets.token_hex(8)
            temporary = layout.join(layout.split(path)[0], name)
            with self._backing.at(temporary) as (parent, name):
                flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
                fd = os.open(name, flags, 0o600, dir_fd=parent)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # see publish.remove_leftover
                    self._dress(fd, parent, mode)
                except BaseException:
                    os.close(fd)
                    os.unlink(name, dir_fd=parent)
                    raise
            if self._fd >= 0:
                os.close(self._fd)
            self._fd, self._temporary = fd, temporary
            self._show(temporary)

    def _dress(self, fd: int, parent: int, mode: int | None) -> None:
        """Rights and attributes of the file it replaces, or rights of a new one of the caller's."""
        if mode is None:
            try:
                like = self._backing.status(self._named())
            except FileNotFoundError:
                mode = 0o644
            else:
                if os.geteuid() == 0:
                    os.fchown(fd, like.st_uid, like.st_gid)
                store, named = self._backing.store, self._named()
                write_acl(fd, acl_bytes(store, self._backing.elsewhere.get(named, named)))
                os.fchmod(fd, stat.S_IMODE(like.st_mode))
                with self._backing.at(named) as (above, name):
                    copy_own(above, name, fd)
                return
        give(fd, parent, self._context)
        os.fchmod(fd, mode_of_new(mode, parent, self._context))

    def _open_standing(self) -> int:
        """The file that stands there now; -1 where one is only shown, as it could be made."""
        try:
            return self._backing.open(self._named(), os.O_RDONLY)
        except FileNotFoundError:
            return -1

    def _named(self) -> str:
        if self.path is None:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return self.path

    def _show(self, temporary: str) -> None:
        """The mount shows the temporary file under the path."""
        with self._backing.moving:
            if self.path is not None:
                self._backing.elsewhere.show(self.path, temporary)

    def _is_shown(self) -> bool:
        if self.path is None or self._temporary is None:
            return False
        return self._backing.elsewhere.get(self.path, self.path) == self._temporary

    def _withdraw(self) -> None:
        """The mount shows the file that stands there again."""
        with self._backing.moving:
            if self.path is not None and self._is_shown():
                self._backing.elsewhere.forget(self.path)

    def _place(self) -> str | None:
        """Renames it into place; its path there, or None where it was unlinked meanwhile."""
        if self.path is not None:
            dress(self._backing.store, layout.classify(self.path)[1], self._fd)
        os.fsync(self._fd)
        with self._backing.moving:
            path, temporary = self.path, self._temporary
            if path is None or temporary is None:
                return None
            self._backing.rename(temporary, path)
            self._backing.elsewhere.forget_file(temporary)  # in this order: it is always somewhere
            self._temporary, self._written = None, False
            self._writers.clear()
            fcntl.flock(self._fd, fcntl.LOCK_UN)
            directory = self._backing.store.open_dir(layout.split(path)[0])
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
        return path

    def _discard(self) -> None:
        """Removes the temporary file, where there is one still."""
        with self._backing.moving:
            temporary, self._temporary = self._temporary, None
            if temporary is None:
                return
            self._backing.elsewhere.forget_file(temporary)
            try:
                self._backing.unlink(temporary)
            except FileNotFoundError:
                pass  # renamed by _accept, or its directory was emptied beside the mount
        os.close(self._fd)
        self._fd = -1
