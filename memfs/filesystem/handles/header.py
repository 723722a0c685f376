"""meta.json open for writing: what was written is checked as a whole when it is closed.

Used by the tree; see ``staged`` for locking.
"""

from __future__ import annotations

import os

from memfs.cube import layout, metadata
from memfs.errors import InvalidMetadata
from memfs.filesystem.attributes import Status, shown_as
from memfs.filesystem.backing import Backing
from memfs.filesystem.context import Context
from memfs.filesystem.handles.handle import copy_into
from memfs.filesystem.handles.staged import Published, Staged
from memfs.filesystem.header import Headers


class OpenHeader(Staged):
    """A header being written. A bad one fails the close, and the one that stood before stands."""

    limit = metadata.MAX_BYTES

    def __init__(
        self,
        path: str,
        backing: Backing,
        context: Context,
        published: Published,
        headers: Headers,
        base: bytes | None,
    ) -> None:
        """``base`` is the header as it reads now; None where there is none."""
        super().__init__(path, backing, context, published)
        self._headers = headers
        self._base = base
        self._new = False

    def begin(self, mode: int | None = None) -> None:
        super().begin(mode)
        self._new = mode is not None

    def read(self, buffer: memoryview, offset: int) -> int:
        with self._lock:
            if self._temporary is None and self._base is not None:
                return copy_into(buffer, self._base, offset)
            return super().read(buffer, offset)

    def fsync(self, *, data_only: bool) -> None:  # noqa: ARG002
        """As a close: an editor that flushes before it closes is told of a bad header then."""
        self.flush()

    def status(self) -> Status | None:
        if self._temporary is None and self._base is not None and self.path is not None:
            return shown_as(self._backing.status(self.path), len(self._base))
        return super().status()

    def _end_empty(self) -> None:
        """Nothing is no header: the one that stands, stands."""
        if not self._written:
            path, like = self.path, os.fstat(self._fd) if self._temporary is not None else None
            self._discard()
            if self._new and path is not None and like is not None:
                self._headers.begin(layout.split(path)[0], like)

    def _fill(self, standing: int) -> None:
        """Starts from the header as it reads, not as it is stored."""
        if self._base is None:
            super()._fill(standing)
        else:
            os.pwrite(self._fd, self._base, 0)

    def _accept(self, path: str) -> bool:
        cube, _ = layout.split(path)
        found = os.fstat(self._fd)
        text = os.pread(self._fd, metadata.MAX_BYTES + 1, 0)
        if text == self._base:
            return False
        try:
            data = self._headers.accept(cube, text, self._base, self._context)
        except (InvalidMetadata, OSError) as e:
            self._headers.reject(cube, text, found, self._context, e)
            raise
        if data != text:
            os.pwrite(self._fd, data, 0)
            os.ftruncate(self._fd, len(data))
            os.utime(self._fd, ns=(found.st_atime_ns, found.st_mtime_ns))
        self._base = None  # what it reads as from now on is asked where it matters
        return True
