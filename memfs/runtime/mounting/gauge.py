"""The first measure of what prefilling and loading cost: an idle job of the model's thread."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator
from functools import partial

from memfs.runtime.kv import kv_store
from memfs.runtime.model.engine import PREFILL_CHUNK
from memfs.runtime.model.kv_cache import KVCache
from memfs.runtime.model.resident import Resident
from memfs.runtime.mounting.rates import Loading, Prefilling

FEW = 16
FAR = 1024
"""Rows before a chunk, to see what rows that are there cost."""
LONG_BYTES = 8 << 20
"""Of the longer one of two files, where the context is as long as that."""
TIMES = 2
"""Each measure is taken; the shortest counts, as what else runs only adds."""
SLOW_SECONDS = 1.0
"""A model that takes that long for ``FEW`` rows is not asked for more: it is never the cheaper."""


def gauge(resident: Resident) -> Generator[None, None, tuple[Prefilling, Loading]]:
    """Measures both, a forward or a load a step; about half a second for the default model."""
    prefilling = yield from _prefilling(resident)
    loading = yield from _loading(resident)
    return prefilling, loading


def _prefilling(resident: Resident) -> Generator[None, None, Prefilling]:
    rows = min(PREFILL_CHUNK, resident.context // 2)
    few, far = min(FEW, rows // 2), min(FAR, resident.context - rows)
    cache = resident.engine.new_cache(far + rows)
    for layer in cache.layers:
        layer.zero_()

    def forward(before: int, count: int) -> None:
        cache.length = before
        resident.engine.forward(cache, [0] * count, logits=False)
        resident.engine.finish()

    short = yield from _shortest(partial(forward, 0, few))
    if short > SLOW_SECONDS:
        return Prefilling(PREFILL_CHUNK, 0.0, short / few, 0.0)
    near = yield from _shortest(partial(forward, 0, rows))
    behind = yield from _shortest(partial(forward, far, rows))
    pair = max(0.0, behind - near) / (rows * far)
    row = max(0.0, near - short - pair * (rows * rows - few * few)) / (rows - few)
    chunk = max(0.0, short - few * (row + pair * few))
    return Prefilling(PREFILL_CHUNK, chunk, row, pair)


def _loading(resident: Resident) -> Generator[None, None, Loading]:
    """From files in memory, which are read as the page cache is."""
    sizes, seconds = [], []
    long = max(PREFILL_CHUNK, LONG_BYTES // resident.shape.token_bytes)
    for rows in (FEW, min(long, resident.context)):
        cache = KVCache(resident.shape, resident.base + rows)
        for layer in cache.layers:
            layer.zero_()
        cache.length = cache.capacity
        fd = os.memfd_create("memfs-gauge")
        try:
            sizes.append(kv_store.write(fd, cache, resident, [0] * rows, "0" * 64))
            yield
            seconds.append((yield from _shortest(partial(kv_store.read, fd, resident, None))))
        finally:
            os.close(fd)
    (short, longer), (little, much) = seconds, sizes
    byte = (longer - short) / (much - little) if longer > short else longer / much
    return Loading(max(0.0, short - byte * little), byte)


def _shortest(action: Callable[[], object]) -> Generator[None, None, float]:
    taken = []
    for _ in range(TIMES):
        began = time.perf_counter()
        action()
        taken.append(time.perf_counter() - began)
        yield
    return min(taken)
