"""Reads ahead what is used together with a cube that was just mounted or asked.

First into the page cache; then, where the budget has room that nobody else has to leave, into the
model, on probation. One cube at a time and one user's act after another, so that it takes little
from what is really asked for; what was read ahead reads nothing ahead itself. Rights are those of
the user whose act it was. Belongs to the service's event loop; reading is in the I/O threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import OrderedDict

from memfs.cube.access import Caller
from memfs.errors import MemfsError
from memfs.runtime.cubes import Cube, Files
from memfs.runtime.mounting.mounted import KNOWN, Mounted
from memfs.runtime.mounting.page_cache import read_ahead
from memfs.runtime.mounting.together import USERS, Together


class Ahead:
    """The reading ahead of one runtime."""

    def __init__(self, mounted: Mounted, budget_bytes: int) -> None:
        """``budget_bytes`` is what one act of a user may have read ahead."""
        self._mounted = mounted
        self._budget_bytes = budget_bytes
        self._together: OrderedDict[int, Together] = OrderedDict()
        self._one = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._unused: OrderedDict[str, None] = OrderedDict()
        self._prefetched = self._used = 0

    def facts(self) -> dict[str, int]:
        """For ``status``: cubes that were read ahead so far, and of these the ones used since."""
        return {"prefetched": self._prefetched, "used": self._used}

    def mounted(self, caller: Caller, cube: Cube) -> None:
        """A user mounted a cube."""
        if self._budget_bytes:
            known = self._of(caller)
            known.mounted(cube, time.monotonic())
            self._begin(caller, [cube], known)

    def asked(self, caller: Caller, cubes: list[Cube]) -> None:
        """A user asked of cubes."""
        if self._budget_bytes:
            known = self._of(caller)
            known.asked(cubes)
            self._begin(caller, cubes, known)

    def _of(self, caller: Caller) -> Together:
        known = self._together.setdefault(caller.uid, Together())
        self._together.move_to_end(caller.uid)
        if len(self._together) > USERS:
            self._together.popitem(last=False)
        return known

    def _begin(self, caller: Caller, cubes: list[Cube], known: Together) -> None:
        for cube in cubes:
            if self._unused.pop(cube.key, cube) is None:
                self._used += 1
        own = {cube.key for cube in cubes}
        wanted = {other.key: other for cube in cubes for other in known.companions(cube)}
        others = [other for key, other in wanted.items() if key not in own]
        if others:
            task = asyncio.create_task(self._read(caller, others))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _read(self, caller: Caller, cubes: list[Cube]) -> None:
        left = self._budget_bytes
        async with self._one:
            for cube in cubes:
                try:
                    left -= await self._read_one(caller, cube, left)
                except (MemfsError, OSError):
                    continue  # gone, closed to them, or not fit: whoever asks for it is told

    async def _read_one(self, caller: Caller, cube: Cube, left: int) -> int:
        """Bytes that were read ahead of a cube: at most ``left``."""
        mounted = self._mounted
        if mounted.is_held(cube):
            return 0
        with await mounted.in_io(cube.open, caller, "mount") as files:
            nbytes: int = await mounted.in_io(_started, files, left)
            if nbytes:
                self._count(cube)
                with contextlib.suppress(MemfsError):  # no room: it is in the page cache
                    await mounted.load_ahead(files)
        return nbytes

    def _count(self, cube: Cube) -> None:
        self._prefetched += cube.key not in self._unused
        self._unused[cube.key] = None
        if len(self._unused) > KNOWN:
            self._unused.popitem(last=False)


def _started(files: Files, most: int) -> int:
    """Has a KV file read into the page cache; its bytes, or 0 where they are more than ``most``."""
    fd, (_, size, *_) = files.open_kv()
    if size > most:
        return 0
    read_ahead(fd)
    return size
