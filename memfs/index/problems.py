"""What is wrong with a store's index: part of ``memfs fsck``, which walks the store itself.

The index is read through by a child process before it is believed; every cube's facts are then
compared with what it says. All its problems have one repair, made once: the index is made again
from the files. One thread.
"""

from __future__ import annotations

import errno
import functools
import os
from collections.abc import Iterable, Iterator

from memfs.cube import layout
from memfs.errors import IndexDamaged
from memfs.index.check import salvage, sound
from memfs.index.compare import compare_cube
from memfs.index.lmdb_index import Index
from memfs.index.rebuild import MODEL, index_directory, leftovers, rebuild
from memfs.index.refresh import Model, rescan
from memfs.vault.facts import CubeFacts
from memfs.vault.problem import Problem
from memfs.vault.store import Store

_PATH = f"{layout.CONTROL}/index"


class IndexCheck:
    """One check of a store's index, which need not have one."""

    def __init__(self, store: Store, *, live: bool) -> None:
        """Opens the index, where it is sound.

        Args:
            live: whether a mount is at work on it.
        """
        self.model: Model = None
        """The model's part of the fingerprint, as last known here."""
        self.mend = functools.cache(self._mend)
        """Makes the index again, at the first call; says what was done."""
        self._store = store
        self._live = live
        self._directory = index_directory(store)
        self._index: Index | None = None
        self._reason: str | None = None
        self._salvaged: dict[str, str] = {}
        if os.path.lexists(self._directory):
            self._open()

    def close(self) -> None:
        """Gives the index back. What was found may still be mended."""
        if self._index is not None:
            self._index.close()
            self._index = None

    def __enter__(self) -> IndexCheck:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def known(self, path: str) -> CubeFacts | None:
        """What the index says of a path; of a damaged one, the id that could be saved."""
        if self._index is not None:
            return self._index.get(path)
        cube_id = self._salvaged.get(path)
        return None if cube_id is None else CubeFacts(id=cube_id)

    def owner(self, cube_id: str) -> str | None:
        """The path to which the index gives an id."""
        found = self._index.by_id(cube_id) if self._index is not None else None
        return found[0] if found else None

    def cube(self, path: str, files: CubeFacts | None) -> Iterator[Problem]:
        """Where the index says something else of a cube than its files."""
        if self._index is None:
            return
        found = compare_cube(self._index, path, files, self.model)
        if found:
            said = ", ".join(_said(d.what, d.index, d.files) for d in found)
            yield Problem("index", path, said, self.mend)

    def missing(self, seen: Iterable[str]) -> list[str]:
        """Paths that the index knows and a walk over the store has not come by."""
        return sorted(set(self._index.paths()).difference(seen)) if self._index is not None else []

    def whole(self) -> Iterator[Problem]:
        """What is wrong with the index as a whole."""
        if self._reason is not None:
            yield Problem("index", _PATH, self._reason, self.mend)
        if self._index is not None:
            for said in self._index.key_errors():
                yield Problem("index", _PATH, said, self.mend)
        if not self._live:
            for path in leftovers(self._directory):
                what = "an index that a crash left half made or half replaced"
                yield Problem("index", f"{layout.CONTROL}/{path.name}", what, self.mend)

    def bring_up_to_date(self) -> None:
        """Takes in what repairs have changed in the files."""
        self.close()  # LMDB opens a file once in a process
        if os.path.lexists(self._directory):
            with Index.open(self._directory) as index:
                rescan(self._store, index, index.get_info(MODEL))

    def _open(self) -> None:
        self._reason = sound(self._directory, live=self._live)
        if self._store.read_only and self._reason == os.strerror(errno.EACCES):
            self._reason = None  # its owner's alone: there is no index for us
            return
        if self._reason is None:
            try:
                self._index = Index.open(self._directory, read_only=True)
                self.model = self._index.get_info(MODEL)
            except IndexDamaged as e:
                self._reason = e.detail
        if self._reason is not None:
            self._salvaged = {p: known for p, known in salvage(self._directory, "cubes") if known}

    def _mend(self) -> str:
        self.close()
        made = rebuild(self._store, self._directory)
        return f"the index is made again from the files: {made.cubes} cubes"


def _said(what: str, index: object, files: object) -> str:
    if what == "missing":
        return "the index does not know it"
    if what == "gone":
        return "the index knows it, and it is gone"
    return f"{what} is {index} in the index, {files} in the files"
