"""The KV cache of one sequence: buffers the model attends to in place, never copied to grow.

A layer's buffer is [2, kv_heads, capacity, head_dim], keys then values. Rows below ``length`` are
written once and only read from then on; rows at and after it are room for what comes next. So a
mounted memory is the first rows of such a cache, and an answer is written behind it through a
``borrowed`` one, which leaves the memory as it was. A forward may take rows of several sequences at
once, or rows of one that are computed again where they stand: ``for_model`` says where its rows go.
Belongs to the thread that runs the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from memfs.runtime.model.attention import Span
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

    def filled(self) -> KVCache:
        """The same rows with no room behind them, while somebody else writes there."""
        other = KVCache(self.shape, self.length, [b[:, :, : self.length] for b in self.layers])
        other.length = self.length
        return other

    def borrowed(self) -> KVCache:
        """The same buffers with a length of its own: writing behind it leaves this one as it is."""
        other = KVCache(self.shape, self.capacity, self.layers)
        other.length = self.length
        return other


@dataclass(frozen=True)
class Slot:
    """Where the rows that a forward computes for one sequence go."""

    cache: KVCache
    rows: int
    at: torch.Tensor | None = None
    """Positions of rows that are there already and are computed again, ascending, int64 [rows];
    None for new ones, behind those that are there."""

    def __post_init__(self) -> None:
        if self.end > self.cache.capacity:  # torch would drop a single row without a word
            raise ValueError(f"{self.end} rows do not fit into a cache of {self.cache.capacity}")

    @property
    def end(self) -> int:
        """Rows of the sequence that are seen in this forward, those it computes included."""
        return self.cache.length + (self.rows if self.at is None else 0)

    def positions(self) -> torch.Tensor:
        """Of the rows computed, int64 [rows]."""
        if self.at is not None:
            return self.at
        return torch.arange(self.cache.length, self.end, device=self.cache.shape.device)


class Enough(Exception):
    """Ends a forward at a layer of which only the keys and values were wanted."""

    def __init__(self, states: torch.Tensor) -> None:
        """``states``: [2, kv_heads, rows, head_dim], in no cache."""
        super().__init__()
        self.states = states


def for_model(slots: Sequence[Slot], until: int | None = None) -> Cache:
    """Caches as transformers wants them, for one forward over the rows of all slots, one after
    another in a batch of one. ``KVCache.length`` is moved after the forward, by who runs it.

    Args:
        until: the layer at which the forward ends by raising ``Enough``.
    """
    layers = slots[0].cache.shape.layers
    return Cache(layers=[_Layer(slots, index, index == until) for index in range(layers)])


class _Layer(CacheLayerMixin):
    """One layer of the caches of a forward, in transformers' terms."""

    def __init__(self, slots: Sequence[Slot], index: int, last: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._slots = slots
        self._index = index
        self._last = last
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing: the buffers are there from the beginning."""

    def update(  # type: ignore[override]  # Spans are for our own attention
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor | list[Span], torch.Tensor | list[Span]]:
        """Writes the new rows, [1, kv_heads, rows, head_dim]; gives views of all that are seen.

        One sequence that goes on is a tensor, as every model expects; anything else ``Span``s.
        Raises Enough.
        """
        if self._last:
            raise Enough(torch.cat((key_states, value_states)))
        keys: list[Span] = []
        values: list[Span] = []
        states = torch.cat((key_states, value_states)).split([s.rows for s in self._slots], dim=2)
        for slot, rows in zip(self._slots, states, strict=True):
            buffer = slot.cache.layers[self._index]
            if slot.at is None:
                buffer[:, :, slot.cache.length : slot.end] = rows
            else:
                buffer.index_copy_(2, slot.at, rows)
            seen = buffer[:, :, : slot.end]
            keys.append(Span(seen[:1], slot.rows, slot.at))
            values.append(Span(seen[1:], slot.rows, slot.at))
        if len(self._slots) == 1 and self._slots[0].at is None:
            return keys[0].tensor, values[0].tensor
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(rows attended to, offset of the first)."""
        return self._slots[0].cache.length + query_length, 0

    def get_seq_length(self) -> int:
        """Rows before this forward."""
        return self._slots[0].cache.length

    def get_max_length(self) -> int:
        """The capacity."""
        return self._slots[0].cache.capacity
