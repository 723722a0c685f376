"""The KV cache of one sequence: buffers the model attends to in place, never copied to grow.

A layer's buffer is [2, kv_heads, capacity, head_dim], keys then values. Rows below ``length`` are
written once and only read from then on; rows at and after it are room for what comes next. So a
mounted memory is the first rows of such a cache, and an answer is written behind it through a
``borrowed`` one, which leaves the memory as it was. Belongs to the thread that runs the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from memfs.runtime.model.spare import spare


@dataclass(frozen=True)
class KVShape:
    """What a model's KV cache is made of."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def token_bytes(self) -> int:
        """Bytes of one row over all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.dtype.itemsize


class KVCache:
    """Rows of keys and values of one sequence, with room behind them."""

    def __init__(
        self, shape: KVShape, capacity: int, layers: list[torch.Tensor] | None = None
    ) -> None:
        """Room for ``capacity`` rows, none filled; in ``layers``, where these are given."""
        self.shape = shape
        self.capacity = capacity
        self.length = 0
        size = (2, shape.kv_heads, capacity, shape.head_dim)
        self.layers = layers or [
            torch.empty(size, dtype=shape.dtype, device=shape.device) for _ in range(shape.layers)
        ]

    @classmethod
    def in_spare_memory(cls, shape: KVShape, capacity: int) -> KVCache:
        """Likewise on a CPU, in memory that was made ready before, where there is enough."""
        buffers = spare.take(shape.layers, shape.token_bytes // shape.layers * capacity)
        if buffers is None:
            return cls(shape, capacity)
        size = (2, shape.kv_heads, capacity, shape.head_dim)
        return cls(shape, capacity, [b.view(shape.dtype).view(size) for b in buffers])

    @property
    def nbytes(self) -> int:
        """Bytes held, the room included."""
        return self.shape.token_bytes * self.capacity

    @property
    def room(self) -> int:
        """Rows that may still be written."""
        return self.capacity - self.length

    def append(self, other: KVCache, start: int = 0) -> None:
        """Copies the rows of ``other`` from ``start`` on behind this one's."""
        end = self.length + other.length - start
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            mine[:, :, self.length : end].copy_(theirs[:, :, start : other.length])
        self.length = end

    def resized(self, capacity: int) -> KVCache:
        """A cache of another capacity with a copy of the rows of this one."""
        copied = KVCache(self.shape, capacity)
        copied.append(self)
        return copied

    def borrowed(self) -> KVCache:
        """The same buffers with a length of its own: writing behind it leaves this one as it is."""
        other = KVCache(self.shape, self.capacity, self.layers)
        other.length = self.length
        return other

    def for_model(self) -> Cache:
        """This cache as transformers wants it, for one forward that starts at ``length``."""
        return Cache(layers=[_Layer(self, i) for i in range(self.shape.layers)])


class _Layer(CacheLayerMixin):
    """One layer of a KVCache in transformers' terms. ``KVCache.length`` moves after the forward."""

    def __init__(self, cache: KVCache, index: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._cache = cache
        self._buffer = cache.layers[index]
        self._start = cache.length
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing: the buffer is there from the beginning."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes the new rows, [1, kv_heads, rows, head_dim]; gives views of all rows so far."""
        end = self._start + key_states.shape[-2]
        self._buffer[0, :, self._start : end] = key_states[0]
        self._buffer[1, :, self._start : end] = value_states[0]
        return self._buffer[0:1, :, :end], self._buffer[1:2, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(rows attended to, offset of the first)."""
        return self._start + query_length, 0

    def get_seq_length(self) -> int:
        """Rows before this forward."""
        return self._start

    def get_max_length(self) -> int:
        """The capacity."""
        return self._cache.capacity
