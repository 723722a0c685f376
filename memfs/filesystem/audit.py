"""What the audit trail says of changes: made from what was known of a cube before and is now.

A change through the mount names who made it; one beside it, nobody. Used by the catalogue, the tree
and its parts; pure, but for the name of the program, which is looked up. Any thread.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from memfs.cube import access_list
from memfs.filesystem.context import Context, program
from memfs.vault.facts import CubeFacts
from memfs.vault.sig import Sig

Event = dict[str, Any]


REPEATED_SECONDS = 1.0
_KEPT = 4096


class Denials:
    """Denials that were told of lately. One that repeats is told of once a second: the trail keeps
    so many events, and nobody shall be able to drive the others out of it.
    """

    def __init__(self) -> None:
        self._told: dict[tuple[object, ...], float] = {}

    def repeats(self, event: Event) -> bool:
        """Whether an event is a denial that has just been told of; if not, it is now."""
        if event.get("event") != "denied":
            return False
        key = tuple(event.get(name) for name in ("uid", "path", "right", "reason"))
        now = time.monotonic()
        if now - self._told.get(key, -REPEATED_SECONDS) < REPEATED_SECONDS:
            return True
        if len(self._told) >= _KEPT:
            self._told.clear()
        self._told[key] = now
        return False


def changes(path: str, before: CubeFacts | None, after: CubeFacts | None) -> Iterator[Event]:
    """The events that lead from what was known of a cube to what is known now."""
    if before is None or after is None:
        facts = after or before
        if facts is not None:
            kind = "created" if before is None else "deleted"
            yield {"event": kind, "path": path, "id": facts.id, "sha256": facts.payload_sha256}
        return
    if before.payload_sig is not after.payload_sig and (
        (before.payload_state, before.payload_sha256) != (after.payload_state, after.payload_sha256)
    ):
        digests = {"before": before.payload_sha256, "after": after.payload_sha256}
        yield {"event": "changed", "path": path, "what": "payload", **digests}
    for what, old, new in (
        ("meta", before.meta_sig, after.meta_sig),
        ("kv", before.kv_sig, after.kv_sig),
        ("adapter", before.adapter_sig, after.adapter_sig),
    ):
        if _is_other(old, new):
            sizes = {"before": old and old.size, "after": new and new.size}
            yield {"event": "changed", "path": path, "what": what, **sizes}
    if before.frozen != after.frozen:
        yield {"event": "frozen" if after.frozen else "thawed", "path": path}
    if before.mode != after.mode:
        yield governed("chmod", path, f"{before.mode:03o}", f"{after.mode:03o}")
    if (before.uid, before.gid) != (after.uid, after.gid):
        yield governed("chown", path, f"{before.uid}:{before.gid}", f"{after.uid}:{after.gid}")
    if before.acl != after.acl:
        yield governed("access", path, _access(before), _access(after))


def governed(event: str, path: str, before: object, after: object) -> Event:
    """The event of a change of rights."""
    return {"event": event, "path": path, "before": before, "after": after}


def actor(context: Context | None) -> Event:
    """Who asked, as an event says it; nothing where that is not known, as in a ``release``."""
    if context is None or context.pid == 0:
        return {}
    name = program(context.pid)
    return {"uid": context.uid, "gid": context.gid, "pid": context.pid, "program": name}


def _access(facts: CubeFacts) -> list[str]:
    return [f"{e['who']} {' '.join(e['rights'])}" for e in access_list.shown([], facts.access_list)]


def _is_other(old: Sig | None, new: Sig | None) -> bool:
    """Whether a file was written or replaced; a change of its mode alone is none."""
    return (old and old[:3]) != (new and new[:3])
