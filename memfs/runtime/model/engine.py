"""Token ids in, token ids out: prefill and greedy decode over a KVCache, and nothing else.

A *segment* (the preamble, one cube, the question) is computed from its first row on in chunks of
``PREFILL_CHUNK``. The rows of a cube are then the same bits whether they are computed for a
question or for its file, and after an edit as from scratch: a kept prefix is cut at a chunk. Runs
in the model's thread; the generators give that thread back between chunks and between tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Sequence

import torch
from transformers import PreTrainedModel

from memfs.runtime.model.kv_cache import Enough, KVCache, KVShape, Slot, for_model

PREFILL_CHUNK = 256


class Engine:
    """A causal model, driven a forward at a time."""

    def __init__(self, model: PreTrainedModel, shape: KVShape) -> None:
        self.model = model
        self.shape = shape

    def new_cache(self, capacity: int) -> KVCache:
        """An empty cache of ``capacity`` rows."""
        return KVCache(self.shape, capacity)

    def finish(self) -> None:
        """Waits for what an accelerator was given to do."""
        if self.shape.device.type == "cuda":
            torch.cuda.synchronize(self.shape.device)

    def prefill(
        self, cache: KVCache, ids: Sequence[int], *, logits: bool = False
    ) -> Generator[int, None, torch.Tensor | None]:
        """Computes the rows of a segment behind those in ``cache``.

        Yields the number of rows done after each chunk; returns the logits after the last row,
        float32 [vocabulary], where ``logits`` asks for them: at once, without a yield before.
        """
        last = None
        for start in range(0, len(ids), PREFILL_CHUNK):
            chunk = ids[start : start + PREFILL_CHUNK]
            final = start + len(chunk) == len(ids)
            last = self.forward(cache, chunk, logits=logits and final)
            if last is None:
                yield start + len(chunk)
        return last

    def forward(
        self, cache: KVCache, ids: Sequence[int], *, logits: bool = True
    ) -> torch.Tensor | None:
        """One forward of ``ids`` behind the rows in ``cache``; the logits after the last."""
        found = self._run([Slot(cache, len(ids))], ids, [len(ids) - 1] if logits else [])
        return found[0] if logits else None

    def together(self, caches: Sequence[KVCache], ids: Sequence[Sequence[int]]) -> torch.Tensor:
        """One forward for several sequences, the ``ids`` of each behind the rows in its cache.

        Returns the logits after the last row of each, float32 [sequences, vocabulary]. They may
        differ in the last bits from those of ``forward``: sums are taken in another order.
        """
        slots = [Slot(cache, len(own)) for cache, own in zip(caches, ids, strict=True)]
        last = [end - 1 for end in itertools.accumulate(slot.rows for slot in slots)]
        return self._run(slots, [token for own in ids for token in own], last)

    def scores(self, cache: KVCache, ids: Sequence[int], last: int) -> torch.Tensor:
        """One forward of ``ids`` behind the rows in ``cache``; the logits after each of the last
        ones, float32 [last, vocabulary]."""
        return self._run([Slot(cache, len(ids))], ids, range(len(ids) - last, len(ids)))

    def recompute(self, cache: KVCache, ids: Sequence[int], at: Sequence[int]) -> None:
        """Computes rows that are in ``cache`` again, each seeing all rows before it as they are
        then: those at the positions ``at``, ascending, whose tokens are ``ids``."""
        self._run([self._there(cache, at)], ids, [])

    def outlook(
        self, cache: KVCache, ids: Sequence[int], at: Sequence[int], layer: int
    ) -> torch.Tensor:
        """Keys and values that rows would get at a layer if they were computed again, as far as the
        layers before it: those alone are written, and cost anything.

        Returns [2, kv_heads, rows, head_dim].
        """
        try:
            self._run([self._there(cache, at)], ids, [], until=layer)
        except Enough as enough:
            return enough.states
        raise AssertionError("a forward that goes through no cache")

    def _there(self, cache: KVCache, at: Sequence[int]) -> Slot:
        return Slot(cache, len(at), torch.tensor(at, device=self.shape.device))

    def _run(
        self,
        slots: Sequence[Slot],
        ids: Sequence[int],
        wanted: Sequence[int],
        until: int | None = None,
    ) -> torch.Tensor:
        """Computes the rows of all slots, which the caches have then.

        Returns the logits after those rows that are ``wanted``, float32 [wanted, vocabulary]: the
        model's own, which in some are a multiple of what the head gives. Raises Enough at the layer
        ``until``.
        """
        device = self.shape.device
        with torch.inference_mode():
            rows = {
                "input_ids": torch.tensor([list(ids)], device=device),
                "position_ids": torch.cat([slot.positions() for slot in slots])[None],
                "past_key_values": for_model(slots, until),
                "use_cache": True,
            }
            if wanted:
                keep = torch.tensor(wanted, device=device)
                logits: torch.Tensor = self.model(**rows, logits_to_keep=keep).logits[0].float()
            else:
                self.model.base_model(**rows)
                logits = torch.empty(0)
        for slot in slots:
            slot.cache.length = slot.end
        return logits

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
