"""Comparing the index with the files, for ``memfs index check`` and ``memfs fsck``.

Every file is read again, digests and checksums included. May run in another process beside a mount.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any, NamedTuple

from memfs.cube import layout
from memfs.index.lmdb_index import Index
from memfs.index.refresh import Model
from memfs.vault.facts import CubeFacts, inspect, judge
from memfs.vault.store import Store

SETTLE_S = 2.5
"""A change through or beside a mount is finished and in its index after so long."""

_META_FIELDS = frozenset(
    {"id", "title", "tags", "type", "created", "priority", "lifecycle", "frozen", "pinned"}
)
"""What a cube without a valid meta.json keeps from the one it had."""


class Difference(NamedTuple):
    """Where the index says something else than the files."""

    path: str
    """``""`` where it is the index as a whole."""
    what: str
    """``missing`` in the index, ``gone`` from the store, ``keys``, or a field of CubeFacts."""
    index: Any
    files: Any


def compare(
    store: Store, index: Index, model: Model = None, *, settle_s: float = 0.0
) -> list[Difference]:
    """Every difference there is.

    Args:
        settle_s: where a mount is at work, how long it may take for a change to be indexed: what
            differs is looked at once more after that.
    """
    paths = {path for path, names in store.walk() if path and layout.is_cube(names)}
    paths.update(index.paths())

    def differences(path: str) -> list[Difference]:
        return compare_cube(index, path, inspect(store, path, None, model), model)

    found = [d for path in sorted(paths) for d in differences(path)]
    if found and settle_s:
        time.sleep(settle_s)
        again = sorted({difference.path for difference in found})
        found = [d for path in again for d in differences(path)]
    return found + [Difference("", "keys", said, None) for said in index.key_errors()]


def compare_cube(
    index: Index, path: str, files: CubeFacts | None, model: Model
) -> list[Difference]:
    """The differences of one cube; ``files`` is what they say, None where there is no cube."""
    known = index.get(path)
    if known is None or files is None:
        if known is files:
            return []
        what = "missing" if known is None else "gone"
        return [Difference(path, what, known and known.id, files and files.id)]
    known = judge(known, model)  # it may have been written before this model was known
    kept = files.meta_sig is None or files.meta_reason is not None
    return [
        Difference(path, field.name, getattr(known, field.name), getattr(files, field.name))
        for field in dataclasses.fields(CubeFacts)
        if not field.name.endswith("_sig")
        and not (kept and field.name in _META_FIELDS)
        and getattr(known, field.name) != getattr(files, field.name)
    ]
