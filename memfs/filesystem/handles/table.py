"""The open files of a mount: by the numbers that FUSE knows them by, and by node.

A node is what the kernel and libfuse know by a path, until it is renamed, or put aside because it
was unlinked while open. A handle's own ``path`` says what the mount shows, its node what FUSE goes
on to call it: libfuse puts a file aside that is *about* to be replaced, and where the rename fails
the file still has its name, and a node by another. Any thread; changes, and the modes that depend
on who else has a node open, are under a lock.
"""

from __future__ import annotations

import errno
import itertools
import os
import threading
from collections.abc import Callable

from memfs.filesystem.elsewhere import is_hidden
from memfs.filesystem.handles.handle import Handle
from memfs.filesystem.handles.modes import Modes
from memfs.filesystem.handles.passthrough import Passed, Passthrough


class _Open:
    """One open of a file: several share a handle (see ``staged``), and each was told of alone."""

    def __init__(self, handle: Handle, node: str | None) -> None:
        self.handle = handle
        self.node = node
        self.passed: Passed | None = None


class HandleTable:
    """The open files."""

    def __init__(self) -> None:
        self.passthrough = Passthrough()
        self._modes = Modes(self.passthrough)
        self._lock = threading.Lock()
        self._opens: dict[int, _Open] = {}
        self._nodes: dict[str, list[_Open]] = {}
        self._strays: set[_Open] = set()
        """Those whose file has its name still, while FUSE calls it by another."""
        self._numbers = itertools.count(1)

    def add(self, handle: Handle) -> tuple[int, Passed | None]:
        """The number of a newly opened file, and what the kernel is to read instead of asking.

        How the file is read is settled now.
        """
        number = next(self._numbers)
        opened = _Open(handle, handle.path)
        with self._lock:
            if opened.node is not None:
                there = self._nodes.setdefault(opened.node, [])
                held = next((other.passed for other in there if other.passed is not None), None)
                others = [other.handle for other in there if other.handle is not handle]
                opened.passed = self._modes.admit(handle, opened.node, others, held)
                there.append(opened)
            self._opens[number] = opened
        return number, opened.passed

    def get(self, number: int) -> Handle:
        """The open file with a number that FUSE gave."""
        try:
            return self._opens[number].handle
        except KeyError:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF)) from None

    def remove(self, number: int) -> Handle | None:
        """Takes a file that was closed for good out of the table."""
        with self._lock:
            opened = self._opens.pop(number, None)
            if opened is None:
                return None
            self._leave(opened)
            self._strays.discard(opened)
            self._modes.dismiss(opened.handle, opened.node, opened.passed)
        return opened.handle

    def is_hidden(self, number: int) -> bool:
        """Whether FUSE knows an open file as one that has no name any more."""
        opened = self._opens.get(number)
        return opened is not None and opened.node is not None and is_hidden(opened.node)

    def is_written(self, cube: str) -> bool:
        """Whether a file of a cube is open for writing."""
        below = cube + "/"
        return any(
            handle.writes and handle.path is not None and handle.path.startswith(below)
            for handle in self._all()
        )

    def freeze(self, cube: str, is_frozen: Callable[[str], bool]) -> None:
        """Tells every open file below a path whether it takes no writes any more, or does again."""
        below = cube + "/"
        for handle in self._all():
            if handle.path is not None and handle.path.startswith(below):
                handle.frozen = is_frozen(handle.path)

    def on(self, path: str) -> list[Handle]:
        """The open files at a path."""
        with self._lock:
            found = {id(o.handle): o.handle for o in (*self._nodes.get(path, ()), *self._strays)}
        return [handle for handle in found.values() if handle.path == path]

    def moved(self, old: str, new: str) -> None:
        """Tells every open file that ``old`` is now at ``new``."""
        with self._lock:
            below = old + "/"
            for node in [n for n in self._nodes if n == old or n.startswith(below)]:
                for opened in list(self._nodes[node]):
                    self._enter(opened, new + node[len(old) :])
        for handle in self._all():
            handle.moved(old, new)

    def unlinked(self, path: str, hidden: str | None = None) -> None:
        """Tells the open files at ``path`` that they have no name any more.

        Args:
            hidden: the path that FUSE goes on to know them by, if it knows that they are open.
        """
        gone = self.on(path)
        if hidden is not None:
            self.known_as(path, hidden)
        for handle in gone:
            handle.unlinked(hidden)
        with self._lock:
            self._strays = {opened for opened in self._strays if opened.handle.path is not None}

    def known_as(self, path: str, hidden: str) -> None:
        """FUSE calls the open files at ``path`` by another name, whatever becomes of theirs."""
        with self._lock:
            for opened in list(self._nodes.get(path, ())):
                self._enter(opened, hidden)
                self._strays.add(opened)

    def named(self, path: str, hidden: str) -> None:
        """The files that FUSE now calls ``hidden`` were not unlinked after all."""
        with self._lock:
            back = [o for o in self._nodes.get(hidden, ()) if o.handle.path is None]
            self._strays.update(back)
        for handle in {id(o.handle): o.handle for o in back}.values():
            handle.named(path)

    def _all(self) -> list[Handle]:
        return list({id(o.handle): o.handle for o in list(self._opens.values())}.values())

    def _enter(self, opened: _Open, node: str) -> None:
        """The node of an open file has another path. Under the lock."""
        self._leave(opened)
        opened.node = node
        self._nodes.setdefault(node, []).append(opened)

    def _leave(self, opened: _Open) -> None:
        there = self._nodes.get(opened.node) if opened.node is not None else None
        if there is not None and opened in there:
            there.remove(opened)
            if not there and opened.node is not None:
                del self._nodes[opened.node]
