"""Opening a KV cache that is not there makes it, as autofs makes a mount.

Whoever opens it waits: in ``open``, so that what it asks next (the size) is true; or, where
somebody else needs the cube meanwhile, in the first ``read``. libfuse holds a lock on the path for
as long as an ``open`` takes: a rename or removal of the cube would wait for the model, and then
everything below it. So a waiting ``open`` ends as soon as another thread looks at its path or a
directory above, which the kernel does before each rename and removal. A ``read`` holds no such
lock.

A waiting caller that is sent a signal gets EINTR, and where it was the last one nothing is made. No
more than half of the threads that serve files wait so; one more is EBUSY. Any thread.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable

from memfs.errors import RuntimeUnavailable
from memfs.filesystem.attributes import ATTRIBUTE_SECONDS, Status
from memfs.filesystem.context import Context
from memfs.filesystem.handles.handle import Handle
from memfs.filesystem.link import Link, Making

POLL_SECONDS = 0.05
"""Between two looks whether the caller was interrupted; libfuse has no other way to tell."""


class Makers:
    """Those who wait for KV caches that are being made."""

    def __init__(self, link: Link, limit: int) -> None:
        """``limit`` is how many may wait at once."""
        self._link = link
        self._limit = limit
        self._waiting = 0
        self._opens: list[_Waiting] = []
        self._lock = threading.Lock()

    @property
    def possible(self) -> bool:
        """Whether one could be made now."""
        return self._link.can_make

    def begin(self, cube: str, context: Context) -> Making:
        """Has the cube's KV cache made; ``end`` must follow."""
        return self._link.make(cube, context.caller())

    def end(self, making: Making) -> None:
        """One who asked for it has it, or wants it no more."""
        self._link.leave(making)

    def wait_open(self, path: str, making: Making, context: Context) -> bool:
        """Waits within an ``open``; whether it has ended (False: somebody else needs the path)."""
        waiting, started = _Waiting(path, context.pid), time.monotonic()
        with self._lock:
            self._opens.append(waiting)
        try:
            ended = self._wait(making, context, waiting.disturbed)
        finally:
            with self._lock:
                self._opens.remove(waiting)
        # The kernel was told that the file is empty, and must have forgotten that.
        time.sleep(max(0.0, started + 2 * ATTRIBUTE_SECONDS - time.monotonic()))
        return ended

    def wait_read(self, making: Making, context: Context) -> None:
        """Waits within a ``read`` until it has ended."""
        self._wait(making, context, None)

    def looked_at(self, path: str, context: Callable[[], Context]) -> None:
        """Somebody asked for the status of a path: an ``open`` below it waits no longer."""
        if not self._opens:
            return
        with self._lock:
            near = [w for w in self._opens if w.path == path or w.path.startswith(path + "/")]
        if near:
            pid = context().pid
            for waiting in near:
                if waiting.pid != pid:
                    waiting.disturbed.set()

    def _wait(self, making: Making, context: Context, disturbed: threading.Event | None) -> bool:
        with self._lock:
            if self._waiting >= self._limit:
                raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
            self._waiting += 1
        try:
            while not making.wait(POLL_SECONDS):
                if context.interrupted():
                    raise InterruptedError(errno.EINTR, os.strerror(errno.EINTR))
                if disturbed is not None and disturbed.is_set():
                    return False
        finally:
            with self._lock:
                self._waiting -= 1
        return True


class _Waiting:
    """An ``open`` that waits."""

    def __init__(self, path: str, pid: int) -> None:
        self.path = path
        self.pid = pid
        self.disturbed = threading.Event()


class OpenPending(Handle):
    """A KV cache that was opened and is not there yet. Its first read waits for it."""

    direct_io = True  # the kernel was told that it is empty

    def __init__(
        self,
        path: str,
        makers: Makers,
        making: Making,
        finish: Callable[[str, Making], Handle],
        context: Callable[[], Context],
    ) -> None:
        """``finish`` opens the file at the path that it has once the making has ended."""
        super().__init__(path)
        self._makers = makers
        self._making = making
        self._finish = finish
        self._context = context
        self._lock = threading.Lock()
        self._made: Handle | None = None

    def read(self, buffer: memoryview, offset: int) -> int:
        return self._ready().read(buffer, offset)

    def status(self) -> Status | None:
        """``lseek`` to the end, or over holes, asks this: it has to be the real size."""
        return self._ready().status()

    def flush(self) -> None:
        if self._made is not None:
            self._made.flush()

    def release(self) -> None:
        self._makers.end(self._making)
        if self._made is not None:
            self._made.release()

    def moved(self, old: str, new: str) -> None:
        super().moved(old, new)
        if self._made is not None:
            self._made.moved(old, new)

    def _ready(self) -> Handle:
        if self._made is None:
            self._makers.wait_read(self._making, self._context())
            with self._lock:
                if self._made is None:
                    if self.path is None:
                        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
                    self._made = self._finished(self.path)
        return self._made

    def _finished(self, path: str) -> Handle:
        try:
            return self._finish(path, self._making)
        except RuntimeUnavailable as e:
            # EAGAIN from a read means to many programs that there is nothing to read, and no error.
            raise OSError(errno.EIO, os.strerror(errno.EIO), path) from e
