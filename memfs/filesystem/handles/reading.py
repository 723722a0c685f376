"""Reading a blob puts it into the model: what counts as a read, and what one starts.

A blob is ``kv.safetensors`` or ``adapter_model.safetensors``. While it is not in the model it is
opened past the kernel's page cache, so every read of a program is seen as it is; once it is
resident it is opened cached, and the open counts. Reads never wait for the model.

**What counts.** A read that begins behind the safetensors header, or one that takes the whole file.
A program that looks at the header reads some thousand bytes from the start, and its buffering, or
the kernel's for a mapping, takes what follows along; that is no read of the memory. Neither is an
open with ``O_NOATIME``, nor anything that ``file`` does, which reads megabytes of all it looks at.
"""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Callable

from memfs.cube import layout
from memfs.filesystem.attributes import Status, altered
from memfs.filesystem.catalogue import Catalogue
from memfs.filesystem.context import Context, program
from memfs.filesystem.handles.handle import OpenFile
from memfs.filesystem.link import Link
from memfs.filesystem.renewal import Read

ACKNOWLEDGED_SECONDS = 1.0
"""How long a close waits for the mount that its reads started, where the runtime answers at all."""

CLOSERS = 8
"""How many may wait so at once: the threads that serve files are never all of them."""

_PAGE = 4096
_PEEKERS = frozenset({"file"})


def counts(offset: int, length: int, header_end: int, size: int) -> bool:
    """Whether a read of ``length`` bytes at ``offset`` is one of the memory itself.

    Args:
        header_end: where the tensors begin.
        size: of the file.
    """
    if offset >= header_end:
        return True
    if offset + length < size:
        return False
    # A mapped file is read by whole pages: where it is small, its first page brings all of it.
    return length == size or length % _PAGE != 0 or length - size >= _PAGE


class Reading:
    """What reads start: the memory is mounted for the reader, and counted."""

    def __init__(self, link: Link, catalogue: Catalogue, *, mount_on_read: bool) -> None:
        self._link = link
        self._catalogue = catalogue
        self._closing = threading.BoundedSemaphore(CLOSERS)
        self.mount_on_read = mount_on_read

    def is_resident(self, cube: str, context: Context) -> bool:
        """Whether the cube's KV cache is in the model for this reader."""
        return self._link.is_mounted(cube, context.uid)

    def began(self, cube: str, kind: str, context: Context) -> Read:
        """A read that counts. At once; the mount goes on by itself."""
        self._catalogue.count(cube, reads=1)
        return self._link.read(cube, kind, context.caller())

    def closed(self, read: Read) -> None:
        """The last of the reader's descriptors is gone."""
        self._link.closed(read)

    def settle(self, read: Read) -> None:
        """The reader closes the file: what it started should show, where that takes no time."""
        if self._link.answers_at_once and self._closing.acquire(blocking=False):
            try:
                if not read.ticket.wait(ACKNOWLEDGED_SECONDS):
                    self._link.timed_out()
            finally:
                self._closing.release()


class OpenBlob(OpenFile):
    """A blob open for reading."""

    def __init__(
        self,
        path: str,
        fd: int,
        reading: Reading | None,
        context: Callable[[], Context],
        *,
        seen: bool,
        ino: int | None,
    ) -> None:
        """Nothing is read yet.

        Args:
            reading: None where nothing that is read counts.
            context: who asks in the running operation.
            seen: whether we must see the reads. Where not, the open counts, if anything does.
            ino: the inode number it is shown with; None for its own.
        """
        super().__init__(path, fd, passes=not seen)
        self.direct_io = seen
        self.noflush = reading is None
        self._reading = reading
        self._context = context
        self._ino = ino
        self._read: Read | None = None
        self._header_end = _header_end(fd)
        if not seen and reading is not None:
            self._count(reading)

    def read(self, buffer: memoryview, offset: int) -> int:
        reading = self._reading
        if reading is not None and self._read is None:
            size = os.fstat(self.fd).st_size
            if counts(offset, len(buffer), self._header_end, size):
                self._count(reading)
        return super().read(buffer, offset)

    def status(self) -> Status | None:
        found = os.fstat(self.fd)
        return found if self._ino is None else altered(found, st_ino=self._ino)

    def flush(self) -> None:
        read, reading = self._read, self._reading
        if read is not None and reading is not None:
            reading.settle(read)

    def release(self) -> None:
        super().release()
        read, reading = self._read, self._reading
        if read is not None and reading is not None:
            reading.closed(read)

    def _count(self, reading: Reading) -> None:
        context = self._context()
        if self.path is None or program(context.pid) in _PEEKERS:
            self._reading = None
            return
        role, cube = layout.classify(self.path)
        self._read = reading.began(cube, role.value, context)


def _header_end(fd: int) -> int:
    """Where the tensors begin, by the file's own word; a file without one is all memory."""
    start = os.pread(fd, 8, 0)
    return 8 + int(struct.unpack("<Q", start)[0]) if len(start) == 8 else 0
