"""How long a memory takes into the model from each tier. Used by ``memfs bench mount``.

Runs in the process that asks, over a model loaded there: nothing of a running daemon is touched.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from memfs.config import Config
from memfs.cube import layout
from memfs.runtime.cubes import Cube
from memfs.runtime.kv import kv_store
from memfs.runtime.measure.spread import spread
from memfs.runtime.model.resident import Resident, load
from memfs.runtime.model.spare import MOST, spare
from memfs.runtime.mounting.host import to_device, to_host
from memfs.runtime.mounting.memory import Memory
from memfs.runtime.mounting.page_cache import cached_bytes, drop
from memfs.runtime.mounting.tiers import DEVICE, DISK, HOST, PAGE_CACHE
from memfs.vault.store import Store

Facts = dict[str, Any]


def mount_rates(
    directory: Path, config: Config, tokens: list[int], runs: int, say: Callable[[str], None]
) -> list[Facts]:
    """How fast KV caches go from each tier to the device, beside a plain copy of their bytes.

    Each run reads, checks and places the cache as a mount does, into memory made ready before as
    the daemon has it: from the disk (its pages dropped before), from the page cache, on an
    accelerator from host memory; then looks whether what is on the device is still right. Then it
    copies as many bytes between two buffers that have been used before: on a CPU by one memcpy (a
    mount is one thread too), on an accelerator from a pinned buffer.

    Returns:
        One line for each number of tokens and tier: bytes, seconds of both, and the ratios of the
        paired runs (1.0: mounting is as fast as the plain copy; None where nothing is moved). There
        is none for the disk where temporary files are on no disk.
    """
    resident = load(directory, config)
    lines = []
    for count in tokens:
        say(f"{count} tokens")
        with _cube(resident, count) as cube:
            lines += _paired(resident, cube, count, runs)
    return lines


def _paired(resident: Resident, cube: Cube, tokens: int, runs: int) -> list[Facts]:
    device = resident.shape.device
    nbytes = tokens * resident.shape.token_bytes
    source = torch.ones(nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    target = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    mounts: dict[str, list[float]] = {}
    copies = []
    for _ in range(runs + 1):  # the first warms up and is not counted
        for tier, seconds in _mounts(resident, cube):
            mounts.setdefault(tier, []).append(seconds)
        began = time.perf_counter()
        if device.type == "cpu":
            np.copyto(target.numpy(), source.numpy())
        else:
            target.copy_(source, non_blocking=True)
        copies.append(_since(began, device))
    lines = []
    for tier, times in mounts.items():
        shares = [copy / mount for mount, copy in zip(times[1:], copies[1:], strict=True)]
        lines.append(
            {
                "tokens": tokens,
                "tier": tier,
                "bytes": nbytes,
                "device": str(device),
                "mount_s": spread(times[1:]),
                "copy_s": spread(copies[1:]),
                "share_of_copy": None if tier == DEVICE else spread(shares),
            }
        )
    return lines


def _mounts(resident: Resident, cube: Cube) -> Iterator[tuple[str, float]]:
    """The tiers, and the seconds that a mount takes from each."""
    device = resident.shape.device
    with cube.open(None) as files:
        text = files.text()
        fd, signature = files.open_kv()
        for tier in (DISK, PAGE_CACHE):
            if tier == DISK:
                drop(fd)
                if cached_bytes(fd):
                    continue
            if device.type == "cpu":
                deque(spare.prepare(MOST), maxlen=0)
            began = time.perf_counter()
            cache, ids = kv_store.read(fd, resident, text.sha256)
            yield tier, _since(began, device)
        read_from = (text.sha256, text.signature, signature)
        memory = Memory(cube, cache, array("i", ids), *read_from)
    if device.type != "cpu":
        kept = to_host(cache, pinned=True)
        began = time.perf_counter()
        to_device(kept, resident.shape, kv_store.ROOM)
        yield HOST, _since(began, device)
    began = time.perf_counter()
    with cube.open(None) as files:
        if not memory.unchanged(files):
            raise AssertionError("the bench's own file changed")
    yield DEVICE, _since(began, device)


def _since(began: float, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


@contextmanager
def _cube(resident: Resident, tokens: int) -> Iterator[Cube]:
    """A cube whose KV cache has random rows: no tier's time depends on what they are."""
    cache = resident.engine.new_cache(resident.base + tokens)
    for layer in cache.layers:
        layer.normal_()
    cache.length = cache.capacity
    with tempfile.TemporaryDirectory(prefix="memfs-bench-") as root:
        directory = Path(root, "memory")
        directory.mkdir()
        directory.joinpath(layout.PAYLOAD).write_bytes(b"a text")
        with directory.joinpath(layout.KV).open("w+b") as file:
            digest = hashlib.sha256(b"a text").hexdigest()
            kv_store.write(file.fileno(), cache, resident, [7] * tokens, digest)
        del cache
        with Store.open(Path(root), create_control=False) as store:
            yield Cube(store, "memory")
