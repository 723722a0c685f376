"""Text to KV cache: a payload is prefilled behind the preamble, an unchanged beginning is kept.

``prefill`` is a job of the model's thread. Two who want the same cube encoded share one job
(``Encodings``); it is cancelled when nobody waits for it any more. ``Encodings`` belongs to the
service's event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from dataclasses import dataclass, field
from typing import Any

from memfs.errors import TooLong
from memfs.runtime.kv.kv_store import ROOM
from memfs.runtime.model.engine import PREFILL_CHUNK
from memfs.runtime.model.kv_cache import KVCache
from memfs.runtime.model.resident import Resident


@dataclass
class Encoded:
    """A cube's rows, [preamble | cube], with room behind them."""

    cache: KVCache
    ids: list[int]
    kept: int
    """Rows that were taken over from an earlier KV cache."""
    seconds: float
    busy_seconds: float
    """Of them, the model's own: others may have had its thread in between."""


Earlier = tuple[KVCache, list[int]]
"""A KV cache made from an earlier text, [preamble | cube], and the ids of the cube's rows."""


def prefill(
    resident: Resident, text: str, earlier: Earlier | None
) -> Generator[dict[str, Any] | None, None, Encoded]:
    """Computes the rows of a text, a chunk a step; yields ``progress`` with tokens per second.

    Args:
        earlier: of this model's. Rows before the
            first id that differs are kept, in whole chunks: what comes out is bit for bit what a
            new prefill gives.

    Raises:
        TooLong: the text leaves no room for a question in the model's context.
    """
    began = time.perf_counter()
    ids = resident.prompt.memory(text, resident.context)
    if resident.base + len(ids) + PREFILL_CHUNK > resident.context:
        raise TooLong(
            f"{len(ids)} tokens; the model takes {resident.context}, "
            f"{resident.base + PREFILL_CHUNK} of them for the preamble and a question"
        )
    cache = resident.engine.new_cache(resident.base + len(ids) + ROOM)
    cache.append(resident.preamble)
    kept = 0
    if earlier is not None:
        old, old_ids = earlier
        kept = _common(ids, old_ids) // PREFILL_CHUNK * PREFILL_CHUNK
        old.length = resident.base + kept
        cache.append(old, resident.base)
    away = 0.0
    for done in resident.engine.prefill(cache, ids[kept:]):
        now = time.perf_counter()
        yield {
            "event": "progress",
            "done": kept + done,
            "total": len(ids),
            "tokens_per_s": done / (now - began),
        }
        yield None
        away += time.perf_counter() - now
    resident.engine.finish()
    seconds = time.perf_counter() - began
    return Encoded(cache, ids, kept, seconds, seconds - away)


def _common(new: list[int], old: list[int]) -> int:
    """How many ids the two begin with in common."""
    for index, (one, other) in enumerate(zip(new, old, strict=False)):
        if one != other:
            return index
    return min(len(new), len(old))


@dataclass
class _Shared:
    """One encode under way, and who is told of it."""

    task: asyncio.Task[dict[str, Any]]
    listeners: set[asyncio.Queue[dict[str, Any] | None]] = field(default_factory=set)


Tell = Callable[[dict[str, Any]], None]


class Encodings:
    """The encodes under way, one a cube."""

    def __init__(self) -> None:
        self._running: dict[str, _Shared] = {}

    def __len__(self) -> int:
        return len(self._running)

    async def run(
        self, key: str, work: Callable[[Tell], Awaitable[dict[str, Any]]]
    ) -> AsyncIterator[dict[str, Any]]:
        """The progress of the encode called ``key``, then its result; ``work`` starts a new one.

        Args:
            key: names the cube, and the text as it is now.
            work: does it, telling of its progress; cancelled when the last listener is gone.
        """
        shared = self._running.get(key)
        if shared is None:
            shared = self._running[key] = self._start(key, work)
        queue: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        shared.listeners.add(queue)
        shared.task.add_done_callback(lambda _: queue.put_nowait(None))
        try:
            while (event := await queue.get()) is not None:
                yield event
            yield await shared.task
        finally:
            shared.listeners.discard(queue)
            if not shared.listeners:
                shared.task.cancel()
                self._forget(key, shared.listeners)  # who comes now starts another

    def _start(self, key: str, work: Callable[[Tell], Awaitable[dict[str, Any]]]) -> _Shared:
        listeners: set[asyncio.Queue[dict[str, Any] | None]] = set()

        def tell(event: dict[str, Any]) -> None:
            for queue in listeners:
                queue.put_nowait(event)

        async def whole() -> dict[str, Any]:
            try:
                return await work(tell)
            finally:
                self._forget(key, listeners)

        return _Shared(asyncio.create_task(whole()), listeners)

    def _forget(self, key: str, listeners: set[asyncio.Queue[dict[str, Any] | None]]) -> None:
        shared = self._running.get(key)
        if shared is not None and shared.listeners is listeners:
            del self._running[key]
