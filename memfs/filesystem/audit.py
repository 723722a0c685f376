"""What the audit trail says of changes: made from what was known of a cube before and is now.

A change through the mount names who made it; one beside it, nobody. Used by the catalogue, the tree
and its parts; pure, but for the name of the program, which is looked up. Any thread.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from memfs.cube import access_list
from memfs.filesystem.context import Context, program
from memfs.vault.facts import CubeFacts
from memfs.vault.sig import Sig

Event = dict[str, Any]


REPEATED_SECONDS = 1.0
DENIALS, WITHIN_SECONDS = 1000, 3600.0
"""How many denials of one user are told of in an hour; the trail keeps some 200,000 events."""
_USERS = 64
"""More of them in an hour are taken for one: a program may have thousands of user ids."""


class _Told:
    """What was told of a user in this hour."""

    def __init__(self, now: float) -> None:
        self.since = now
        self.count = 0
        self.more = 0
        self.last: dict[tuple[object, ...], float] = {}


class Denials:
    """Which denials the trail is told of: one that repeats once a second, and so many of a user.

    Otherwise anybody could drive all else out of it in a minute, by being denied one file after
    another. Any thread.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._users: dict[object, _Told] = {}
        self._lock = threading.Lock()

    def is_told(self, event: Event) -> bool:
        """Whether the trail is told of an event, which may be no denial."""
        if event.get("event") != "denied":
            return True
        key = tuple(event.get(name) for name in ("path", "right", "reason"))
        now, user = self._clock(), event.get("uid")
        with self._lock:
            if len(self._users) >= _USERS and user not in self._users:
                user = None
            told = self._users.setdefault(user, _Told(now))
            if now - told.last.get(key, -REPEATED_SECONDS) < REPEATED_SECONDS:
                return False
            if told.count >= DENIALS:
                told.more += 1
                return False
            told.count += 1
            told.last[key] = now
            return True

    def left_out(self, *, ending: bool = False) -> Iterator[Event]:
        """What the trail is to say of users whose hour is over: how often they were denied more."""
        if not self._users:
            return
        now = self._clock()
        with self._lock:
            over = [u for u, t in self._users.items() if ending or now - t.since > WITHIN_SECONDS]
            told = {user: self._users.pop(user) for user in over}
        for user, counted in told.items():
            if counted.more:
                who = "others" if user is None else f"uid {user}"
                what = f"{counted.more} more denials of {who} within the hour are not told of"
                yield {"event": "trail", "what": what}


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
