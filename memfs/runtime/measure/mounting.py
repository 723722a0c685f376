"""Measures of the runtime's parts that have no command of their own. Used by ``memfs bench mount``.

Runs in the process that asks, over a model loaded there: nothing of a running daemon is touched.
"""

from __future__ import annotations

import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from memfs.config import Config
from memfs.runtime.kv import kv_store
from memfs.runtime.measure.spread import spread
from memfs.runtime.model.resident import Resident, load
from memfs.runtime.model.spare import MOST, spare

Facts = dict[str, Any]


def mount_rates(
    directory: Path, config: Config, tokens: list[int], runs: int, say: Callable[[str], None]
) -> list[Facts]:
    """How fast KV caches go from the page cache to the device, beside a plain copy of their bytes.

    Each run reads, checks and places the cache as a mount does, into memory made ready before as
    the daemon has it, then copies as many bytes between two buffers that have been used before: on
    a CPU by one memcpy (a mount is one thread too), on an accelerator from a pinned buffer.

    Returns:
        One line for each number of tokens: bytes, seconds of both, and the ratios of the paired
        runs (1.0: mounting is as fast as the plain copy).
    """
    resident = load(directory, config)
    lines = []
    for count in tokens:
        say(f"{count} tokens")
        with _kv_file(resident, count) as fd:
            lines.append(_paired(resident, fd, count, runs))
    return lines


def _paired(resident: Resident, fd: int, tokens: int, runs: int) -> Facts:
    device = resident.shape.device
    nbytes = tokens * resident.shape.token_bytes
    source = torch.ones(nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    target = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    mounts, copies = [], []
    for _ in range(runs + 1):  # the first warms up and is not counted
        if device.type == "cpu":
            deque(spare.prepare(MOST), maxlen=0)
        began = time.perf_counter()
        mounted = kv_store.read(fd, resident, None)
        _finish(device)
        mounts.append(time.perf_counter() - began)
        del mounted
        began = time.perf_counter()
        if device.type == "cpu":
            np.copyto(target.numpy(), source.numpy())
        else:
            target.copy_(source, non_blocking=True)
            _finish(device)
        copies.append(time.perf_counter() - began)
    shares = [copy / mount for mount, copy in zip(mounts[1:], copies[1:], strict=True)]
    return {
        "tokens": tokens,
        "bytes": nbytes,
        "device": str(device),
        "mount_s": spread(mounts[1:]),
        "copy_s": spread(copies[1:]),
        "share_of_copy": spread(shares),
    }


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _kv_file(resident: Resident, tokens: int) -> Iterator[int]:
    """A KV file of random rows: neither reading nor checking depends on what they are."""
    cache = resident.engine.new_cache(resident.base + tokens)
    for layer in cache.layers:
        layer.normal_()
    cache.length = cache.capacity
    with tempfile.TemporaryFile() as file:
        kv_store.write(file.fileno(), cache, resident, [7] * tokens, "0" * 64)
        del cache
        yield file.fileno()
