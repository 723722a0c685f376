"""The two blobs of a cube as they are looked at and opened: ``kv.safetensors`` and an adapter's
weights.

Where a cube has text and no KV cache, one is shown to whoever asks for it by name, and made when it
is opened. A KV cache of an older text, made by the model that is resident now, is made anew in the
same way: it is of no more use to anybody. What another model made, or what is damaged, is served as
it is to who reads it; that first use has it made anew behind the reader's back (see ``renewal``).
Used by the tree; any thread.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable

from memfs.cube import layout
from memfs.cube.fingerprint import MODEL_FIELDS
from memfs.filesystem.attributes import Attributes, Status, altered
from memfs.filesystem.backing import Backing
from memfs.filesystem.catalogue import Catalogue
from memfs.filesystem.context import Context, creates, likely_creates
from memfs.filesystem.guard import Guard
from memfs.filesystem.handles.handle import Handle
from memfs.filesystem.handles.making import Makers, OpenPending
from memfs.filesystem.handles.reading import OpenBlob, Reading
from memfs.filesystem.link import Making

_PROMISES = 4096
_NEW_SECONDS = 60.0
"""Within this time of its last write a payload may be one of a cube that is just being copied."""


class Blobs:
    """The blobs of all cubes."""

    def __init__(
        self,
        backing: Backing,
        catalogue: Catalogue,
        reading: Reading,
        makers: Makers,
        guard: Guard,
        context: Callable[[], Context],
    ) -> None:
        self._guard = guard
        self._backing = backing
        self._catalogue = catalogue
        self._reading = reading
        self._makers = makers
        self._context = context
        self._promised: dict[int, int] = {}
        """Inode numbers of KV caches that were shown under another one before they were there."""

    def status(self, path: str, role: layout.Role, cube: str) -> Status:
        """What is shown of a blob. Raises FileNotFoundError where there is none, nor can be."""
        try:
            return self.shown(self._backing.status(path))
        except FileNotFoundError:
            if role is not layout.Role.KV:
                raise
            return self._promise(path, cube)

    def shown(self, found: os.stat_result) -> Status:
        """The status of a KV cache's file, under the inode number it was promised with."""
        ino = self._promised.get(found.st_ino)
        return found if ino is None else altered(found, st_ino=ino)

    def inode(self, ino: int) -> int:
        """The number under which a KV cache's file is listed."""
        return self._promised.get(ino, ino)

    def open(self, path: str, role: layout.Role, cube: str, flags: int) -> Handle:
        """Opens a blob for reading; where it can only be made, the caller waits for that."""
        context = self._context()
        mounts = self._reading.mount_on_read and not flags & os.O_NOATIME
        try:
            fd = self._backing.open(path, flags)
        except FileNotFoundError:
            if role is not layout.Role.KV:
                raise
            promised = self._promise(path, cube)
            if flags & os.O_NONBLOCK:
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN), path) from None
            return self._open_made(path, cube, flags, context, promised)
        waits = role is layout.Role.KV and mounts and not flags & os.O_NONBLOCK
        if waits and path not in self._backing.elsewhere and self._is_outdated(cube):
            shown = self.shown(os.fstat(fd))
            os.close(fd)
            return self._open_made(path, cube, flags, context, shown)
        return self._opened(path, fd, role, cube, context, mounts=mounts)

    def _opened(
        self, path: str, fd: int, role: layout.Role, cube: str, context: Context, *, mounts: bool
    ) -> Handle:
        resident = role is layout.Role.KV and self._reading.is_resident(cube, context)
        # With O_NOATIME too: who maps what others read by passthrough is not seen.
        return OpenBlob(
            path,
            fd,
            self._reading if mounts and path not in self._backing.elsewhere else None,
            self._context,
            seen=self._reading.mount_on_read and not resident,
            ino=self._promised.get(os.fstat(fd).st_ino),
        )

    def _open_made(
        self, path: str, cube: str, flags: int, context: Context, promised: Status
    ) -> Handle:
        """Has the KV cache made, and opens it; ``promised`` is what was shown of it before."""

        def finish(now: str, making: Making) -> Handle:
            try:
                fd = self._backing.open(now, flags)
            except FileNotFoundError:
                raise making.error or FileNotFoundError(
                    errno.ENOENT, os.strerror(errno.ENOENT), now
                ) from None
            found = os.fstat(fd)
            if found.st_ino != promised.st_ino:
                self._remember(found.st_ino, promised.st_ino)
            mounts = self._reading.mount_on_read and not flags & os.O_NOATIME
            role, now_cube = layout.classify(now)
            return self._opened(now, fd, role, now_cube, context, mounts=mounts)

        making = self._makers.begin(cube, context)
        try:
            if self._makers.wait_open(path, making, context):
                handle = finish(path, making)
                self._makers.end(making)
                return handle
        except BaseException:
            self._makers.end(making)
            raise
        return OpenPending(path, self._makers, making, finish, self._context)

    def _promise(self, path: str, cube: str) -> Attributes:
        """What is shown of a KV cache that could be made."""
        missing = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        payload = self._backing.status(layout.join(cube, layout.PAYLOAD))
        if not stat.S_ISREG(payload.st_mode) or not payload.st_size:
            raise missing
        if not self._may_be_made(cube):
            raise missing
        pid = self._context().pid
        creating = creates(pid)
        if creating is None:
            young = time.time() - payload.st_ctime < _NEW_SECONDS
            creating = young and likely_creates(pid)
        if creating:
            raise missing  # or the kernel would not let it be created
        return altered(
            payload,
            st_ino=_virtual_inode(self._backing.status(cube)),
            st_mode=stat.S_IFREG | (payload.st_mode & 0o666),
            st_nlink=1,
            st_size=0,
            st_blocks=0,
            st_atime_ns=0,
            st_mtime_ns=0,  # older than any real one: ``rsync --update`` replaces it
            st_ctime_ns=0,
        )

    def _is_outdated(self, cube: str) -> bool:
        """Whether the KV cache is of an older text, and the model that made it is here again."""
        facts, model = self._catalogue.facts(cube), self._catalogue.model
        if facts is None or facts.kv_state != "stale" or facts.kv_model is None or model is None:
            return False
        return (
            self._makers.possible
            and self._may_be_made(cube)
            and all(facts.kv_model.get(name) == model.get(name) for name in MODEL_FIELDS)
        )

    def _may_be_made(self, cube: str) -> bool:
        """Whether a KV cache may be written into the cube."""
        return not self._backing.store.read_only and not self._guard.is_frozen(cube)

    def _remember(self, ino: int, promised: int) -> None:
        if len(self._promised) >= _PROMISES:
            self._promised.pop(next(iter(self._promised)))
        self._promised[ino] = promised


def _virtual_inode(directory: os.stat_result) -> int:
    """The number that a cube's KV cache has before there is one: its directory's, set apart."""
    return directory.st_ino ^ (int.from_bytes(b"kv", "big") << 48)
