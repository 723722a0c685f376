"""What a mount writes into the audit trail of its store, and that each change is told of once.

A change is told of before the index takes it in, and without an index at once: what is then found
again, because the index had no room or was not there, is compared with what was told. Used by the
catalogue, which knows the changes, and by whoever has an event of his own. Any thread.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from memfs.cube.metadata import rfc3339
from memfs.errors import NotAllowed
from memfs.filesystem import audit
from memfs.filesystem.context import Context
from memfs.vault.facts import CubeFacts
from memfs.vault.store import Store

if TYPE_CHECKING:
    from memfs.index.refresh import Change
    from memfs.vault.trail.writer import Trail

log = logging.getLogger(__name__)

_REFUSALS = 20
_KEPT = 8192


class Journal:
    """The audit trail of a mount's store. One that cannot be written has none."""

    def __init__(self, store: Store) -> None:
        self.refusals: deque[dict[str, Any]] = deque(maxlen=_REFUSALS)
        """What was refused lately, with the reasons, for ``status``."""
        self._store = store
        self._trail: Trail | None = None
        self._denials = audit.Denials()
        self._told: dict[str, Change] = {}
        """What was last told of a cube."""
        self._early: set[str] = set()
        """Cubes whose change was told of while there was no index to compare them with."""

    def start(self) -> None:
        """Opens the trail. After the fork."""
        if not self._store.writable:
            return
        from memfs.vault.trail.writer import Trail

        try:
            self._trail = Trail(self._store)
        except (OSError, NotAllowed) as e:
            log.error("there is no audit trail: %s", e)

    def stop(self) -> None:
        """Closes it."""
        trail, self._trail = self._trail, None
        if trail is not None:
            for event in self._denials.left_out(ending=True):
                trail.append(event)
            trail.close()

    def log(self, event: dict[str, Any]) -> None:
        """Adds an event, and a refusal to those that ``status`` shows."""
        if event.get("event") == "refused":
            self.refusals.append({"time": rfc3339(), **event})
        trail = self._trail
        if trail is None:
            return
        for counted in self._denials.left_out():
            trail.append(counted)
        if self._denials.is_told(event):
            trail.append(event)

    def events(self) -> Iterator[dict[str, Any]]:
        """All that is in the trail, oldest first."""
        from memfs.vault.trail import records

        return records.events(self._store)

    def changed(self, change: Change, by: Context | None) -> None:
        """A cube was changed, by whom; by nobody where it was done beside the mount."""
        path, before, after = change
        last = self._told.get(path)
        if last is not None and last.before == before:
            before = last.after  # told, but the index could not take it in: the disk was full
        self._remember(change)
        who = None
        for event in audit.changes(path, before, after):
            who = audit.actor(by) if who is None else who
            self.log(event | who)

    def changed_early(self, path: str, after: CubeFacts | None, by: Context | None) -> None:
        """A cube was changed while nobody knows what it was before."""
        self._early.add(path)
        event = {"event": "changed", "path": path, "what": None}
        self.log(event | {"after": after and after.payload_sha256} | audit.actor(by))

    def found(self, change: Change, *, may_be_new: bool) -> None:
        """A change was found that no operation told of: it was made beside the mount, or early.

        Args:
            may_be_new: whether a cube that was not known is a new one.
        """
        if change.path in self._early:
            self._early.discard(change.path)
            self._remember(change)
        elif change.before is not None or may_be_new:
            self.changed(change, None)

    def _remember(self, change: Change) -> None:
        if len(self._told) >= _KEPT:
            self._told.clear()
        self._told[change.path] = change
