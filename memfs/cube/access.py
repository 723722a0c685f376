"""Who may read a cube: the answer of mode and access list for a user, as the kernel would give it.

The runtime serves several users from one process, so the kernel cannot ask for it. Used with the
ids that ``SO_PEERCRED`` or FUSE gave, never with ids that a request names. Any thread.
"""

from __future__ import annotations

import grp
import os
import pwd
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from memfs.cube import process
from memfs.cube.acl import SEARCH, Acl


@dataclass(frozen=True)
class Caller:
    """Who asks: a user with all its groups, and the calling context."""

    uid: int
    gids: frozenset[int]
    context: str | None = None
    """See ``process``."""

    @classmethod
    def of(cls, uid: int, gid: int) -> Caller:
        """The user ``uid`` with ``gid`` and every group the system's database gives it."""
        gids = {gid}
        try:
            gids.update(os.getgrouplist(pwd.getpwuid(uid).pw_name, gid))
        except KeyError:
            pass  # a user the database does not know has only the group it came with
        return cls(uid, frozenset(gids))

    @classmethod
    def of_process(cls, uid: int, gid: int, pid: int) -> Caller:
        """A process that waits for an answer, with the groups and the context that it has itself.

        One that has ended has its group alone, and no context.
        """
        if uid == 0:
            return cls(uid, frozenset({gid}))  # it has every right anyway
        groups = process.groups_of(pid) or frozenset()
        return cls(uid, groups | {gid}, process.context_of(pid))

    @classmethod
    def from_wire(cls, request: Mapping[str, Any]) -> Caller | None:
        """The user that a request names, with the groups and the context that it says; or None."""
        uid, gid, gids = request.get("uid"), request.get("gid"), request.get("gids")
        if not _is_id(uid):
            return None
        if isinstance(gids, list) and all(map(_is_id, gids)):
            context = request.get("context")
            return cls(uid, frozenset(gids), context if isinstance(context, str) else None)
        return cls.of(uid, gid) if _is_id(gid) else None

    def to_wire(self) -> dict[str, Any]:
        """As ``from_wire`` takes it."""
        return {"uid": self.uid, "gids": sorted(self.gids), "context": self.context}


def _is_id(value: object) -> TypeGuard[int]:
    return type(value) is int and value >= 0


def allowed(caller: Caller, found: os.stat_result, rights: int, acl: Acl | None = None) -> bool:
    """Whether a file gives ``caller`` all ``rights`` (READ, WRITE, SEARCH).

    Args:
        found, acl: its status, and its access list where it has one.
    """
    if caller.uid == 0:
        return not rights & SEARCH or stat.S_ISDIR(found.st_mode) or bool(found.st_mode & 0o111)
    if acl is not None and found.st_mode & 0o070:  # the kernel skips a list that is masked out
        return acl.allows(caller.uid, caller.gids, found.st_uid, found.st_gid, rights)
    if caller.uid == found.st_uid:
        bits = found.st_mode >> 6
    elif found.st_gid in caller.gids:
        bits = found.st_mode >> 3
    else:
        bits = found.st_mode
    return bits & rights == rights


def owner_names(found: os.stat_result) -> tuple[str, str]:
    """Owner and group of a file by name, by number where the system knows no name."""
    try:
        owner = pwd.getpwuid(found.st_uid).pw_name
    except KeyError:
        owner = str(found.st_uid)
    try:
        group = grp.getgrgid(found.st_gid).gr_name
    except KeyError:
        group = str(found.st_gid)
    return owner, group
