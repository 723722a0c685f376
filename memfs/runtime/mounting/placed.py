"""Several cubes in one cache, one placed after another: lent to answers, kept for the next one.

They are in the residency beside the cubes, under a key that names each cube and its very rows. Used
by the asks, in the service's event loop.
"""

from __future__ import annotations

from array import array

from memfs.runtime.model.kv_cache import KVCache
from memfs.runtime.mounting.memory import Memory
from memfs.runtime.mounting.residency import Entry, Residency


class Placed:
    """The caches of several cubes in a residency."""

    def __init__(self, residency: Residency[Memory], base: int) -> None:
        """``base`` is the rows of the preamble."""
        self._residency = residency
        self._base = base

    def lend(self, entries: list[Entry[Memory]]) -> tuple[str | None, KVCache | None, str | None]:
        """Lends an answer a cache to write behind: of its only memory, or of all placed together.

        Args:
            entries: the caches that all memories of a question are in, each in use once by it; the
                one that is lent of several together is added.

        Returns:
            The key of several together; the cache, without room behind it where another answer is
            writing there, None where there is none; and how several were put together.
        """
        if len(entries) == 1:
            return None, entries[0].value.cache if entries[0].users == 1 else None, None
        key = "placed\0" + "\0".join(f"{e.key}\0{e.value.rows}" for e in entries)
        found = self._residency.use(key)
        if found is None:
            return key, None, None
        found.users += 1
        entries.append(found)
        cache = found.value.cache if found.users == 1 else found.value.cache.filled()
        return key, cache, found.value.composed

    def keep(self, key: str, cache: KVCache, composed: str) -> None:
        """Keeps several cubes as they were placed, where there is room, for the next question.

        Others that were placed go for it, cubes do not.
        """
        room = self._residency.budget_bytes - cache.nbytes
        for entry in list(self._residency):
            if self._residency.used_bytes > room and entry.value.cube is None and not entry.users:
                self._residency.remove(entry.key)
        if self._residency.used_bytes > room or self._residency.peek(key) is not None:
            return
        memory = Memory(None, cache, array("i"), key, None, None, composed=composed)
        self._residency.add(key, memory, cache.length - self._base)

    def drop_with(self, key: str) -> None:
        """Takes out those that a cube is in, which is no longer what it was."""
        for entry in list(self._residency):
            if entry.value.cube is None and f"\0{key}\0" in entry.key:
                self._residency.remove(entry.key)
