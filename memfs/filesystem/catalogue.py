"""What the mount knows of its cubes: the index kept in step with the files, and never in the way.

While there is no index, and where it is damaged, everything is read from the files themselves, only
slower. ``facts`` compares the status of a cube's files at each call, so a change beside the mount
is seen before the watcher tells of it. Any thread.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from memfs.config import Config
from memfs.cube import layout
from memfs.errors import IndexDamaged
from memfs.filesystem import audit
from memfs.filesystem.context import Context
from memfs.filesystem.handles.table import HandleTable
from memfs.filesystem.journal import Journal
from memfs.filesystem.keeper import IndexKeeper, Model
from memfs.filesystem.past.historian import Historian
from memfs.index.records import Usage
from memfs.vault.facts import CubeFacts, inspect
from memfs.vault.frozen import Frozen
from memfs.vault.sig import Sig, sig_of
from memfs.vault.store import Store

if TYPE_CHECKING:
    from memfs.index.lmdb_index import Index
    from memfs.index.refresh import Change

log = logging.getLogger(__name__)

SMALL_KV = 32 << 20
"""Bytes of a KV cache that are checked at once, some ten milliseconds; a larger one later."""

_RECENT = 8192
_FRESH_SECONDS = 600.0
_TICK_NS = 20_000_000
"""The kernel's clock for file times may be behind by so much."""


class Catalogue:
    """The cubes of one store."""

    def __init__(
        self,
        store: Store,
        changed: Callable[[str], None],
        versions_budget: int = Config.versions_budget_bytes,
    ) -> None:
        """Nothing happens yet.

        Args:
            changed: is told the path of a cube whose memories changed; it must not wait.
            versions_budget: see ``Historian``.
        """
        self.store = store
        self.journal = Journal(store)
        self.handles = HandleTable()
        """The open files of the mount: they tell who is writing, and hear of a cube that froze."""
        self.keeper = IndexKeeper(
            store,
            tell=self._on_found,
            on_change=self._on_change,
            on_scan=self._on_scan,
            must_wait=self._must_wait,
        )
        self.frozen = Frozen(store, self._was_frozen)
        self.history = Historian(store, self.keeper, versions_budget)
        self._changed = changed
        self._recent: dict[str, CubeFacts] = {}
        self._fresh: dict[str, tuple[Sig, float]] = {}
        """The headers that memfs gave to new cubes, as they then were, and when that was."""

    def start(self) -> None:
        """Opens the audit trail, and behind it the index and the versions. After the fork."""
        self.journal.start()
        self.keeper.start()
        self.history.start()

    def stop(self) -> None:
        """Closes them all."""
        self.history.stop()  # it asks the index
        self.keeper.stop()
        self.journal.stop()

    # One cube

    def facts(self, path: str) -> CubeFacts | None:
        """What the files of the cube say now; None where there is no cube."""
        known = self._recent.get(path) or self.keeper.ask(lambda index: index.get(path), None)
        found = inspect(self.store, path, known, self.model, check_kv=self._is_small(path))
        if found is None:
            self._recent.pop(path, None)
        elif found == known:
            found = known
        if found is not None:
            self._remember(path, found)
        if found != known or (found is not None and _is_unread(found)):
            self.keeper.later(path)
        return found

    def touch(
        self,
        path: str,
        *,
        adopting: bool = False,
        header: bool = False,
        by: Context | None = None,
    ) -> None:
        """Something in the cube was changed through the mount.

        Args:
            adopting: whether a cube without meta.json gets one: its text was just written.
            header: whether it is meta.json that was written.
            by: who changed it, for the audit trail.
        """
        now = time.time_ns()
        before, after, matters = self._refreshed(path, adopting=adopting, by=by)
        self._recent.pop(path, None)
        if after is not None:
            if not header:
                self._note_adoption(path, before, after, now)
            if _is_unread(after):
                self.keeper.later(path)
        self.history.changed(path, before, after, watched=True)
        if matters:
            self._changed(path)

    def moved(self, old: str, new: str, by: Context | None = None) -> None:
        """A directory was renamed, by whom."""
        below = old + "/"
        for kept in (self._recent, self._fresh):
            for path in [p for p in list(kept) if p == old or p.startswith(below)]:
                kept.pop(path, None)
        self.keeper.ask(lambda index: index.remove_under(new), 0)
        cubes = self.keeper.ask(lambda index: index.move(old, new), 0)
        if cubes:
            event = {"event": "renamed", "path": new, "from": old, "cubes": cubes}
            self.journal.log(event | audit.actor(by))
        else:
            self.keeper.later_below(new)
        self.history.moved(new)

    def is_fresh(self, path: str, sig: Sig) -> bool:
        """Whether the cube's meta.json is the one that memfs gave it lately, not written since."""
        known = self._fresh.get(path)
        if known is None:
            return False
        if known[0][:3] == sig[:3] and time.monotonic() - known[1] < _FRESH_SECONDS:
            return True
        self._fresh.pop(path, None)
        return False

    # The model

    @property
    def model(self) -> Model:
        """The model's part of the fingerprint, as last known."""
        return self.keeper.model

    def set_model(self, model: Mapping[str, str]) -> None:
        """A model is resident: every KV cache is judged by it."""
        if model != self.model:
            self.keeper.set_model(model)
            self._recent.clear()

    # Usage

    def usage(self, cube_id: str | None) -> Usage | None:
        """How often a cube was used; None while there is no index."""
        if cube_id is None:
            return Usage()
        return self.keeper.ask(lambda index: index.usage(cube_id), None)

    def count(self, path: str, *, reads: int = 0, questions: int = 0) -> None:
        """A cube was read, or a question was answered from it."""
        if self.keeper.ask(lambda index: index.get(path) is None, False):
            self.touch(path)  # the index takes in the counters that it came with, before it counts
        facts = self.facts(path)
        cube_id = facts.id if facts is not None else None
        if cube_id is not None:
            self.keeper.ask(
                lambda index: index.count(cube_id, reads=reads, questions=questions), None
            )

    def cubes(self) -> int | None:
        """How many cubes there are; None while there is no index."""
        return self.keeper.ask(len, None)

    # Inside

    def _refreshed(
        self, path: str, *, adopting: bool, by: Context | None
    ) -> tuple[CubeFacts | None, CubeFacts | None, bool]:
        """What was known of a cube, what is now, and whether that is another thing.

        An index that fails does not fail the operation: the files were changed all the same.
        """
        from memfs.index.refresh import refresh

        index, small, told = self.keeper.index, self._is_small(path), False

        def tell(change: Change) -> None:
            nonlocal told
            told = True
            self.journal.changed(change, by)

        if index is not None:
            try:
                change = refresh(
                    self.store,
                    index,
                    path,
                    self.model,
                    adopting=adopting,
                    check_kv=small,
                    tell=tell,
                )
            except (IndexDamaged, OSError) as e:
                log.warning("%s is not in the index: %s", path, e)
                self.keeper.later(path)
            else:
                self._freeze(change)
                return change.before, change.after, change.matters
        before, after = self._looked_at_alone(path, adopting=adopting, check_kv=small)
        if not told:
            self.journal.changed_early(path, after, by)
        return before, after, True

    def _looked_at_alone(
        self, path: str, *, adopting: bool, check_kv: bool
    ) -> tuple[CubeFacts | None, CubeFacts | None]:
        """What was known of a cube and what is now, without an index, which is told once it can."""
        from memfs.vault.identity import adopt

        self.keeper.early(path)
        before = self._recent.get(path)
        after = inspect(self.store, path, before, self.model, check_kv=check_kv)
        if adopting and after is not None and after.meta_sig is None:
            after = adopt(self.store, path, after, lambda _: None)
        return before, after

    def _freeze(self, change: Change) -> None:
        """Has open files take no writes in a cube that was frozen, and again in one that thawed."""
        before, after = change.before, change.after
        if after is not None and after.frozen != (before is not None and before.frozen):
            self.handles.freeze(change.path, self._is_frozen)

    def _is_frozen(self, path: str) -> bool:
        return self.frozen.over(path) is not None

    def _was_frozen(self, cube: str) -> bool:
        known = self.keeper.ask(lambda index: index.get(cube), None)
        return known is not None and known.frozen

    def _must_wait(self, path: str) -> bool:
        """Whether a file below a path is being written: it is taken in once that is closed.

        What was frozen meanwhile does not wait.
        """
        if not self.handles.is_written(path):
            return False
        self.handles.freeze(path, self._is_frozen)
        return True

    def _on_found(self, change: Change) -> None:
        """A change is about to be taken in that no operation told of."""
        self.journal.found(change, may_be_new=self.keeper.ask(_is_complete, False))

    def _on_change(self, change: Change) -> None:
        """A change was taken in that no operation told of."""
        path = change.path
        self._recent.pop(path, None)
        self.history.changed(path, change.before, change.after, watched=False)
        if not change.matters:
            return
        self._freeze(change)
        self._changed(path)

    def _on_scan(self) -> None:
        self.history.compare_all()

    def _is_small(self, path: str) -> bool:
        """Whether the cube's KV cache, where there is one, may be checked while somebody waits."""
        try:
            return self.store.stat(layout.join(path, layout.KV)).st_size <= SMALL_KV
        except OSError:
            return True

    def _remember(self, path: str, facts: CubeFacts) -> None:
        if len(self._recent) >= _RECENT:
            self._recent.clear()
        self._recent[path] = facts

    def _note_adoption(
        self, path: str, before: CubeFacts | None, after: CubeFacts, since_ns: int
    ) -> None:
        """Remembers a meta.json that was made within the running operation, and for it."""
        if after.meta_sig is None or (before is not None and before.meta_sig is not None):
            return
        try:
            found = self.store.stat(layout.join(path, layout.META))
        except FileNotFoundError:
            return
        if found.st_mtime_ns > since_ns - _TICK_NS:
            self._fresh[path] = (sig_of(found), time.monotonic())


def _is_complete(index: Index) -> bool:
    """Whether the index knew every cube once: one that is new to it is then new."""
    from memfs.index.refresh import COMPLETE

    return bool(index.get_info(COMPLETE))


def _is_unread(facts: CubeFacts) -> bool:
    """Whether there is a KV cache whose bytes were not looked at."""
    return facts.kv_state == "unchecked" and facts.kv_model is None
