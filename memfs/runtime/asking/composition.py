"""Several memories in one cache: placing rows at other positions than they were made at.

A cube's rows are made behind the preamble, at ``base``. To stand behind other cubes its keys are
rotated by the distance moved, in float32, always from the stored original; its values stay as they
are (rotation over a shared preamble; compare EPIC, arXiv:2410.15332, and CacheBlend,
arXiv:2405.16444). Runs in the model's thread.
"""

from __future__ import annotations

import torch

from memfs.runtime.model.kv_cache import KVCache
from memfs.runtime.model.rotary import rotated


def place(cache: KVCache, memory: KVCache, base: int, inv_freq: torch.Tensor) -> None:
    """Copies the rows of ``memory`` from ``base`` on behind those in ``cache``, keys rotated.

    Args:
        memory: [preamble | one cube]; it is only read.
        inv_freq: the model's inverse frequencies, float32 [rotary_dim / 2].
    """
    distance = cache.length - base
    start = cache.length
    cache.append(memory, base)
    if distance == 0:
        return
    for mine, theirs in zip(cache.layers, memory.layers, strict=True):
        mine[0, :, start : cache.length] = rotated(
            theirs[0, :, base : memory.length], distance, inv_freq
        )
