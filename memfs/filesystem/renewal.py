"""Which KV caches that do not fit are made anew: those that are used, not those passed by.

One that another model made, or that is damaged, is refused when it is read, and that first use has
the runtime make it from the text. But who reads one cube after another looks for something, or
makes a backup: nothing is made for that. A scan may take long for each file, so it is told by what
comes before and after: a read is in passing where the same user, within a moment of its beginning
or its end, began or ended to read another cube's memory, whether that one fits or not. Used by the
link, from any thread; one thread sees to those reads that ended.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from memfs.cube.access import Caller

SCAN_SECONDS = 1.0
"""Reads of two cubes that are no farther apart are somebody's who scans."""


class Ticket:
    """A mount that was asked for."""

    def __init__(self) -> None:
        self.misfit = False
        """Whether it was refused for what is wrong with the file, and not with one made anew."""
        self.used = False
        """Whether one of those whose reads it is for has used the memory."""
        self._done = threading.Event()

    @property
    def done(self) -> bool:
        """Whether it was answered."""
        return self._done.is_set()

    def finish(self) -> None:
        """It was answered, in whatever way."""
        self._done.set()

    def wait(self, seconds: float = threading.TIMEOUT_MAX) -> bool:
        """Whether it was answered within that time."""
        return self._done.wait(seconds)


class Read:
    """A memory that is being read: from the first read that counts to the close."""

    def __init__(self, path: str, caller: Caller, ticket: Ticket) -> None:
        self.path = path
        """Of the cube."""
        self.caller = caller
        self.ticket = ticket
        self.passing = False
        self.ended = 0.0


class _Edge(NamedTuple):
    """Somebody began or ended to read a cube's memory."""

    path: str
    at: float


_NEVER = _Edge("", float("-inf"))


class Renewal:
    """Tells the reads that are uses from those of a scan."""

    def __init__(self, use: Callable[[Read], None]) -> None:
        """Nothing is read yet.

        Args:
            use: called in the thread for each read that is no scan's, but for those that are known
                to fit; may not wait. Whether it fits is to be seen from the ticket, in the end.
        """
        self._use = use
        self._ended: queue.SimpleQueue[Read | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._edges: dict[int, tuple[_Edge, _Edge]] = {}
        """By user: the last one, and the last one of another cube than that."""

    def began(self, read: Read) -> None:
        """A read that counts."""
        now = time.monotonic()
        read.passing = self._neighbour(read) > now - SCAN_SECONDS
        self._note(read, now)

    def closed(self, read: Read) -> None:
        """The file that was read was closed."""
        read.ended = time.monotonic()
        self._note(read, read.ended)
        if not read.passing:
            self._ended.put(read)

    def stop(self) -> None:
        """Ends the thread."""
        self._ended.put(None)

    def run(self) -> None:
        """The thread."""
        while (read := self._ended.get()) is not None:
            time.sleep(max(0.0, read.ended + SCAN_SECONDS - time.monotonic()))
            alone = self._neighbour(read) < read.ended - SCAN_SECONDS
            ticket = read.ticket
            if alone and not ticket.used and (ticket.misfit or not ticket.done):
                ticket.used = True
                self._use(read)

    def _neighbour(self, read: Read) -> float:
        """When the user last began or ended to read another cube's memory."""
        with self._lock:
            last, other = self._edges.get(read.caller.uid, (_NEVER, _NEVER))
        return last.at if last.path != read.path else other.at

    def _note(self, read: Read, now: float) -> None:
        with self._lock:
            last, other = self._edges.get(read.caller.uid, (_NEVER, _NEVER))
            other = other if last.path == read.path else last
            self._edges[read.caller.uid] = (_Edge(read.path, now), other)
