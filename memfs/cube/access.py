"""Who may read a cube: the file modes' answer for a user id, as the kernel would give it.

The runtime serves several users from one process, so the kernel cannot ask for it. Used with the
ids that ``SO_PEERCRED`` or FUSE gave, never with ids that a request names. Any thread.
"""

from __future__ import annotations

import grp
import os
import pwd
import stat
from dataclasses import dataclass

READ, WRITE, SEARCH = 4, 2, 1


@dataclass(frozen=True)
class Caller:
    """A user with all the groups it is in."""

    uid: int
    gids: frozenset[int]

    @classmethod
    def of(cls, uid: int, gid: int) -> Caller:
        """The user ``uid`` with ``gid`` and every group the system's database gives it."""
        gids = {gid}
        try:
            gids.update(os.getgrouplist(pwd.getpwuid(uid).pw_name, gid))
        except KeyError:
            pass  # a user the database does not know has only the group it came with
        return cls(uid, frozenset(gids))


def allowed(caller: Caller, found: os.stat_result, rights: int) -> bool:
    """Whether the mode bits of ``found`` give ``caller`` all ``rights`` (READ, WRITE, SEARCH)."""
    if caller.uid == 0:
        return not rights & SEARCH or stat.S_ISDIR(found.st_mode) or bool(found.st_mode & 0o111)
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
