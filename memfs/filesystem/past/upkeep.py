"""What is done with versions now and then: the policy, and what a mount finds when it begins.

Used by the historian, in its thread.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from memfs.errors import MemfsError
from memfs.index.cubes import Found
from memfs.operation import retention
from memfs.vault.aside import Aside
from memfs.vault.versions import making, records
from memfs.vault.versions.check import damage_of
from memfs.vault.versions.files import clear

if TYPE_CHECKING:
    from memfs.filesystem.past.historian import Historian

log = logging.getLogger(__name__)

PRUNE_AFTER_S, PRUNE_EVERY_S = 120.0, 3600.0


class Upkeep:
    """The housekeeping of one store's versions."""

    def __init__(self, historian: Historian) -> None:
        self._historian = historian
        self._store = historian.store
        self._keeper = historian.keeper
        self._compared = False

    def start(self) -> None:
        """Has it done when there is time."""
        if self._historian.flushed is not None:
            self._historian.later.after(0, self._clear_up)
        self._historian.later.after(PRUNE_AFTER_S, self.prune, "prune")

    def moved(self, path: str) -> None:
        """A directory is at ``path`` now: its cubes have moved."""
        for cube, facts in self._cubes(path):
            if facts.id is not None:
                self._historian.record(cube, facts.id, hasty=True)
            self._breathe()

    def compare_all(self) -> None:
        """Gives versions to cubes that have none, and an end to those that are gone.

        Once a mount. After a kill every cube is compared with its newest version, and that with its
        digests where it may not have been on the disk when the machine stopped.
        """
        if self._compared:
            return
        self._compared = True
        known, flushed = set(records.cube_ids(self._store)), self._historian.flushed
        for path, facts in self._cubes(""):
            if facts.id is not None:
                if flushed is not None and facts.id in known:
                    self._set_torn_aside(facts.id, flushed)
                if flushed is not None or facts.id not in known:
                    self._historian.record(path, facts.id, hasty=True)
                known.discard(facts.id)
            self._breathe()
        for cube_id in known:
            newest = self._historian.newest(cube_id)
            # A cube made a moment ago may not be in the index yet, and stands where it stood.
            self._historian.settle(newest.path if newest else "", cube_id)
            self._breathe()

    def _set_torn_aside(self, cube_id: str, flushed: float) -> None:
        """Takes the newest versions out of the way as far as they are damaged, and that young."""
        youngest = records.stamp_of(datetime.fromtimestamp(flushed, UTC))
        for stamp in reversed(records.stamps(self._store, cube_id)):
            if stamp < youngest:
                return
            damage = damage_of(self._store, cube_id, stamp)
            if damage is not None:
                place = Aside(self._store).put(records.directory(cube_id, stamp))
                log.warning("the version %s of %s %s; it is in %s", stamp, cube_id, damage, place)
                self._historian.forget(cube_id)

    def prune(self) -> None:
        """Removes what the policy keeps no longer, and what there is no room for."""
        self._historian.later.after(PRUNE_EVERY_S, self.prune, "prune")
        if self._keeper.reason:
            return  # without an index nobody knows which cubes live
        now, held = datetime.now(UTC), []
        for cube_id in records.cube_ids(self._store):
            with self._historian.lock(cube_id):
                held += self._pruned(cube_id, now)
            self._breathe()
        for version in retention.over_budget(held, self._historian.budget, self.room()):
            self._historian.remove(version.cube_id, version.stamp)
            self._breathe()

    def room(self) -> int:
        """By how many bytes versions may grow before the disk is too full."""
        found = os.fstatvfs(self._store.fd)
        return retention.room(found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize)

    def _pruned(self, cube_id: str, now: datetime) -> list[retention.Held]:
        """A cube's versions, less those that are not kept any longer."""
        newest = self._historian.newest(cube_id)
        lives = self._keeper.ask(lambda index: index.by_id(cube_id) is not None, True)
        deleted = newest is not None and newest.deleted and not lives
        stamps = records.stamps(self._store, cube_id)
        times = [records.moment_of(stamp) for stamp in stamps]
        for time_ in retention.expired(times, now, deleted=deleted):
            stamp = records.stamp_of(time_)
            self._historian.remove(cube_id, stamp)
            stamps.remove(stamp)
        return [
            retention.Held(
                cube_id,
                stamp,
                records.blocks(self._store, cube_id, stamp),
                protected=stamp == stamps[-1] and not deleted,
            )
            for stamp in stamps
        ]

    def _clear_up(self) -> None:
        """Removes leftovers of the mount that was killed, and goes on with what was only linked."""
        for cube_id in records.cube_ids(self._store):
            try:
                making.remove_leftovers(self._store, cube_id, self._historian.started)
            except OSError as e:
                log.warning("what a kill left of versions of %s stays: %s", cube_id, e)
            for stamp in records.stamps(self._store, cube_id):
                try:
                    version = records.read(self._store, cube_id, stamp)
                    clear(self._store, version)
                except (OSError, MemfsError) as e:
                    log.warning("the version %s of %s is not cleared up: %s", stamp, cube_id, e)
                else:
                    if making.is_wanting(version):
                        self._historian.complete(cube_id, stamp)
            self._breathe()

    def _cubes(self, path: str) -> list[Found]:
        found: list[Found] = []
        self._keeper.ask(lambda index: found.extend(index.under(path)), None)
        return found

    def _breathe(self) -> None:
        """Lets the threads that serve files go first; breaks off where the mount ends."""
        time.sleep(0.0001)
        if self._historian.later.stopping:
            self._historian.broken_off = True
            raise InterruptedError(errno.EINTR, "the mount ends")
