"""Memory for KV caches on a CPU, faulted in before it is needed.

New memory costs a page fault for each 4 KiB: 30 to 50 ms for the 100 MB of a 4k-token cache, where
reading and checking that takes 10. So some blocks are kept ready; a mount takes what it needs, and
more are made ready when the model has nothing to do. They are in pages of 2 MiB where the kernel
has such: a third of the time to make ready, and a sixth less to copy into. They are beyond the
budget of mounted caches: at most ``MOST`` bytes. Any thread.
"""

from __future__ import annotations

import contextlib
import mmap
import threading
from collections.abc import Generator

import torch

BLOCK = 16 << 20
MOST = 256 << 20


class Spare:
    """Blocks of memory that have been touched."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blocks: list[mmap.mmap] = []
        self._most = MOST

    def prepare(self, nbytes: int) -> Generator[None, None, None]:
        """Makes ``nbytes`` ready, or ``MOST``, a block a step; a fifth of a millisecond a MiB."""
        while len(self._blocks) * BLOCK < min(nbytes, self._most):
            block = mmap.mmap(-1, BLOCK, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            with contextlib.suppress(OSError):  # a kernel without large pages
                block.madvise(mmap.MADV_HUGEPAGE)
            torch.frombuffer(block, dtype=torch.uint8).zero_()  # touches it all, without the GIL
            with self._lock:
                self._blocks.append(block)
            yield

    def clear(self) -> bool:
        """Gives the memory back, for good: there is too little of it. Whether there was any."""
        with self._lock:
            had, self._blocks, self._most = bool(self._blocks), [], 0
        return had

    def take(self, count: int, nbytes: int) -> list[torch.Tensor] | None:
        """``count`` buffers of ``nbytes`` each, uint8; None where they are not ready."""
        a_block = BLOCK // nbytes
        with self._lock:
            needed = -(-count // a_block) if a_block else 0
            if not needed or needed > len(self._blocks):
                return None
            blocks = [self._blocks.pop() for _ in range(needed)]
        last = count - (needed - 1) * a_block
        blocks[-1].resize(last * nbytes)  # gives back what is behind, whole pages of it
        return [
            torch.frombuffer(
                blocks[i // a_block], dtype=torch.uint8, count=nbytes, offset=i % a_block * nbytes
            )
            for i in range(count)
        ]


spare = Spare()
