"""When versions are made: at once where a change is finished, and later where it may not be yet.

A closed text has its version when the ``close`` returns, so it survives the mount's being killed
just after. Three things wait for the historian's own thread. A cube that has just lost a file, or
the words of its text, may be halfway through ``rm -r``, an editor's save or a shell's ``>``: it is
looked at again ``SETTLE_S`` later. A large adapter is copied, and its digest made, behind. And the
policy is applied (``upkeep``). A version that cannot be made fails nobody's write: it is tried
again.

What the thread still has to do when the process is killed is found at the next mount: a mark on
the disk says that everything has to be compared then. ``changed`` and ``moved`` from any thread.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import threading
import time
from collections.abc import Hashable, Mapping
from typing import NamedTuple

from memfs.cube import layout, metadata
from memfs.errors import MemfsError, NotAllowed, VersionDamaged
from memfs.filesystem import syscalls
from memfs.filesystem.keeper import IndexKeeper
from memfs.filesystem.past.later import Job, Later
from memfs.filesystem.past.upkeep import Upkeep
from memfs.vault.facts import CubeFacts
from memfs.vault.identity import read_meta
from memfs.vault.sig import Sig
from memfs.vault.store import Store
from memfs.vault.versions import making, records
from memfs.vault.versions.files import Unfinished
from memfs.vault.versions.look import Present, look, parents_of
from memfs.vault.versions.records import Entry, Parent, Version

log = logging.getLogger(__name__)

SETTLE_S = 2.0
"""How long after its last loss a cube is looked at again."""
RETRY_S = 30.0
FLUSH_S = 5.0
"""After so long a version is flushed to the disk for good."""
LAST_FLUSH_S = 4.0
"""How long the end of a mount waits for that. Where it takes longer, the mark stays."""

_KNOWN = 2048
_LOCKS = 64


class Settle(NamedTuple):
    """The key of a job that looks at a cube again."""

    path: str
    cube_id: str


class Copy(NamedTuple):
    """The key of one that copies what is large: a version's, or of a cube that has none yet."""

    cube_id: str
    stamp: str = ""


class Historian:
    """Keeps the versions of one store's cubes."""

    def __init__(self, store: Store, keeper: IndexKeeper, budget: int) -> None:
        """``budget`` is what all versions together may take, in bytes; with 0 none are made."""
        self.store = store
        self.budget = budget
        self.keeper = keeper
        self.later = Later("versions")
        self.enabled = store.writable and budget > 0
        self.made = 0
        """How many versions were made or removed: what is remembered of them may be out of date."""
        self.started = time.time()
        self.flushed: float | None = None
        """Where the last mount was killed, and everything has to be compared: until when what it
        made is known to be on the disk, seconds since 1970.
        """
        self.broken_off = False
        """Whether the mount's end came before something was done."""
        self._newest: dict[str, Version | None] = {}
        self._looked_at: dict[str, tuple[Sig | None, ...]] = {}
        self._last: dict[str, making.Last] = {}
        """The rights of the cubes whose text has gone, by their ids, until that is settled."""
        self._directories: dict[str, tuple[str, int]] = {}
        """Path and inode of the cubes that were looked at, by their ids."""
        self._locks = [threading.RLock() for _ in range(_LOCKS)]
        self._written = 0  # bytes, since the budget was last looked at
        self._ended = False
        self._flushing: threading.Thread | None = None
        self._upkeep = Upkeep(self)

    def start(self) -> None:
        """Begins in the background."""
        if not self.enabled:
            return
        try:
            self.flushed = making.mark(self.store)
        except OSError as e:
            self.enabled = False
            log.warning("no versions are made: %s", e)
            return
        self._upkeep.start()
        self.later.start()

    def stop(self) -> None:
        """Does what is due soon; what cannot be done now is left to the next mount."""
        self.later.stop()
        if not self.enabled:
            return
        undone = False
        for key, _ in self.later.left():
            if isinstance(key, Settle):  # as nothing is written any more
                undone |= not self.settle(*key)
        self._ended = True
        for key, due in self.later.left():
            undone |= isinstance(key, Copy) or (due and not isinstance(key, Settle))
        if self._is_flushing():
            undone = True  # that began before the last version was made
        else:
            self._flush()
            deadline = time.monotonic() + LAST_FLUSH_S
            while self._is_flushing() and time.monotonic() < deadline:
                time.sleep(0.01)
            undone |= self._is_flushing()
        if not undone and not self.broken_off:
            with contextlib.suppress(OSError):
                making.unmark(self.store)

    def newest(self, cube_id: str) -> Version | None:
        """A cube's last version; None where there is none, or none that may be read."""
        if cube_id in self._newest:
            return self._newest[cube_id]
        try:
            found = records.newest(self.store, cube_id)
        except OSError as e:
            log.info("versions of %s: %s", cube_id, e)
            return None
        self._remember(cube_id, found)
        return found

    # What others tell

    def changed(
        self, path: str, before: CubeFacts | None, after: CubeFacts | None, *, watched: bool
    ) -> None:
        """A cube was changed, or may have been: it has its version once this returns.

        Args:
            before: what was known of it; None for nothing.
            after: what is now; None where there is no cube.
            watched: whether an operation did it, and ``before`` is what there was until then.
        """
        if not self.enabled:
            return
        old = before.id if before else None
        if watched and before is not None and (after is None or after.payload_sig is None):
            self._note_last(path, before)
        if after is None:
            self._looked_at.pop(path, None)
            if old is not None:
                self._settle_later(path, old)
            return
        sigs = (after.payload_sig, after.meta_sig, after.adapter_sig, after.adapter_config_sig)
        if after.id is None or self._looked_at.get(path) == sigs:
            return
        if not self.record(path, after.id, hasty=True):
            return
        if all(sig is None or sig != sig.unsettled() for sig in sigs):
            if len(self._looked_at) >= _KNOWN:
                self._looked_at.clear()
            self._looked_at[path] = sigs
        if old is not None and old != after.id:
            self._take_over(old, after.id, path)

    def moved(self, path: str) -> None:
        """A directory is at ``path`` now, with whatever cubes there are in it."""
        if self.enabled:
            self._after(0, lambda: self._upkeep.moved(path))

    def compare_all(self) -> None:
        """The index knows every cube: those that have no version yet get one, the dead an end."""
        if self.enabled:
            self._after(0, self._upkeep.compare_all, "compare")

    # Making one

    def record(self, path: str, cube_id: str, *, hasty: bool, patient: bool = False) -> bool:
        """Makes the version of a cube where it is another thing than before; whether that is done.

        Args:
            hasty: whether to wait and see where the cube has just lost something.
            patient: whether a large file may be copied here.
        """
        try:
            with self.lock(cube_id):
                previous = self.newest(cube_id)
                present = look(self.store, path, previous)
                if present is None or (hasty and _has_lost(previous, present)):
                    self._settle_later(path, cube_id)
                    return False
                version = making.make(
                    self.store, cube_id, present, previous, budget=self.budget, patient=patient
                )
                if version is not None:
                    self._note(version, previous)
                self._last.pop(cube_id, None)
                if len(self._directories) >= _KNOWN:
                    self._directories.clear()
                self._directories[cube_id] = path, present.inode
        except Unfinished:
            self._after(0, lambda: self._record_patiently(path, cube_id), Copy(cube_id))
        except FileNotFoundError:
            self._settle_later(path, cube_id)  # it is being changed right now
        except OSError as e:
            log.warning("%s has no version of what it holds now: %s", path, e)
            self._make_room(e)
            self._settle_later(path, cube_id, RETRY_S)
        else:
            return True
        return False

    def lock(self, cube_id: str) -> threading.RLock:
        """Held while the versions of a cube are added to or taken from."""
        return self._locks[hash(cube_id) % _LOCKS]

    def settle(self, path: str, cube_id: str) -> bool:
        """Looks at a cube that had lost something, or could not be looked at; whether it did."""
        found = self.keeper.ask(lambda index: index.by_id(cube_id), None)
        if found is not None or self._is_at(path, cube_id):
            return self.record(found[0] if found else path, cube_id, hasty=False)
        if self.keeper.reason:  # without an index nobody knows that it is gone
            self._settle_later(path, cube_id, RETRY_S)
            return False
        with self.lock(cube_id):
            newest = self.newest(cube_id)
            if newest is not None and not newest.deleted:
                self._note(making.bury(self.store, newest, self._last.get(cube_id)), newest)
            self._last.pop(cube_id, None)
        return True

    def complete(self, cube_id: str, stamp: str) -> None:
        """Has a version's large files copied and read; where that fails, again later."""
        try:
            whole = making.complete(self.store, cube_id, stamp)
        except (FileNotFoundError, VersionDamaged) as e:
            log.info("the version %s of %s is gone, or damaged: %s", stamp, cube_id, e)
            return
        except (OSError, NotAllowed) as e:
            log.warning("the version %s of %s is not a copy yet: %s", stamp, cube_id, e)
            self._make_room(e)
            self._complete_later(cube_id, stamp, RETRY_S)
            return
        with self.lock(cube_id):
            newest = self._newest.get(cube_id)
            if newest is not None and newest.stamp == stamp:
                self._newest[cube_id] = whole

    def remove(self, cube_id: str, stamp: str) -> None:
        """Removes a version, which the policy keeps no longer."""
        with self.lock(cube_id):
            making.remove(self.store, cube_id, stamp)
            self.forget(cube_id)

    def forget(self, cube_id: str) -> None:
        """A cube's versions are others than this knows of."""
        self._newest.pop(cube_id, None)
        self.made += 1

    def _record_patiently(self, path: str, cube_id: str) -> None:
        self.record(path, cube_id, hasty=False, patient=True)

    def _note(self, version: Version, previous: Version | None) -> None:
        """A version was made."""
        self._remember(version.cube_id, version)
        self.made += 1
        known = previous.files if previous else {}
        self._written += sum(
            entry.size
            for name, entry in version.files.items()
            if entry.kept and (name not in known or known[name].content != entry.content)
        )
        if self._written > min(self.budget, self._upkeep.room()) // 20:
            self._prune_now()
        self._after(FLUSH_S, self._flush, "flush")
        if making.is_wanting(version):
            self._complete_later(version.cube_id, version.stamp, 0)

    def _make_room(self, error: Exception) -> None:
        """Where the disk is full: other versions may go before it is tried again."""
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            self._prune_now()

    def _prune_now(self) -> None:
        self._written = 0
        self._after(0, self._upkeep.prune, "over budget")

    def _remember(self, cube_id: str, version: Version | None) -> None:
        if len(self._newest) >= _KNOWN:
            self._newest.clear()
        self._newest[cube_id] = version

    def _note_last(self, path: str, before: CubeFacts) -> None:
        """A text has gone: its rights are remembered, which may be less than in any version."""
        newest = self.newest(before.id) if before.id and before.payload_sig else None
        if newest is None:
            return
        parents = newest.parents
        if path == newest.path:  # else it has just moved, and that version is still to be made
            with contextlib.suppress(OSError):
                parents = parents_of(self.store, path)
        if len(self._last) >= _KNOWN:
            self._last.clear()
        text = Parent(before.uid, before.gid, before.mode & 0o7777, before.acl)
        self._last[newest.cube_id] = making.Last(text, parents)

    def _take_over(self, old: str, new: str, path: str) -> None:
        """The cube at ``path`` has another id than before; or it is another cube."""
        known, now = self._directories.get(old), self._directories.get(new)
        if known is None or known != now:
            return  # another directory stands there now
        if self.keeper.ask(lambda index: index.by_id(old), None) is not None:
            return  # it was a copy, which has got an id of its own
        first, second = sorted((old, new), key=lambda cube_id: hash(cube_id) % _LOCKS)
        with self.lock(first), self.lock(second):
            found = self.newest(old)
            if found is None or found.deleted:
                return
            try:
                making.take_over(self.store, old, new)
            except OSError as e:
                log.warning("%s: its versions are still under the id %s: %s", path, old, e)
            self.forget(old)
            self.forget(new)

    def _flush(self) -> None:
        """Has the disk flushed, in a thread of its own: where others write much, it takes long."""
        if self._is_flushing():
            self._after(FLUSH_S, self._flush, "flush")
            return
        self._flushing = threading.Thread(target=self._sync, name="flush", daemon=True)
        self._flushing.start()

    def _is_flushing(self) -> bool:
        return self._flushing is not None and self._flushing.is_alive()

    def _sync(self) -> None:
        began = time.time()
        try:
            syscalls.syncfs(self.store.fd)
            making.mark_flushed(self.store, began)
        except OSError as e:
            log.warning("versions may not be on the disk: %s", e)

    def _settle_later(self, path: str, cube_id: str, seconds: float = SETTLE_S) -> None:
        key = Settle(path, cube_id)
        self._after(seconds, lambda: self.settle(path, cube_id), key, put_off=True)

    def _complete_later(self, cube_id: str, stamp: str, seconds: float) -> None:
        self._after(seconds, lambda: self.complete(cube_id, stamp), Copy(cube_id, stamp))

    def _after(
        self, seconds: float, job: Job, key: Hashable = None, *, put_off: bool = False
    ) -> None:
        if self._ended:
            with contextlib.suppress(OSError):
                making.mark(self.store)  # for the next mount
        else:
            self.later.after(seconds, job, key, put_off=put_off)

    def _is_at(self, path: str, cube_id: str) -> bool:
        try:
            return metadata.cube_id(read_meta(self.store, path)) == cube_id
        except (OSError, MemfsError):
            return False


def _has_lost(previous: Version | None, present: Present) -> bool:
    """Whether files, or all the words of a text, are missing that were there before."""
    if previous is None or previous.deleted:
        had = previous is None or previous.chain[-1].payload_sha256 is not None
        return had and not _size(present.files, layout.PAYLOAD)
    return any(entry.size and not _size(present.files, n) for n, entry in previous.files.items())


def _size(files: Mapping[str, Entry], name: str) -> int:
    return files[name].size if name in files else 0
