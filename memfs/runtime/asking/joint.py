"""Exact rows for several cubes that were composed, computed while nobody asks.

After an answer from cubes that were placed one after another, what the text path computes for them
is computed from their token ids, a chunk at a time behind everything else that wants the model, and
takes the place of the composed cache: the next question is answered from it. In the service's event
loop; ``joint`` runs in the model's thread.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Generator, Sequence

from memfs.errors import MemfsError
from memfs.runtime.model.kv_cache import KVCache
from memfs.runtime.model.resident import Resident
from memfs.runtime.mounting.memory import Memory
from memfs.runtime.mounting.mounted import Mounted
from memfs.runtime.mounting.preparing import IDLE_SECONDS
from memfs.runtime.mounting.residency import Entry
from memfs.runtime.worker import Priority, Worker

log = logging.getLogger("memfs.runtime")

EXACT = "exact"


def joint(
    resident: Resident, cubes: Sequence[Sequence[int]], capacity: int
) -> Generator[float | None, None, KVCache]:
    """[preamble | each cube], each a segment behind those before it, as for a question from texts.

    Yields the share of the rows that is done after each chunk.
    """
    cache = resident.engine.new_cache(capacity)
    cache.append(resident.preamble)
    total = sum(map(len, cubes))
    for ids in cubes:
        for _ in resident.engine.prefill(cache, ids):
            yield (cache.length - resident.base) / total
            yield None
    return cache


class Joints:
    """The joint prefills that are waited for or under way, one for each composed cache."""

    def __init__(self, mounted: Mounted, worker: Worker) -> None:
        self._mounted = mounted
        self._worker = worker
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def soon(self, key: str, cubes: list[Entry[Memory]]) -> None:
        """Has the cache kept under ``key`` made exact, unless it is or that is being done.

        Args:
            cubes: what it was composed of. Where one of them, or the composed cache, is no longer
                mounted from the same files, it is given up.
        """
        placed = self._mounted.residency.peek(key)
        if placed is None or placed.value.composed == EXACT or key in self._tasks:
            return
        task = asyncio.create_task(self._make(placed, cubes))
        self._tasks[key] = task
        task.add_done_callback(lambda _: self._tasks.pop(key))

    async def _make(self, placed: Entry[Memory], cubes: list[Entry[Memory]]) -> None:
        await asyncio.sleep(IDLE_SECONDS)
        memory, residency = placed.value, self._mounted.residency
        if residency.used_bytes + memory.nbytes > residency.budget_bytes:
            return  # both are there until one takes the place of the other
        ids = [cube.value.ids for cube in cubes]
        steps = joint(self._mounted.resident, ids, memory.cache.capacity)
        job = self._worker.submit(steps, Priority.JOINT)
        try:
            async for done in job:
                if not self._all_there([placed, *cubes]):
                    return
                memory.joint = done
        except MemfsError as e:
            log.debug("several cubes stay composed: %s", e)
        finally:
            job.cancel()
            memory.joint = None
        if job.result is not None and self._all_there([placed, *cubes]):
            # An answer that is using the composed one keeps it until it is finished.
            memory.cache, memory.composed = job.result, EXACT

    def _all_there(self, entries: list[Entry[Memory]]) -> bool:
        return all(self._mounted.residency.peek(entry.key) is entry for entry in entries)
