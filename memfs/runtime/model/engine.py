"""Token ids in, token ids out: prefill and greedy decode over a KVCache, and nothing else.

A *segment* (the preamble, one cube, the question) is computed from its first row on in chunks of
``PREFILL_CHUNK``. The rows of a cube are then the same bits whether they are computed for a
question or for its file, and after an edit as from scratch: a kept prefix is cut at a chunk. Runs
in the model's thread; the generators give that thread back between chunks and between tokens.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

import torch
from transformers import PreTrainedModel

from memfs.runtime.model.kv_cache import KVCache, KVShape

PREFILL_CHUNK = 256


class Engine:
    """A causal model, driven a forward at a time."""

    def __init__(self, model: PreTrainedModel, shape: KVShape) -> None:
        self.model = model
        self.shape = shape

    def new_cache(self, capacity: int) -> KVCache:
        """An empty cache of ``capacity`` rows."""
        return KVCache(self.shape, capacity)

    def prefill(
        self, cache: KVCache, ids: Sequence[int], *, logits: bool = False
    ) -> Generator[int, None, torch.Tensor | None]:
        """Computes the rows of a segment behind those in ``cache``.

        Yields the number of rows done after each chunk; returns the logits after the last row,
        float32 [vocabulary], where ``logits`` asks for them.
        """
        last = None
        for start in range(0, len(ids), PREFILL_CHUNK):
            chunk = ids[start : start + PREFILL_CHUNK]
            final = start + len(chunk) == len(ids)
            last = self.forward(cache, chunk, logits=logits and final)
            yield start + len(chunk)
        return last

    def forward(
        self, cache: KVCache, ids: Sequence[int], *, logits: bool = True
    ) -> torch.Tensor | None:
        """One forward of ``ids`` behind the rows in ``cache``; the logits after the last."""
        with torch.inference_mode():
            rows = torch.tensor([list(ids)], device=self.shape.device)
            at = torch.arange(cache.length, cache.length + len(ids), device=self.shape.device)
            hidden = self.model.base_model(
                input_ids=rows,
                position_ids=at[None],
                past_key_values=cache.for_model(),
                use_cache=True,
            ).last_hidden_state
            cache.length += len(ids)
            if not logits:
                return None
            scores: torch.Tensor = self.model.get_output_embeddings()(hidden[0, -1])
            return scores.float()

    def decode(
        self, cache: KVCache, first: torch.Tensor, stop: frozenset[int], limit: int
    ) -> Generator[int, None, None]:
        """Greedy tokens after ``first``, the logits of the last prefilled row.

        Ends before a token in ``stop``, after ``limit`` tokens, or when the cache is full.
        """
        logits = first
        for count in range(limit):
            token = int(logits.argmax())
            if token in stop:
                return
            yield token
            if cache.room == 0 or count + 1 == limit:
                return
            following = self.forward(cache, [token])
            assert following is not None
            logits = following
