"""What the mount knows of its cubes: the index, kept in step with the files, and never in the way.

The index is checked, opened or rebuilt in a thread of its own while the mount already serves files.
Until it is there, and where it is damaged, everything is read from the files themselves, only
slower. ``facts`` compares the status of a cube's files at each call, so a change beside the mount
is seen before the watcher tells of it.

Any thread. A cube is looked at by whoever needs it; long work (a rebuild, the checksums of a large
KV cache) is done by the one housekeeping thread, a rescan for lost events by the watcher's.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

from memfs.cube import layout
from memfs.errors import IndexDamaged
from memfs.index.lmdb_index import Index
from memfs.index.records import Usage
from memfs.vault.facts import CubeFacts, inspect, judge
from memfs.vault.sig import Sig, sig_of
from memfs.vault.store import Store

if TYPE_CHECKING:
    from memfs.index.refresh import Change
    from memfs.vault.watch import Watcher

log = logging.getLogger(__name__)

T = TypeVar("T")
Model = Mapping[str, str] | None
OnChange = Callable[[str], None]

SMALL_KV = 32 << 20
"""Bytes of a KV cache that are checked at once, some ten milliseconds; a larger one later."""

_FRESH_SECONDS = 600.0
_TICK_NS = 20_000_000
"""The kernel's clock for file times may be behind by so much."""
_RECENT = 8192


class Catalogue:
    """The cubes of one store."""

    def __init__(self, store: Store, changed: OnChange) -> None:
        """``changed`` is told the path of a cube whose memories changed; it must not wait."""
        self.store = store
        self.reason = "it is being opened"
        """Why there is no index now; "" where there is one."""
        self._changed = changed
        self._index: Index | None = None
        self._model: Model = None
        self._recent: dict[str, CubeFacts] = {}
        self._fresh: dict[str, tuple[Sig, float]] = {}
        self._early: set[str] = set()  # touched before there was an index
        self._unchecked: set[str] = set()
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="index", daemon=True)
        self._stopping = False
        self._watcher: Watcher | None = None
        self._started = time.time()

    # Life

    def start(self) -> None:
        """Opens the index and watches the store, all in the background."""
        self._jobs.put(self._open)
        self._thread.start()

    def stop(self) -> None:
        """Writes the usage counters into the headers and closes the index."""
        from memfs.index.history import write_back_usage

        self._stopping = True
        if self._watcher is not None:
            self._watcher.stop()
        self._jobs.put(None)
        self._thread.join()
        index, self._index = self._index, None
        if index is None:
            return
        try:
            write_back_usage(self.store, index)
        except (OSError, IndexDamaged) as e:
            log.warning("the usage counters are not in the headers: %s", e)
        index.close()

    def rescan(self) -> None:
        """Looks at every cube again, in the background."""
        self._jobs.put(self._rescan)

    def rebuild(self) -> None:
        """Makes the index again from the files; returns once it is done, or raises why not."""
        done: Future[None] = Future()
        self._jobs.put(lambda: _finish(done, self._rebuild))
        done.result()

    # One cube

    def facts(self, path: str) -> CubeFacts | None:
        """What the files of the cube say now; None where there is no cube."""
        known = self._recent.get(path) or self._ask(lambda index: index.get(path), None)
        found = inspect(self.store, path, known, self._model, check_kv=self._is_small(path))
        if found is None:
            self._recent.pop(path, None)
        elif found == known:
            found = known
        else:
            self._remember(path, found)
        if found != known or (found is not None and _is_unread(found)):
            self._later(path)
        return found

    def touch(self, path: str, *, adopting: bool = False, header: bool = False) -> None:
        """Something in the cube was changed through the mount.

        Args:
            adopting: whether a cube without meta.json gets one: its text was just written.
            header: whether it is meta.json that was written.
        """
        from memfs.index.refresh import refresh

        index, now = self._index, time.time_ns()
        if index is None:
            self._touch_alone(path, adopting=adopting)
            return
        try:
            change = refresh(
                self.store,
                index,
                path,
                self._model,
                adopting=adopting,
                check_kv=self._is_small(path),
            )
        except IndexDamaged as e:
            self._damaged(e)
            self._touch_alone(path, adopting=adopting)
            return
        self._recent.pop(path, None)
        if change.after is not None:
            if not header:
                self._note_adoption(path, change.before, change.after, now)
            if _is_unread(change.after):
                self._later(path)
        if change.matters:
            self._changed(path)

    def moved(self, old: str, new: str) -> None:
        """A directory was renamed."""
        below = old + "/"
        for kept in (self._recent, self._fresh):
            for path in [p for p in list(kept) if p == old or p.startswith(below)]:
                kept.pop(path, None)
        self._ask(lambda index: index.remove_under(new), 0)
        if not self._ask(lambda index: index.move(old, new), 0):
            self._later_below(new)

    def look_below(self, path: str) -> None:
        """Looks at every cube at and below a directory again, in the background."""
        self._later_below(path)

    def is_fresh(self, path: str, sig: Sig) -> bool:
        """Whether the cube's meta.json is the one that memfs gave it lately, untouched since."""
        known = self._fresh.get(path)
        if known is None:
            return False
        if known[0] == sig and time.monotonic() - known[1] < _FRESH_SECONDS:
            return True
        self._fresh.pop(path, None)
        return False

    # Usage and audit trail

    def usage(self, cube_id: str | None) -> Usage | None:
        """How often a cube was used; None while there is no index."""
        if cube_id is None:
            return Usage()
        return self._ask(lambda index: index.usage(cube_id), None)

    def count(self, path: str, *, reads: int = 0, questions: int = 0) -> None:
        """A cube was read, or a question was answered from it."""
        facts = self.facts(path)
        cube_id = facts.id if facts is not None else None
        if cube_id is not None:
            self._ask(lambda index: index.count(cube_id, reads=reads, questions=questions), None)

    def log(self, event: dict[str, Any]) -> None:
        """Adds to the audit trail."""
        self._ask(lambda index: index.log(event), 0)

    def events(self) -> list[dict[str, Any]]:
        """The audit trail."""
        return self._ask(lambda index: list(index.events()), [])

    def cubes(self) -> int | None:
        """How many cubes there are; None while there is no index."""
        return self._ask(len, None)

    # The model

    @property
    def model(self) -> Model:
        """The model's part of the fingerprint, as last known."""
        return self._model

    def set_model(self, model: Mapping[str, str]) -> None:
        """A model is resident: every KV cache is judged by it."""
        if model == self._model:
            return
        self._model = dict(model)
        self._recent.clear()
        self._jobs.put(self._judge_all)

    # Inside

    def _ask(self, body: Callable[[Index], T], default: T) -> T:
        """What ``body`` answers from the index; ``default`` where there is none, or a bad one."""
        index = self._index
        if index is None:
            return default
        try:
            return body(index)
        except IndexDamaged as e:
            self._damaged(e)
        except OSError as e:
            log.warning("index: %s", e)
        return default

    def _damaged(self, reason: IndexDamaged) -> None:
        log.warning("%s; it is rebuilt", reason)
        pending, self.reason = self.reason, str(reason)
        if not pending:  # else every look until then would ask for one more
            self._jobs.put(self._rebuild)

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

    def _touch_alone(self, path: str, *, adopting: bool) -> None:
        """``touch`` without an index; the cube is looked at again once there is one."""
        from memfs.vault.identity import adopt

        self._early.add(path)
        now = time.time_ns()
        before = self._recent.get(path)
        after = inspect(self.store, path, before, self._model, check_kv=self._is_small(path))
        if adopting and after is not None and after.meta_sig is None:
            after = adopt(self.store, path, after, lambda _: None)
            self._note_adoption(path, before, after, now)
        self._recent.pop(path, None)
        self._changed(path)

    def _later(self, path: str) -> None:
        """Has the index brought up to date, KV cache and all, by the housekeeping thread."""
        if path not in self._unchecked:
            self._unchecked.add(path)
            self._jobs.put(lambda: self._check(path))

    def _later_below(self, path: str) -> None:
        self._jobs.put(lambda: self._check_below(path))

    # The housekeeping thread

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except IndexDamaged as e:
                self._damaged(e)
            except OSError as e:
                log.warning("index: %s", e)
            except Exception:
                log.exception("housekeeping failed")

    def _open(self) -> None:
        from memfs.index.rebuild import MODEL, open_or_empty
        from memfs.vault.watch import Watcher

        try:
            index, reason = open_or_empty(self.store)
        except OSError as e:
            self.reason = f"it cannot be opened: {e}"
            log.warning("index: %s", e)
            return
        if reason is not None:
            log.info("the index is made again: %s", reason)
        if self._model is None:
            self._model = index.get_info(MODEL)
        self._recent.clear()
        self._index, self.reason = index, ""
        early, self._early = self._early, set()
        for path in early:
            self._check(path)
        self._watcher = Watcher(self.store, self._changed_beside, self._anything_changed)
        self._watcher.start()  # which asks for a first rescan once it watches

    def _rescan(self) -> None:
        from memfs.index.refresh import rescan

        if self._index is not None:
            rescan(
                self.store,
                self._index,
                self._model,
                leftovers_before=self._started,
                on_change=self._on_change,
                stop=lambda: self._stopping,
                progress=_breathe,
            )
        self._recent.clear()

    def _rebuild(self) -> None:
        from memfs.index.rebuild import rebuild

        index = self._index
        if index is None:
            self._open()
            return
        rebuild(self.store, index.directory, self._model, _breathe, index=index)
        self._recent.clear()
        self.reason = ""

    def _changed_beside(self, paths: set[str]) -> None:
        """The watcher's: directories in which something changed. Its own thread waits for it."""
        from memfs.index.refresh import refresh_all

        index = self._index
        if index is None:
            return
        try:
            refresh_all(self.store, index, paths, self._model, self._on_change)
        except IndexDamaged as e:
            self._damaged(e)
        except OSError as e:
            log.warning("index: %s", e)

    def _anything_changed(self) -> None:
        """The watcher's: events were lost, or it has begun. Its own thread looks at everything."""
        try:
            self._rescan()
        except IndexDamaged as e:
            self._damaged(e)

    def _on_change(self, change: Change) -> None:
        self._recent.pop(change.path, None)
        self._changed(change.path)

    def _check(self, path: str) -> None:
        from memfs.index.refresh import refresh

        self._unchecked.discard(path)
        index = self._index
        if index is None:
            return
        change = refresh(self.store, index, path, self._model)
        self._recent.pop(path, None)
        if change.matters:
            self._changed(path)

    def _check_below(self, path: str) -> None:
        found = {cube for cube, names in self.store.walk(path) if cube and layout.is_cube(names)}
        if self._index is not None:
            found.update(cube for cube, _ in self._index.under(path))
        for cube in sorted(found):
            if not self._stopping:
                self._check(cube)

    def _judge_all(self) -> None:
        from memfs.index.rebuild import MODEL

        index, model = self._index, self._model
        if index is None or model is None:
            return
        index.set_info(MODEL, dict(model))
        for count, (path, facts) in enumerate(index.under("")):
            if judge(facts, model) != facts:
                self._check(path)
            _breathe(count)
            if self._stopping:
                return


def _finish(done: Future[None], job: Callable[[], None]) -> None:
    """Runs a job that another thread waits for."""
    try:
        job()
    except Exception as e:  # noqa: BLE001  it is raised where it is waited for
        done.set_exception(e)
    else:
        done.set_result(None)


def _breathe(_count: int) -> None:
    """Lets the threads that serve files go first: long work of another one pauses now and then."""
    time.sleep(0.0001)


def _is_unread(facts: CubeFacts) -> bool:
    """Whether there is a KV cache whose bytes were not looked at."""
    return facts.kv_state == "unchecked" and facts.kv_model is None
