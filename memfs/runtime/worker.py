"""The model's thread: runs the jobs that need the model, a step at a time, the urgent ones first.

A job is a generator: what it yields goes to whoever iterates over the ``Job``, what it returns is
``Job.result``. Between two steps another job may have the thread, so a long encode never stops an
answer, and answers take turns. ``Job`` belongs to the event loop, the generator to the thread.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import threading
from collections.abc import AsyncIterator, Callable, Generator
from enum import IntEnum
from typing import Any, Generic, TypeVar

from memfs.errors import MemfsError
from memfs.runtime.shortage import shortage

Item = TypeVar("Item")
Result = TypeVar("Result")

_END = object()


class Priority(IntEnum):
    """Who goes first."""

    ANSWER = 0
    ENCODE = 1
    JOINT = 2
    IDLE = 3


class Job(Generic[Item, Result]):
    """Work under way in the model's thread."""

    def __init__(self, steps: Generator[Item, None, Result]) -> None:
        self._steps = steps
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[Any] = asyncio.Queue()
        self._cancelled = False
        self._error: Exception | None = None
        self.result: Result | None = None

    async def __aiter__(self) -> AsyncIterator[Item]:
        """What the job yields, as it does; raises what the job raised."""
        while (item := await self._items.get()) is not _END:
            yield item
        error, self._error = self._error, None
        try:
            if error is not None:
                raise error
        finally:
            del error  # its frames hold caches, and must not be held by one of them

    async def done(self) -> Result:
        """The result, once it is there; raises what the job raised."""
        async for _ in self:
            pass
        return self.result  # type: ignore[return-value]

    def cancel(self) -> None:
        """Ends the job before its next step."""
        self._cancelled = True

    def step(self) -> bool:
        """One step, in the model's thread; False when that was the last."""
        try:
            if self._cancelled:
                self._steps.close()
                return self._end(None)
            self._give(next(self._steps))
            return True
        except StopIteration as stop:
            self.result = stop.value
            return self._end(None)
        except Exception as e:  # noqa: BLE001  whatever a job raises belongs to who asked for it
            return self._end(e if isinstance(e, MemfsError) else shortage(e) or _explained(e))

    def _end(self, error: Exception | None) -> bool:
        self._error = error
        self._give(_END)
        return False

    def _give(self, item: object) -> None:
        try:
            self._loop.call_soon_threadsafe(self._items.put_nowait, item)
        except RuntimeError:
            self._cancelled = True  # the loop is closed: the daemon is going down


class Worker:
    """The thread, and the queue before it."""

    def __init__(self) -> None:
        self._queue: list[tuple[int, int, Job[Any, Any]]] = []
        self._order = itertools.count()
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    def submit(self, steps: Generator[Item, None, Result], priority: Priority) -> Job[Item, Result]:
        """Queues a job. Called in the event loop."""
        job = Job(steps)
        self._push(priority, job)
        return job

    def call(self, function: Callable[[], Result], priority: Priority) -> Job[None, Result]:
        """Queues a function as a job of one step."""

        def once() -> Generator[None, None, Result]:
            yield from ()
            return function()

        return self.submit(once(), priority)

    @property
    def waiting(self) -> int:
        """Jobs that are queued, the one in its step not counted."""
        return len(self._queue)

    def close(self) -> None:
        """Ends the thread after the step it is in."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout=30)

    def _push(self, priority: int, job: Job[Any, Any]) -> None:
        with self._changed:
            heapq.heappush(self._queue, (priority, next(self._order), job))
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._queue and not self._closing:
                    self._changed.wait()
                if self._closing:
                    return
                priority, _, job = heapq.heappop(self._queue)
            if job.step():
                self._push(priority, job)
            del job  # not while it waits for the next: the result may be a whole cache


def _explained(error: Exception) -> MemfsError:
    """An unexpected error as one that can be sent, its traceback in the log."""
    import traceback

    traceback.print_exception(error)
    return MemfsError(f"{type(error).__name__}: {error}")
