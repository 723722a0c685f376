"""Where the cubes of a store were at a moment, as their versions say. Used by ``tree``; any thread.

What is known of a moment that is over does not change, and is kept for a while. A moment that is
not over yet, such as today, is looked at anew when versions were made since.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from datetime import datetime

from memfs.cube import layout
from memfs.filesystem.catalogue import Catalogue
from memfs.vault.versions import records
from memfs.vault.versions.records import Parent, Version

_KEPT = 4
_AGE_S, _AGE_SHARE = 1.0, 5
"""For how long what is known of the present is believed; longer where it takes long to find out."""


class Moment:
    """The cubes that there were, by their paths."""

    def __init__(self, stamp: str, found: Iterable[Version]) -> None:
        self.stamp = stamp
        self._cubes: dict[str, Version] = {}
        self._children: dict[str, dict[str, Version]] = {"": {}}
        for version in found:
            known = self._cubes.get(version.path)
            if known is None or known.stamp < version.stamp:
                self._cubes[version.path] = version
        for cube, version in self._cubes.items():
            path = cube
            while path:
                path, name = layout.split(path)
                self._children.setdefault(path, {})[name] = version

    def find(self, path: str) -> tuple[Version | None, list[str]]:
        """The cube that a path lies in, and the names below it; None for none."""
        below: list[str] = []
        if path not in self._cubes and self.is_collection(path):
            return None, below
        while path:
            if path in self._cubes:
                return self._cubes[path], below
            path, name = layout.split(path)
            below.insert(0, name)
        return None, below

    def is_collection(self, path: str) -> bool:
        """Whether there were cubes below a directory."""
        return path in self._children

    def children(self, path: str) -> Iterable[str]:
        """The names of the cubes and collections in a directory."""
        return self._children.get(path, {})

    def parent(self, path: str) -> Parent:
        """A collection's rights, as a version of a cube in it has them."""
        found = next(iter(self._children[path].values()), None)
        depth = len(path.split("/")) if path else 0
        return found.parents[depth] if found else Parent(0, 0, 0o500)


class Moments:
    """The moments that were asked for of late."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._store = catalogue.store
        self._history = catalogue.history
        self._kept: dict[datetime, Moment] = {}
        self._present: tuple[int, float, float, Moment] | None = None
        self._lock = threading.Lock()

    def at(self, moment: datetime, *, over: bool) -> Moment:
        """What there was at a moment."""
        with self._lock:
            if not over:
                return self._now(moment)
            if moment not in self._kept:
                if len(self._kept) >= _KEPT:
                    self._kept.pop(next(iter(self._kept)))
                self._kept[moment] = self._found(moment)
            return self._kept[moment]

    def _now(self, moment: datetime) -> Moment:
        made, began = self._history.made, time.monotonic()
        if self._present is not None:
            known, when, took, found = self._present
            if known == made or began - when < max(_AGE_S, _AGE_SHARE * took):
                return found
        found = self._found(moment)
        self._present = (made, time.monotonic(), time.monotonic() - began, found)
        return found

    def _found(self, moment: datetime) -> Moment:
        stamp = records.stamp_of(moment)
        newest = (records.newest(self._store, i, stamp) for i in records.cube_ids(self._store))
        return Moment(stamp, (v for v in newest if v is not None and not v.deleted))
