"""Who is told of what happens, each at his own pace. Belongs to the service's event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Any

from memfs.errors import MemfsError

MAX_WAITING = 4096
"""Events that wait for one subscriber: some megabytes."""

Event = dict[str, Any]


class Subscribers:
    """The queues of those who listen."""

    def __init__(self) -> None:
        self._queues: set[asyncio.Queue[Event | None]] = set()

    def publish(self, event: Event) -> None:
        """Tells all; one for whom too many wait is told no more, and what waits is let go."""
        for queue in list(self._queues):
            if queue.qsize() >= MAX_WAITING:
                self._queues.discard(queue)
                while not queue.empty():
                    queue.get_nowait()
                queue.put_nowait(None)
            else:
                queue.put_nowait(event)

    @contextlib.contextmanager
    def listening(self) -> Iterator[AsyncIterator[Event]]:
        """What happens from now on. Raises MemfsError from there where it is not taken in time."""
        queue: asyncio.Queue[Event | None] = asyncio.Queue()
        self._queues.add(queue)
        try:
            yield _events(queue)
        finally:
            self._queues.discard(queue)


async def _events(queue: asyncio.Queue[Event | None]) -> AsyncIterator[Event]:
    while (event := await queue.get()) is not None:
        yield event
    raise MemfsError(f"more than {MAX_WAITING} events waited; subscribe again for what is now")
