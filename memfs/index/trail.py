"""The audit trail in the index: events by sequence number, the oldest dropped in the end.

Part of ``Index``; any thread.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from memfs.index.environment import BATCH, Environment, batches
from memfs.index.records import dump, load, seal, seq_key, unseal

if TYPE_CHECKING:
    from memfs.index.environment import Txn

KEEP_EVENTS = 250_000
"""Events kept; older ones are dropped, some thousands at a time."""

_TRIM = 4096


class EventTable:
    """Events by sequence number, which starts at 1 and is never used again."""

    def __init__(self, environment: Environment) -> None:
        self._env = environment

    def log(self, event: Mapping[str, Any]) -> int:
        """Appends to the audit trail, with the time where it has none; its sequence number."""
        content = dump({"time": time.time(), **event})

        def body(txn: Txn) -> int:
            events = self._env.db["events"]
            seq = self._last(txn) + 1
            txn.put(seq_key(seq), seal(seq_key(seq), content), append=True, db=events)
            if seq % _TRIM == 0:
                with txn.cursor(events) as cursor:
                    while cursor.first() and cursor.key() <= seq_key(max(seq - KEEP_EVENTS, 0)):
                        cursor.delete()
            return seq

        return self._env.write(body)

    def events(self, after: int = 0, limit: int | None = None) -> Iterator[dict[str, Any]]:
        """The audit trail from sequence number ``after`` on, each event with its ``seq``.

        Ends with what there was when it was called.
        """
        last = self._env.read(self._last)
        for key, value in self._env.pairs("events", seq_key(after + 1)):
            seq = int.from_bytes(key, "big")
            if seq > last or (limit is not None and limit <= 0):
                return
            if limit is not None:
                limit -= 1
            yield {"seq": seq, **load(unseal(key, value))}

    def put_events(self, events: Iterable[Mapping[str, Any]]) -> int:
        """Takes over the events of another index, which have their ``seq``; how many they were."""
        total = 0
        for batch in batches(events, BATCH):
            self._env.write(partial(self._put_events, batch=batch))
            total += len(batch)
        return total

    def _put_events(self, txn: Txn, batch: list[Mapping[str, Any]]) -> None:
        for event in batch:
            key = seq_key(event["seq"])
            content = dump({name: value for name, value in event.items() if name != "seq"})
            txn.put(key, seal(key, content), db=self._env.db["events"])

    def _last(self, txn: Txn) -> int:
        with txn.cursor(self._env.db["events"]) as cursor:
            return int.from_bytes(cursor.key(), "big") if cursor.last() else 0
