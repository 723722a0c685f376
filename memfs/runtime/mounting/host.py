"""The tier behind an accelerator's memory: what had to leave it, in pinned host memory.

It comes back by one copy over the bus: the file is not read or checked again, as these are the rows
that were checked; only its signature is looked at, as before every use. A copy stays here when it
has come back, so the next eviction costs nothing. A budget and a segmented LRU of its own. On a CPU
the model's memory *is* the host's, and there is no such tier. Belongs to the service's event loop;
copying goes to the I/O threads.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from concurrent.futures import Executor
from dataclasses import replace

import torch

from memfs.errors import OutOfMemory, OverBudget
from memfs.runtime.model.kv_cache import KVCache, KVShape
from memfs.runtime.mounting.memory import Memory
from memfs.runtime.mounting.residency import Entry, Residency
from memfs.runtime.shortage import telling


class Host:
    """Memories in host memory, by the keys that they have on the device."""

    def __init__(self, budget_bytes: int, io: Executor, *, pinned: bool = True) -> None:
        """``pinned`` is False where there is no accelerator to copy from: in tests."""
        self.residency: Residency[Memory] = Residency(budget_bytes)
        self._io = io
        self._pinned = pinned

    async def keep(self, gone: Iterable[Entry[Memory]]) -> None:
        """Takes over what was evicted from the device: cubes, as far as there is room.

        Several placed together are not kept: they are placed again from their cubes.
        """
        loop = asyncio.get_running_loop()
        for entry in gone:
            memory = entry.value
            if memory.cube is None or self.residency.peek(entry.key):
                continue
            try:
                self.residency.make_room(memory.cache.length * memory.cache.shape.token_bytes)
                copied = await loop.run_in_executor(
                    self._io, telling, to_host, memory.cache, self._pinned
                )
                self.residency.make_room(copied.nbytes)  # another may have come in meanwhile
            except (OverBudget, OutOfMemory):
                continue
            self.residency.add(entry.key, memory.copied_to(copied), entry.tokens)
            self.residency.use(entry.key)


def to_host(cache: KVCache, pinned: bool) -> KVCache:
    """A copy of a cache's rows in host memory, without room behind them. Blocks."""
    shape = replace(cache.shape, device=torch.device("cpu"))
    size = (2, shape.kv_heads, cache.length, shape.head_dim)
    layers = [torch.empty(size, dtype=shape.dtype, pin_memory=pinned) for _ in range(shape.layers)]
    return _filled(KVCache(shape, cache.length, layers), cache)


def to_device(kept: KVCache, shape: KVShape, room: int) -> KVCache:
    """A cache on the model's device of the rows that were kept, with room behind them. Blocks."""
    return _filled(KVCache(shape, kept.length + room), kept)


def _filled(target: KVCache, source: KVCache) -> KVCache:
    """``target`` with the rows of ``source``: between devices in a stream of its own, so that it
    waits for no forward."""
    device = next((c.shape.device for c in (target, source) if c.shape.device.type == "cuda"), None)
    if device is None:
        target.append(source)
        return target
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))  # what had the target's memory before
    with torch.cuda.stream(stream):
        target.append(source)
    stream.synchronize()
    return target
