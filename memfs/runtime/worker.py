"""The model's thread: runs the jobs that need the model, a step at a time, the urgent ones first.

A job is a generator, and what it returns is ``Job.result``. It yields None to let others have the
thread, a ``Step`` for the logits after one more token, which it is sent; anything else goes to
whoever iterates over the ``Job``, and it goes on. All steps that are wanted are taken together, in
turns with what else is urgent: an answer that begins waits for one token of those that are under
way, and they wait for one chunk of its prompt. A long encode has the thread when nobody is being
answered. ``Job`` belongs to the event loop, the generator to the thread.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator
from enum import IntEnum
from typing import Any, Generic, TypeVar

import torch

from memfs.errors import MemfsError
from memfs.runtime.model.steps import MOST, Step, take
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

    def __init__(
        self, steps: Generator[Item | Step | None, Any, Result], priority: Priority
    ) -> None:
        self._steps = steps
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[Any] = asyncio.Queue()
        self._error: Exception | None = None
        self.priority = priority
        self.cancelled = False
        self.ended = False
        self.wants: Step | None = None
        """What it has to be given to go on."""
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
        self.cancelled = True

    def advance(self, given: torch.Tensor | Exception | None = None) -> None:
        """Goes on until it ends, wants a step or lets others go first. In the model's thread.

        Args:
            given: what came of the step that it wanted; an error is raised within the job.
        """
        self.wants = None
        try:
            if self.cancelled:
                self._steps.close()
                return self._end(None)
            if isinstance(given, Exception):
                item = self._steps.throw(given)
            else:
                item = self._steps.send(given)
            while item is not None and not isinstance(item, Step):
                self._give(item)
                item = next(self._steps)
            self.wants = item
        except StopIteration as stop:
            self.result = stop.value
            self._end(None)
        except Exception as e:  # noqa: BLE001  whatever a job raises belongs to who asked for it
            self._end(e if isinstance(e, MemfsError) else shortage(e) or _explained(e))

    def _end(self, error: Exception | None) -> None:
        self._error = error
        self.ended = True
        self._give(_END)

    def _give(self, item: object) -> None:
        try:
            self._loop.call_soon_threadsafe(self._items.put_nowait, item)
        except RuntimeError:
            self.cancelled = True  # the loop is closed: the daemon is going down


class Worker:
    """The thread, and the queue before it."""

    def __init__(self) -> None:
        self._queue: list[tuple[int, int, Job[Any, Any]]] = []
        self._order = itertools.count()
        self._decoding: deque[Job[Any, Any]] = deque()
        """Those that want a step, who waits longest first. The thread's own."""
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    def submit(
        self, steps: Generator[Item | Step | None, Any, Result], priority: Priority
    ) -> Job[Item, Result]:
        """Queues a job. Called in the event loop."""
        job = Job(steps, priority)
        self._push(job)
        return job

    def call(self, function: Callable[[], Result], priority: Priority) -> Job[None, Result]:
        """Queues a function as a job of one step."""

        def once() -> Generator[None, None, Result]:
            yield from ()
            return function()

        return self.submit(once(), priority)

    def close(self) -> None:
        """Ends the thread after the step it is in."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout=30)

    def _push(self, job: Job[Any, Any]) -> None:
        with self._changed:
            heapq.heappush(self._queue, (job.priority, next(self._order), job))
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._queue or self._decoding or self._closing):
                    self._changed.wait()
                if self._closing:
                    return
                job = self._due()
            if job is not None:
                self._advance(job)
            del job  # not while it waits for the next: the result may be a whole cache
            self._decode()

    def _due(self) -> Job[Any, Any] | None:
        """Takes the job whose turn it is out of the queue; None where answers go first."""
        for index, (_, _, job) in enumerate(self._queue):
            if job.cancelled:  # it ends at once, and gives back what it holds
                del self._queue[index]
                heapq.heapify(self._queue)
                return job
        if not self._queue or (self._decoding and self._queue[0][0] > Priority.ANSWER):
            return None
        return heapq.heappop(self._queue)[-1]

    def _advance(self, job: Job[Any, Any], given: torch.Tensor | Exception | None = None) -> None:
        job.advance(given)
        if job.ended:
            return
        if job.wants is not None:
            self._decoding.append(job)
        else:
            self._push(job)

    def _decode(self) -> None:
        """A token for each job that wants one, for the ``MOST`` that wait longest."""
        turn = [self._decoding.popleft() for _ in range(min(MOST, len(self._decoding)))]
        wanted = {job: job.wants for job in turn if job.wants and not job.cancelled}
        given = dict(zip(wanted, take(list(wanted.values())), strict=True))
        for job in turn:
            self._advance(job, given.get(job))


def _explained(error: Exception) -> MemfsError:
    """An unexpected error as one that can be sent, its traceback in the log."""
    import traceback

    traceback.print_exception(error)
    return MemfsError(f"{type(error).__name__}: {error}")
