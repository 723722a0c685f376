"""Which KV caches that do not fit are made anew: those that are used, not those passed by.

One that another model made, or that is damaged, is refused when it is read, and that first use has
the runtime make it from the text. But who reads one cube after another looks for something, or
makes a backup: nothing is made for that. So a read is believed to be a use once no other cube's was
refused for a moment. Used by the link, whose threads call ``read``; the rest is one thread.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import NamedTuple

from memfs.cube.access import Caller

SCAN_SECONDS = 0.3
"""Cubes that are read within so short a time of each other are read by somebody who scans."""


class Ticket:
    """A mount that was asked for."""

    def __init__(self) -> None:
        self._done = threading.Event()

    def finish(self) -> None:
        """It was answered, in whatever way."""
        self._done.set()

    def wait(self, seconds: float) -> bool:
        """Whether it was answered within that time."""
        return self._done.wait(seconds)


class Asked(NamedTuple):
    """A mount to be asked for, as somebody has read the file."""

    path: str
    kind: str
    caller: Caller
    ticket: Ticket


class Renewal:
    """Tells the reads that are uses from those of a scan."""

    def __init__(self, use: Callable[[Asked], None]) -> None:
        """``use`` is called in the thread, once for each user, and must not wait."""
        self._use = use
        self._reads: queue.SimpleQueue[Asked | None] = queue.SimpleQueue()

    def read(self, asked: Asked) -> None:
        """A KV cache was read, and refused."""
        self._reads.put(asked)

    def stop(self) -> None:
        """Ends the thread."""
        self._reads.put(None)

    def run(self) -> None:
        """The thread."""
        while (first := self._reads.get()) is not None:
            together = {(first.path, first.caller): first}
            try:
                while (asked := self._reads.get(timeout=SCAN_SECONDS)) is not None:
                    together[asked.path, asked.caller] = asked
                return
            except queue.Empty:
                pass
            if len({path for path, _ in together}) == 1:
                for asked in together.values():
                    self._use(asked)
