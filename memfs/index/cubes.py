"""The cubes in the index: records by path, and the keys that find them by id, facet and time.

Part of ``Index``; any thread.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING

from memfs.errors import IndexDamaged
from memfs.index.environment import BATCH, Environment, batches
from memfs.index.records import (
    CUT,
    facet_key,
    facets_of,
    path_key,
    seal_cube,
    time_key,
    unseal_cube,
)
from memfs.vault.facts import CubeFacts

if TYPE_CHECKING:
    from memfs.index.environment import Txn

Found = tuple[str, CubeFacts]

_OWNER, _CLAIMANT = b"0", b"1"


class CubeTable:
    """Cubes by path. Paths are as in ``memfs.cube.layout``."""

    def __init__(self, environment: Environment) -> None:
        self._env = environment

    def __len__(self) -> int:
        return self._env.entries("cubes")

    def get(self, path: str) -> CubeFacts | None:
        """The facts of the cube at ``path``."""
        key = path_key(path)
        value = self._env.read(lambda txn: txn.get(key, db=self._env.db["cubes"]))
        return None if value is None else unseal_cube(key, value)[1]

    def by_id(self, cube_id: str) -> Found | None:
        """Path and facts of the cube that owns an id."""

        def body(txn: Txn) -> tuple[bytes, bytes | None] | None:
            value = txn.get(cube_id.encode(), db=self._env.db["ids"])
            if value is None:
                return None
            return value[1:], txn.get(value[1:], db=self._env.db["cubes"])

        found = self._env.read(body)
        if found is None:
            return None
        key, value = found
        if value is None:
            raise IndexDamaged(f"the id {cube_id} leads to no cube")
        return unseal_cube(key, value)

    def paths_of(self, cube_id: str) -> list[str]:
        """Every path whose meta.json has this id: its owner's, then those of untold copies."""

        def body(txn: Txn) -> list[str]:
            with txn.cursor(self._env.db["ids"]) as cursor:
                values = list(cursor.iternext_dup()) if cursor.set_key(cube_id.encode()) else []
            return [self._cube(txn, value[1:])[0] for value in values]

        return self._env.read(body)

    def shared_ids(self) -> list[str]:
        """Ids that more than one path has: copies that are not told apart yet."""

        def body(txn: Txn) -> set[str]:
            with txn.cursor(self._env.db["ids"]) as cursor:
                return {key.decode() for key, value in cursor if value[:1] == _CLAIMANT}

        return sorted(self._env.read(body))

    def key_errors(self) -> list[str]:
        """What is wrong with the secondary keys, counted against the records in one transaction."""

        def body(txn: Txn) -> list[str]:
            counts = dict.fromkeys(("ids", "facets", "times"), 0)
            for _, facts in (unseal_cube(*pair) for pair in txn.cursor(self._env.db["cubes"])):
                counts["ids"] += facts.id is not None
                counts["facets"] += len(facets_of(facts))
                counts["times"] += 1
            found = {name: txn.stat(self._env.db[name])["entries"] for name in counts}
            return [
                f"{name} has {found[name]} keys for {count} in the records"
                for name, count in counts.items()
                if found[name] != count
            ]

        return self._env.read(body)

    def put(self, path: str, facts: CubeFacts) -> bool:
        """Sets the facts of the cube at ``path``; False where its id is owned by another path."""
        return self._env.write(lambda txn: self._put(txn, path, facts))

    def put_many(self, items: Iterable[Found]) -> int:
        """Sets the facts of many cubes, some thousands a transaction; how many they were."""
        total = 0
        for batch in batches(items, 4 * BATCH):
            self._env.write(partial(self._put_all, items=batch))
            total += len(batch)
        return total

    def remove(self, path: str) -> bool:
        """Forgets the cube at ``path``, not those below it; whether there was one."""
        return self._env.write(lambda txn: self._remove(txn, path_key(path)))

    def remove_under(self, prefix: str) -> int:
        """Forgets the cube at ``prefix`` and every one below it; how many they were."""

        def body(txn: Txn) -> int:
            return sum(
                self._remove(txn, path_key(path)) for path, _ in self._at_and_below(txn, prefix)
            )

        return self._env.write(body)

    def move(self, old: str, new: str) -> int:
        """Renames the cube at ``old`` and every one below it, at once; how many they were."""

        def body(txn: Txn) -> int:
            found = self._at_and_below(txn, old)
            for path, _ in found:
                self._remove(txn, path_key(path))
            for path, facts in found:
                self._put(txn, new + path[len(old) :], facts)
            return len(found)

        return self._env.write(body)

    def under(self, prefix: str) -> Iterator[Found]:
        """The cube at ``prefix`` and every one below it; ``""`` gives all."""
        facts = self.get(prefix) if prefix else None
        if facts is not None:
            yield prefix, facts
        stem = _stem(prefix)
        for key, value in self._env.pairs("cubes", stem, stem):
            path, facts = unseal_cube(key, value)
            if _is_below(path, prefix):
                yield path, facts

    def paths(self) -> Iterator[str]:
        """Every path, from the keys alone where they hold it whole."""
        for key, value in self._env.pairs("cubes", b""):
            yield os.fsdecode(key) if len(key) <= CUT else unseal_cube(key, value)[0]

    def find(
        self,
        *,
        kv_state: str | None = None,
        tag: str | None = None,
        owner: int | None = None,
        pinned: bool = False,
        since: float | None = None,
        until: float | None = None,
    ) -> Iterator[Found]:
        """Cubes for which all that is asked is true.

        Args:
            owner: a user id.
            pinned: whether only pinned ones are wanted.
            since: changed at or after, seconds since 1970.
            until: changed before.
        """
        facets = []
        if kv_state is not None:
            facets.append(facet_key("state", kv_state))
        if tag is not None:
            facets.append(facet_key("tag", tag))
        if owner is not None:
            facets.append(facet_key("owner", str(owner)))
        if pinned:
            facets.append(facet_key("pinned", ""))
        timed = since is not None or until is not None
        if not facets and not timed:
            yield from self.under("")
            return
        sets = [self._env.read(partial(self._standing, facet=facet)) for facet in facets]
        if timed:
            sets.append(self._env.read(lambda txn: self._changed(txn, since, until)))
        for batch in batches(sorted(set.intersection(*sets)), BATCH):
            for path, facts in self._env.read(partial(self._cubes, keys=batch)):
                # It may have changed since the keys were read.
                if facets_of(facts).issuperset(facets) and _within(facts.changed, since, until):
                    yield path, facts

    def _put_all(self, txn: Txn, items: list[Found]) -> None:
        for path, facts in items:
            self._put(txn, path, facts)

    def _put(self, txn: Txn, path: str, facts: CubeFacts) -> bool:
        db, key = self._env.db, path_key(path)
        value, before = seal_cube(key, path, facts), txn.get(key, db=db["cubes"])
        if value == before:
            return self._owns(txn, facts.id, key)
        known = unseal_cube(key, before)[1] if before is not None else None
        txn.put(key, value, db=db["cubes"])
        stood = facets_of(known) if known else set()
        stands = facets_of(facts)
        for facet in stood - stands:
            txn.delete(facet, key, db=db["facets"])
        for facet in stands - stood:
            txn.put(facet, key, db=db["facets"])
        if known is None or time_key(known.changed) != time_key(facts.changed):
            if known is not None:
                txn.delete(time_key(known.changed), key, db=db["times"])
            txn.put(time_key(facts.changed), key, db=db["times"])
        if known is None or known.id != facts.id:
            if known is not None and known.id is not None:
                self._give_up(txn, known.id.encode(), key)
            if facts.id is not None:
                self._claim(txn, facts.id.encode(), key)
        return self._owns(txn, facts.id, key)

    def _owns(self, txn: Txn, cube_id: str | None, key: bytes) -> bool:
        if cube_id is None:
            return True
        return txn.get(cube_id.encode(), db=self._env.db["ids"]) == _OWNER + key

    def _remove(self, txn: Txn, key: bytes) -> bool:
        db = self._env.db
        value = txn.pop(key, db=db["cubes"])
        if value is None:
            return False
        _, known = unseal_cube(key, value)
        for facet in facets_of(known):
            txn.delete(facet, key, db=db["facets"])
        txn.delete(time_key(known.changed), key, db=db["times"])
        if known.id is not None:
            self._give_up(txn, known.id.encode(), key)
        return True

    def _claim(self, txn: Txn, cube_id: bytes, key: bytes) -> None:
        """The first path to come with an id owns it; the values sort so that it stands first."""
        ids = self._env.db["ids"]
        first = txn.get(cube_id, db=ids)
        taken = first is not None and first[:1] == _OWNER
        txn.put(cube_id, (_CLAIMANT if taken else _OWNER) + key, db=ids)

    def _give_up(self, txn: Txn, cube_id: bytes, key: bytes) -> None:
        ids = self._env.db["ids"]
        if txn.delete(cube_id, _CLAIMANT + key, db=ids):
            return
        txn.delete(cube_id, _OWNER + key, db=ids)
        heir = txn.get(cube_id, db=ids)
        if heir is not None:
            txn.delete(cube_id, heir, db=ids)
            txn.put(cube_id, _OWNER + heir[1:], db=ids)

    def _cube(self, txn: Txn, key: bytes) -> Found:
        value = txn.get(key, db=self._env.db["cubes"])
        if value is None:
            raise IndexDamaged(f"a key leads to no cube: {key[:80]!r}")
        return unseal_cube(key, value)

    def _cubes(self, txn: Txn, keys: list[bytes]) -> list[Found]:
        """The cubes at those of the keys that are still there."""
        values = ((key, txn.get(key, db=self._env.db["cubes"])) for key in keys)
        return [unseal_cube(key, value) for key, value in values if value is not None]

    def _at_and_below(self, txn: Txn, prefix: str) -> list[Found]:
        """``under``, within a transaction."""
        key = path_key(prefix)
        value = txn.get(key, db=self._env.db["cubes"])
        found = [] if value is None else [unseal_cube(key, value)]
        stem = _stem(prefix)
        rest = (unseal_cube(*pair) for pair in self._env.slice(txn, "cubes", stem, stem))
        return found + [item for item in rest if _is_below(item[0], prefix)]

    def _standing(self, txn: Txn, facet: bytes) -> set[bytes]:
        with txn.cursor(self._env.db["facets"]) as cursor:
            return set(cursor.iternext_dup()) if cursor.set_key(facet) else set()

    def _changed(self, txn: Txn, since: float | None, until: float | None) -> set[bytes]:
        end = None if until is None else time_key(until)
        found = set()
        with txn.cursor(self._env.db["times"]) as cursor:
            if cursor.set_range(time_key(since or 0.0)):
                for key, value in cursor:
                    if end is not None and key > end:
                        break
                    found.add(value)
        return found


def _stem(prefix: str) -> bytes:
    """What the key of every cube below ``prefix`` begins with; others' may begin so too."""
    return (os.fsencode(prefix) + b"/")[:CUT] if prefix else b""


def _is_below(path: str, prefix: str) -> bool:
    return not prefix or path.startswith(prefix + "/")


def _within(changed: float, since: float | None, until: float | None) -> bool:
    return (since is None or since <= changed) and (until is None or changed < until)
