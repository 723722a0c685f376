"""Opening and creating files: which kind of handle a path gets. Used by the tree; any thread."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from weakref import WeakValueDictionary

from memfs.cube import layout
from memfs.cube.layout import Role
from memfs.filesystem.attributes import shown_as
from memfs.filesystem.backing import Backing, is_reserved
from memfs.filesystem.blobs import Blobs
from memfs.filesystem.catalogue import Catalogue
from memfs.filesystem.context import Context
from memfs.filesystem.control import Control, ControlDirectory
from memfs.filesystem.guard import Guard
from memfs.filesystem.handles.handle import (
    Handle,
    OpenDirectory,
    OpenFile,
    OpenPayload,
    Snapshot,
)
from memfs.filesystem.handles.header import OpenHeader
from memfs.filesystem.handles.staged import Staged
from memfs.filesystem.handles.table import HandleTable
from memfs.filesystem.header import Headers
from memfs.filesystem.past.tree import Past, read_only
from memfs.vault.sig import Sig, sig_of

STAGED = (Role.META, Role.KV, Role.ADAPTER_WEIGHTS)
"""Files that are never changed in place."""

_TOLD_OF = (Role.PAYLOAD, Role.ADAPTER_CONFIG)
"""Files that are passed through, and the cube is looked at when they were written."""


class Opening:
    """What ``open``, ``create`` and ``opendir`` do."""

    def __init__(
        self,
        backing: Backing,
        handles: HandleTable,
        catalogue: Catalogue,
        headers: Headers,
        blobs: Blobs,
        control: Control,
        past: Past,
        guard: Guard,
        context: Callable[[], Context],
    ) -> None:
        self._backing = backing
        self._handles = handles
        self._catalogue = catalogue
        self._headers = headers
        self._blobs = blobs
        self._control = control
        self._past = past
        self._guard = guard
        self._context = context
        self._staging = threading.Lock()
        self._staged: WeakValueDictionary[str, Staged] = WeakValueDictionary()
        """The last one of each path, which is not among the open files at once."""

    def open(self, path: str, flags: int) -> Handle:
        """Opens a file that is there, or that is shown to be."""
        role, cube = layout.classify(path)
        writing = flags & os.O_ACCMODE != os.O_RDONLY
        if role is Role.CONTROL:
            return self._control.open(path, flags)
        if role is Role.PAST:
            return self._past.open(path, flags)
        if (writing or flags & os.O_TRUNC) and role is not Role.META:
            self._guard.require_writable(path)  # a header may still say that it is frozen no more
        if writing and role in STAGED:
            handle = self.open_staged(path, role)
            if flags & os.O_TRUNC:
                handle.begin()
            return handle
        if role is Role.META:
            return self._open_header(path, cube)
        if role in STAGED:
            return self._blobs.open(path, role, cube, flags)
        fd = self._backing.open(path, flags)
        if flags & os.O_TRUNC:
            self._backing.take_setuid(fd, self._context())
        if writing and role in _TOLD_OF:
            return OpenPayload(path, fd, self.written, dirty=bool(flags & os.O_TRUNC))
        # Who maps for writing what is passed through to others writes there: of a text nobody would
        # hear of it, and where it was replaced beside the mount it would be lost.
        return OpenFile(path, fd, passes=not writing and role not in _TOLD_OF)

    def create(self, path: str, mode: int, flags: int) -> Handle:
        """Makes and opens a new file; opens the one that is there, unless it must be new."""
        require_free(path)
        role, cube = layout.classify(path)
        if role is not Role.META:
            self._guard.require_writable(path)
        if role in STAGED:
            if self._backing.exists(path):
                if not flags & os.O_EXCL:
                    return self.open(path, flags)
                if role is not Role.META or not self._catalogue.is_fresh(cube, self._sig(path)):
                    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
                # The caller was told that there is none, as memfs itself has just made it.
            handle = self.open_staged(path, role)
            handle.begin(mode)
            return handle
        try:
            fd = self._backing.create(path, mode, self._context())
        except FileExistsError:
            if flags & os.O_EXCL:
                raise
            return self.open(path, flags)
        if role in _TOLD_OF:
            return OpenPayload(path, fd, self.written, dirty=True)
        return OpenFile(path, fd)

    def open_directory(self, path: str) -> Handle:
        """Opens a directory."""
        role, _ = layout.classify(path)
        if role is Role.CONTROL:
            return ControlDirectory(path, self._control)
        if role is Role.PAST:
            return self._past.open_directory(path)
        return OpenDirectory(path, self._backing.store.open_dir(path), self._backing)

    def open_staged(self, path: str, role: Role) -> Staged:
        """Opens a file to be written beside its place, together with who does so already."""
        with self._staging:
            for handle in (*self._handles.on(path), self._staged.get(path)):
                if isinstance(handle, Staged) and handle.path == path and handle.share():
                    return handle
            new = self._staged[path] = self._new_staged(path, role)
            return new

    def _new_staged(self, path: str, role: Role) -> Staged:
        context = self._context()
        if role is not Role.META:
            return Staged(path, self._backing, context, self.written, self._guard.require_writable)
        base: bytes | None = None
        try:
            base = self._headers.shown(layout.split(path)[0])
        except FileNotFoundError:
            pass  # it becomes the cube's first one
        handle = OpenHeader(path, self._backing, context, self.written, self._headers, base)
        if self._headers.is_begun(layout.split(path)[0]):
            handle.begin()
        return handle

    def written(self, path: str) -> None:
        """A file of a cube was written; one with a text that has no header gets it now."""
        role, cube = layout.classify(path)
        if cube:
            text, header = role is Role.PAYLOAD, role is Role.META
            self._catalogue.touch(cube, adopting=text or header, header=header, by=self._context())

    def _sig(self, path: str) -> Sig:
        return sig_of(self._backing.status(path))

    def _open_header(self, path: str, cube: str) -> Handle:
        if path in self._backing.elsewhere:
            return OpenFile(path, self._backing.open(path, os.O_RDONLY))
        found = self._backing.status(path)
        data = self._headers.shown(cube)
        return Snapshot(path, data, shown_as(found, len(data)))


def require_free(path: str) -> None:
    """Raises OSError for a name that is memfs's own."""
    role, _ = layout.classify(path)
    if role is Role.PAST:
        raise read_only(path)
    if role is Role.CONTROL or is_reserved(path):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), path)
