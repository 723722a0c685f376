"""The index of a mount, opened, watched, mended and closed behind the file operations.

The index is checked, opened or made again in a thread of its own while the mount already serves
files; where it is damaged it is rebuilt in place. One housekeeping thread does that, and whatever
takes long: a rebuild, the checksums of a large KV cache. The watcher's thread takes in what is
changed beside the mount. Used by the catalogue; ``ask`` and ``later`` from any thread.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import TYPE_CHECKING, TypeVar

from memfs.cube import layout
from memfs.errors import IndexDamaged
from memfs.index.lmdb_index import Index
from memfs.vault.facts import judge
from memfs.vault.store import Store

if TYPE_CHECKING:
    from memfs.index.refresh import Change
    from memfs.vault.watch import Watcher

log = logging.getLogger(__name__)

RETRY_SECONDS = 5.0
"""When what could not be taken in is tried again: on a full disk, after so long."""

T = TypeVar("T")
Model = Mapping[str, str] | None


class IndexKeeper:
    """Holds the index of one store, from soon after ``start`` until ``stop``."""

    def __init__(
        self,
        store: Store,
        *,
        tell: Callable[[Change], None],
        on_change: Callable[[Change], None],
        on_scan: Callable[[], None],
        must_wait: Callable[[str], bool],
    ) -> None:
        """Nothing happens yet.

        Args:
            tell: is told of every change that no operation told of, before the index; may not wait.
            on_change: the same after it, and of files written that say what they said.
            on_scan: called where every cube was looked at, so that the index knows them all.
            must_wait: whether a file below a path is open for writing. Until it is closed, the
                index keeps what it knows: what is halfway is nobody's change.
        """
        self.store = store
        self.index: Index | None = None
        self.reason = "it is being opened"
        """Why there is no index now, or it is not to be trusted; "" where all is well."""
        self.model: Model = None
        """The model's part of the fingerprint, as last known."""
        self._tell = tell
        self._on_change = on_change
        self._on_scan = on_scan
        self._must_wait = must_wait
        self._put_off: set[str] = set()
        self._early: set[str] = set()
        self._pending: set[str] = set()
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="index", daemon=True)
        self._watcher: Watcher | None = None
        self._stopping = False
        self._retry_at: float | None = None  # where the disk had no room, or failed
        self._started = time.time()

    def start(self) -> None:
        """Opens the index and watches the store, all in the background."""
        self._jobs.put(self._open)
        self._thread.start()

    def stop(self) -> None:
        """Writes the usage counters into the headers and closes the index."""
        from memfs.index.history import write_back_usage

        self._stopping = True
        self._jobs.put(None)
        self._thread.join()  # first: it may be about to start the watcher
        if self._watcher is not None:
            self._watcher.stop()
        index, self.index = self.index, None
        if index is None:
            return
        try:
            write_back_usage(self.store, index)
        except (OSError, IndexDamaged) as e:
            log.warning("the usage counters are not in the headers: %s", e)
        index.close()

    def ask(self, body: Callable[[Index], T], default: T) -> T:
        """What ``body`` answers from the index; ``default`` where there is none, or a bad one."""
        index = self.index
        if index is None:
            return default
        try:
            return body(index)
        except IndexDamaged as e:
            self._damaged(e)
        except OSError as e:
            log.warning("index: %s", e)
        return default

    def set_model(self, model: Mapping[str, str]) -> None:
        """A model is resident: every KV cache is judged by it."""
        self.model = dict(model)
        self._jobs.put(self._judge_all)

    def soon(self, body: Callable[[Index], None]) -> None:
        """Has ``body`` run on the index in the background, once that is there."""
        self._jobs.put(lambda: self.ask(body, None))

    def early(self, path: str) -> None:
        """A cube was changed while there was no index: it is looked at once there is one."""
        self._early.add(path)

    def later(self, path: str) -> None:
        """Has the index brought up to date with one cube, its KV cache read whatever its size."""
        if path not in self._pending:
            self._pending.add(path)
            self._jobs.put(lambda: self._refresh(path))

    def closed(self) -> None:
        """A file that was open for writing is closed: what waited for that is looked at."""
        for path in [p for p in list(self._put_off) if not self._must_wait(p)]:
            self._put_off.discard(path)
            self.later(path)

    def later_below(self, path: str) -> None:
        """``later`` for every cube at and below a directory."""
        self._jobs.put(lambda: self._refresh_below(path))

    def rescan(self) -> None:
        """Looks at every cube again, in the background."""
        self._jobs.put(self._rescan)

    def rebuild(self) -> None:
        """Makes the index again from the files; returns once it is done, or raises why not."""
        done: Future[None] = Future()
        self._jobs.put(lambda: _finish(done, self._rebuild))
        done.result()

    def _damaged(self, reason: IndexDamaged) -> None:
        log.warning("%s; it is rebuilt", reason)
        pending, self.reason = self.reason, str(reason)
        if not pending:  # else every look until then would ask for one more
            self._jobs.put(self._rebuild)

    # The housekeeping thread

    def _work(self) -> None:
        while (job := self._next()) is not None:
            try:
                job()
            except IndexDamaged as e:
                self._damaged(e)
            except OSError as e:
                log.warning("index: %s", e)
                self._retry_at = time.monotonic() + RETRY_SECONDS
            except Exception:
                log.exception("housekeeping failed")

    def _next(self) -> Callable[[], None] | None:
        """The next job; to catch up with the files, where that is due and nothing else is."""
        due = self._retry_at
        try:
            return self._jobs.get(timeout=None if due is None else max(0, due - time.monotonic()))
        except queue.Empty:
            self._retry_at = None
            return self._catch_up

    def _catch_up(self) -> None:
        """What failed is done again: all of it, since what it was is not known any more."""
        if self.index is None:
            self._open()
        elif self.reason:
            self._rebuild()
        else:
            self._rescan()

    def _open(self) -> None:
        from memfs.index.rebuild import MODEL, open_or_empty
        from memfs.vault.watch import Watcher

        try:
            index, reason = open_or_empty(self.store)
        except OSError as e:
            self.reason = f"it cannot be opened: {e}"
            raise
        if reason is not None:
            log.info("the index is made again: %s", reason)
        if self.model is None:
            self.model = index.get_info(MODEL)
        self.index, self.reason = index, ""
        early, self._early = self._early, set()
        for path in early:
            self._refresh(path)
        self._watcher = Watcher(self.store, self._changed_beside, self._anything_changed)
        self._watcher.start()  # which asks for a first rescan once it watches

    def _rescan(self) -> None:
        from memfs.index.refresh import rescan

        if self.index is not None:
            scan = rescan(
                self.store,
                self.index,
                self.model,
                leftovers_before=self._started,
                on_change=self._on_change,
                tell=self._tell,
                is_busy=self._is_busy,
                stop=lambda: self._stopping,
                progress=_breathe,
            )
            if scan.complete:
                self._on_scan()

    def _rebuild(self) -> None:
        from memfs.index.rebuild import rebuild

        index = self.index
        if index is None:
            self._open()
            return
        rebuild(self.store, index.directory, self.model, _breathe, index=index)
        self.reason = ""

    def _refresh(self, path: str) -> None:
        from memfs.index.refresh import refresh

        self._pending.discard(path)
        if self.index is not None and not self._is_busy(path):
            change = refresh(self.store, self.index, path, self.model, tell=self._tell)
            if change.wrote:
                self._on_change(change)

    def _refresh_below(self, path: str) -> None:
        found = {cube for cube, names in self.store.walk(path) if cube and layout.is_cube(names)}
        if self.index is not None:
            found.update(cube for cube, _ in self.index.under(path))
        for cube in sorted(found):
            if not self._stopping:
                self._refresh(cube)

    def _is_busy(self, path: str) -> bool:
        """Whether a look has to wait for a close; it is then made."""
        if not self._must_wait(path):
            return False
        self._put_off.add(path)
        self.closed()  # if it was just now, nobody else says so
        return True

    def _judge_all(self) -> None:
        from memfs.index.rebuild import MODEL

        index, model = self.index, self.model
        if index is None or model is None:
            return
        index.set_info(MODEL, dict(model))
        for count, (path, facts) in enumerate(index.under("")):
            if judge(facts, model) != facts:
                self._refresh(path)
            _breathe(count)
            if self._stopping:
                return

    # The watcher's thread

    def _changed_beside(self, paths: set[str]) -> None:
        """In these directories something was changed."""
        from memfs.index.refresh import refresh_all

        if self.index is None:
            return
        try:
            idle = [path for path in paths if not self._is_busy(path)]
            refresh_all(self.store, self.index, idle, self.model, self._on_change, self._tell)
        except IndexDamaged as e:
            self._damaged(e)
        except OSError:
            self.rescan()  # which is tried until it succeeds
            raise

    def _anything_changed(self) -> None:
        """Events were lost, or watching has begun."""
        try:
            self._rescan()
        except IndexDamaged as e:
            self._damaged(e)


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
