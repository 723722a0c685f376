"""The open files of a mount: by the numbers that FUSE knows them by, and by node.

A node is what the kernel and libfuse know by a path, until it is renamed, or put aside because it
was unlinked while open. A handle's own ``path`` says what the mount shows, its node what FUSE goes
on to call it. Any thread; changes, and the modes that depend on who else has a node open, are under
a lock.
"""

from __future__ import annotations

import errno
import itertools
import os
import threading

from memfs.filesystem.handles import Handle
from memfs.filesystem.modes import Modes
from memfs.filesystem.passthrough import Passthrough


class HandleTable:
    """The open files."""

    def __init__(self) -> None:
        self.passthrough = Passthrough()
        self._modes = Modes(self.passthrough)
        self._lock = threading.Lock()
        self._handles: dict[int, Handle] = {}
        self._nodes: dict[str, list[Handle]] = {}
        self._numbers = itertools.count(1)

    def add(self, handle: Handle) -> int:
        """The number of a newly opened file, whose mode is settled now."""
        number = next(self._numbers)
        with self._lock:
            if handle.path is not None:
                handle.node = handle.path
                others = self._nodes.setdefault(handle.node, [])
                self._modes.admit(handle, handle.node, others)
                others.append(handle)
            self._handles[number] = handle
        return number

    def get(self, number: int) -> Handle:
        """The open file with a number that FUSE gave."""
        try:
            return self._handles[number]
        except KeyError:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF)) from None

    def remove(self, number: int) -> Handle | None:
        """Takes a file that was closed for good out of the table."""
        with self._lock:
            handle = self._handles.pop(number, None)
            if handle is not None:
                self._leave(handle)
                self._modes.dismiss(handle)
        return handle

    def is_written(self, cube: str) -> bool:
        """Whether a file of a cube is open for writing."""
        below = cube + "/"
        return any(
            handle.writes and handle.path is not None and handle.path.startswith(below)
            for handle in list(self._handles.values())
        )

    def freeze(self, cube: str, *, frozen: bool) -> None:
        """Tells every open file in a cube that it takes no writes any more, or does again."""
        below = cube + "/"
        for handle in list(self._handles.values()):
            if handle.path is not None and handle.path.startswith(below):
                handle.frozen = frozen

    def on(self, path: str) -> list[Handle]:
        """The open files at a path."""
        with self._lock:
            return [handle for handle in self._nodes.get(path, ()) if handle.path == path]

    def moved(self, old: str, new: str) -> None:
        """Tells every open file that ``old`` is now at ``new``."""
        with self._lock:
            below = old + "/"
            nodes = [node for node in self._nodes if node == old or node.startswith(below)]
            for handle in [handle for node in nodes for handle in self._nodes[node]]:
                self._enter(handle, new + handle.node[len(old) :])
        for handle in list(self._handles.values()):
            handle.moved(old, new)

    def unlinked(self, path: str, hidden: str | None = None) -> None:
        """Tells the open files at ``path`` that they have no name any more.

        Args:
            hidden: the path that FUSE goes on to know them by, if it knows that they are open.
        """
        for handle in self.on(path):
            if hidden is not None:
                with self._lock:
                    self._enter(handle, hidden)
            handle.unlinked(hidden)

    def _enter(self, handle: Handle, node: str) -> None:
        """The node of an open file has another path. Under the lock."""
        self._leave(handle)
        handle.node = node
        self._nodes.setdefault(node, []).append(handle)

    def _leave(self, handle: Handle) -> None:
        there = self._nodes.get(handle.node)
        if there is not None and handle in there:
            there.remove(handle)
            if not there:
                del self._nodes[handle.node]
