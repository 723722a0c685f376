"""Rows of a KV cache as 8-bit integers and scales: half the bytes, and no longer bit for bit.

Keys have channels that are large in every row, values have rows that are large as a whole (compare
KIVI, arXiv:2402.02750): so keys get a scale for each channel, in groups of tokens, and values one
for each row. An entry is ``integer * scale``, computed in float32, at most half a scale from what
it was. Pure functions; the writer's and the readers' threads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from memfs.cube.kvfile import KEY_GROUP, scales_error
from memfs.errors import MemfsError

LARGEST = 127
SMALLEST_SCALE = torch.finfo(torch.float32).smallest_normal
"""Of a channel or row of zeros, or of less than can be told from them."""


@dataclass(frozen=True)
class Packed:
    """One layer's rows."""

    key_scales: torch.Tensor
    """float32 [kv_heads, groups, head_dim]; a group is KEY_GROUP tokens, the last one maybe less"""
    value_scales: torch.Tensor
    """float32 [kv_heads, tokens]."""
    integers: torch.Tensor
    """int8 [2, kv_heads, tokens, head_dim], keys then values."""


def pack(rows: torch.Tensor) -> Packed:
    """The rows of a layer, [2, kv_heads, tokens, head_dim] on a CPU, keys then values.

    Raises MemfsError where one of them is not finite.
    """
    keys, values = rows.float()
    if not bool(torch.isfinite(rows).all()):
        raise MemfsError("the model made rows that are not finite: int8 cannot store them")
    tokens = keys.shape[1]
    groups = F.pad(keys, (0, 0, 0, -tokens % KEY_GROUP)).unflatten(1, (-1, KEY_GROUP))
    key_scales = _scales(groups.abs().amax(2))
    value_scales = _scales(values.abs().amax(-1))
    integers = torch.empty(rows.shape, dtype=torch.int8)
    integers[0] = _rounded(groups / key_scales[:, :, None]).flatten(1, 2)[:, :tokens]
    integers[1] = _rounded(values / value_scales[..., None])
    return Packed(key_scales, value_scales, integers)


def unpack(packed: Packed, rows: torch.Tensor, scratch: torch.Tensor) -> None:
    """Writes what ``pack`` was given into ``rows``, on the device that all of it is on.

    A head at a time, so that what a CPU computes stays in its cache.

    Args:
        rows: [2, kv_heads, tokens, head_dim] of the model's dtype.
        scratch: float32 [tokens, head_dim].
    """
    whole, rest = divmod(scratch.shape[0], KEY_GROUP)
    for head in range(rows.shape[1]):
        scales = packed.key_scales[head]
        scratch.copy_(packed.integers[0, head])
        scratch[: whole * KEY_GROUP].unflatten(0, (whole, KEY_GROUP)).mul_(scales[:whole, None])
        if rest:
            scratch[-rest:].mul_(scales[-1])
        rows[0, head].copy_(scratch)
        scratch.copy_(packed.integers[1, head])
        scratch.mul_(packed.value_scales[head, :, None])
        rows[1, head].copy_(scratch)


def require_scales(scales: torch.Tensor, name: str) -> None:
    """Raises KVCorrupt where one of the scales of a file, on a CPU, is not finite and above 0."""
    if not bool(((scales > 0) & (scales < torch.inf)).all()):  # nor what is not a number
        raise scales_error(name)


def _scales(largest: torch.Tensor) -> torch.Tensor:
    """The scales for channels or rows by their largest entry."""
    scales = (largest / LARGEST).clamp_min_(SMALLEST_SCALE)
    too_large = torch.isinf(scales * LARGEST)  # float32's largest number, rounded up
    below = torch.nextafter(scales, torch.zeros(()))
    return torch.where(too_large, below, scales)


def _rounded(values: torch.Tensor) -> torch.Tensor:
    return values.round_().clamp_(-LARGEST, LARGEST)
