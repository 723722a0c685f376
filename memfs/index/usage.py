"""The usage counters in the index, by the id of the cube, so that they outlive a rename.

Part of ``Index``; any thread.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING

from memfs.index.environment import BATCH, Environment, batches
from memfs.index.records import Usage, seal_usage, unseal_usage

if TYPE_CHECKING:
    from memfs.index.environment import Txn


class UsageTable:
    """Usage by cube id."""

    def __init__(self, environment: Environment) -> None:
        self._env = environment

    def usage(self, cube_id: str) -> Usage:
        """How often a cube was used; zeros where nothing is known."""
        found = self._env.read(lambda txn: self._usage(txn, cube_id))
        return found[0] if found else Usage()

    def count(
        self, cube_id: str, *, reads: int = 0, questions: int = 0, at: float | None = None
    ) -> None:
        """Adds to a cube's counters."""
        when = time.time() if at is None else at

        def body(txn: Txn) -> None:
            known, _ = self._usage(txn, cube_id) or (Usage(), False)
            last = max(when, known.last_used or 0.0)
            usage = Usage(known.reads + reads, known.questions + questions, last)
            self._set_usage(txn, cube_id, usage, unwritten=True)

        self._env.write(body)

    def set_usage(self, cube_id: str, usage: Usage, *, unwritten: bool = False) -> None:
        """Sets a cube's counters.

        Args:
            unwritten: whether meta.json has yet to be told.
        """
        self._env.write(
            lambda txn: self._set_usage(txn, cube_id, usage, unwritten=unwritten),
        )

    def merge_usage(self, items: Iterable[tuple[str, Usage, bool]]) -> int:
        """Takes over the counters that ``all_usage`` gave elsewhere; the larger ones stay.

        For a cube that arrives with a history, and for another index's; how many there were.
        """
        total = 0
        for batch in batches(items, BATCH):
            self._env.write(partial(self._merge, batch=batch))
            total += len(batch)
        return total

    def mark_written(self, cube_id: str, usage: Usage) -> None:
        """Notes that meta.json has these counters, unless they went on meanwhile."""

        def body(txn: Txn) -> None:
            if self._usage(txn, cube_id) == (usage, True):
                self._set_usage(txn, cube_id, usage, unwritten=False)

        self._env.write(body)

    def has_usage(self, cube_id: str) -> bool:
        """Whether there are counters for an id, be they zeros."""
        return self._env.read(lambda txn: self._usage(txn, cube_id)) is not None

    def all_usage(self) -> Iterator[tuple[str, Usage, bool]]:
        """Id, counters, and whether they are still to be written to meta.json, of every id."""
        for key, value in self._env.pairs("usage", b""):
            usage, unwritten = unseal_usage(key, value)
            yield key.decode(), usage, unwritten

    def _usage(self, txn: Txn, cube_id: str) -> tuple[Usage, bool] | None:
        key = cube_id.encode()
        value = txn.get(key, db=self._env.db["usage"])
        return None if value is None else unseal_usage(key, value)

    def _merge(self, txn: Txn, batch: list[tuple[str, Usage, bool]]) -> None:
        for cube_id, usage, unwritten in batch:
            known, still = self._usage(txn, cube_id) or (usage, unwritten)
            merged = Usage(
                max(known.reads, usage.reads),
                max(known.questions, usage.questions),
                max((t for t in (known.last_used, usage.last_used) if t is not None), default=None),
            )
            self._set_usage(txn, cube_id, merged, unwritten=unwritten or still)

    def _set_usage(self, txn: Txn, cube_id: str, usage: Usage, *, unwritten: bool) -> None:
        key = cube_id.encode()
        txn.put(key, seal_usage(key, usage, unwritten=unwritten), db=self._env.db["usage"])
