"""Several memories in one cache: placing rows at other positions than they were made at.

A cube's rows are made behind the preamble, at ``base``. To stand behind other cubes its keys are
rotated by the distance moved, in float32, always from the stored original; its values stay as they
are. The cubes have not seen each other then. A policy says what of the later ones is computed again
where it stands, with all rows before it in sight: the first rows of each (link tokens, EPIC,
arXiv:2410.15332), or those that come out most different (CacheBlend, arXiv:2405.16444). Of those
the keys of a cube move together, so the others are moved after them, half as far. Runs in the
model's thread.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

import torch

from memfs.runtime.asking.policy import Policy
from memfs.runtime.model.engine import PREFILL_CHUNK
from memfs.runtime.model.kv_cache import KVCache
from memfs.runtime.model.resident import Resident
from memfs.runtime.model.rotary import rotated

FOLLOW = 0.5
"""How far the keys of the other rows follow: those computed again are the ones that move most."""

LOOK_AT = 1
"""The layer whose values tell which rows differ most: the first one that context changes."""


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


def refine(
    resident: Resident, cache: KVCache, cubes: Sequence[Sequence[int]], policy: Policy
) -> Generator[int, None, int]:
    """Computes rows of cubes that were placed again, as a policy says; the first cube is exact.

    Args:
        cache: [preamble | each cube], nothing behind them.
        cubes: the token ids of each.

    Yields how many rows have been looked at or computed after each chunk; returns how many were
    computed.
    """
    ids = [token for cube in cubes for token in cube]
    start = resident.base + len(cubes[0])
    rows: Sequence[int] = range(start, resident.base + len(ids))
    if policy.link:
        rows = _first_rows(resident.base, cubes, policy.link)
    elif policy.blend:
        differ = []
        for at in _chunks(rows):
            differ.append(_difference(resident, cache, [ids[p - resident.base] for p in at], at))
            yield len(at)
        count = round(len(rows) * policy.blend)
        rows = sorted((start + torch.cat(differ).topk(count).indices).tolist())
    else:
        return 0
    at_all = torch.tensor(rows, device=resident.shape.device)
    before = [layer[0, :, at_all] for layer in cache.layers] if policy.blend else []
    for at in _chunks(rows):
        # In order, so that each chunk sees those before it as they are now: as in one forward.
        resident.engine.recompute(_up_to(cache, at), [ids[p - resident.base] for p in at], at)
        yield len(at)
    if policy.blend:
        _follow(resident, cache, cubes, at_all, before)
    return len(rows)


def _follow(
    resident: Resident,
    cache: KVCache,
    cubes: Sequence[Sequence[int]],
    at: torch.Tensor,
    before: Sequence[torch.Tensor],
) -> None:
    """Moves the keys of the rows that were not computed again, by what the others of their cube
    moved in the mean; what moves is the key as it is without its position.

    Args:
        at: the rows that were, int64 [rows].
        before: their keys as they were, [kv_heads, rows, head_dim] a layer.
    """
    inv_freq = resident.inv_freq
    assert inv_freq is not None  # or they would not have been placed
    start = resident.base + len(cubes[0])
    for cube in cubes[1:]:
        own = torch.arange(start, start + len(cube), device=at.device)
        mine = (at >= start) & (at < start + len(cube))
        done = at[mine]
        others = own[~torch.isin(own, done)]
        start += len(cube)
        if not len(done) or not len(others):
            continue
        for layer, was in zip(cache.layers, before, strict=True):
            moved = layer[0, :, done].float() - was[:, mine].float()
            mean = rotated(moved, -done[:, None], inv_freq).mean(1, keepdim=True) * FOLLOW
            there = rotated(mean.expand(-1, len(others), -1), others[:, None], inv_freq)
            layer[0, :, others] = (layer[0, :, others].float() + there).to(layer.dtype)


def _first_rows(base: int, cubes: Sequence[Sequence[int]], count: int) -> list[int]:
    """Positions of the first rows of every cube but the first."""
    found: list[int] = []
    start = base + len(cubes[0])
    for cube in cubes[1:]:
        found += range(start, start + min(count, len(cube)))
        start += len(cube)
    return found


def _difference(
    resident: Resident, cache: KVCache, ids: Sequence[int], at: Sequence[int]
) -> torch.Tensor:
    """How far the values of rows would move at ``LOOK_AT``, squared, float32 [rows]."""
    layer = min(LOOK_AT, resident.shape.layers - 1)
    new = resident.engine.outlook(_up_to(cache, at), ids, at, layer)[1]
    old = cache.layers[layer][1, :, at[0] : at[-1] + 1]
    return (new.float() - old.float()).square().sum((0, 2))


def _up_to(cache: KVCache, at: Sequence[int]) -> KVCache:
    """The same cache ending at the last of these rows: none of them sees what is behind it."""
    seen = cache.borrowed()
    seen.length = at[-1] + 1
    return seen


def _chunks(rows: Sequence[int]) -> list[Sequence[int]]:
    return [rows[i : i + PREFILL_CHUNK] for i in range(0, len(rows), PREFILL_CHUNK)]
