"""Who may read what was: those who could then, and can today.

Both count as they stand, owners included: whom a file belongs to today has by that no right to what
it was. Root's mount reads every version, and must not read one for who only came by its place, or
its id. Used by ``tree``; any thread.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from memfs.cube import layout
from memfs.cube.access import Caller
from memfs.cube.acl import READ, SEARCH, Acl
from memfs.vault.rights import acl_of
from memfs.vault.store import Store
from memfs.vault.versions.records import Entry, Parent, Version


@dataclass(frozen=True)
class Rights:
    """Owner, group and access list of a file or directory."""

    uid: int
    gid: int
    acl: Acl

    @classmethod
    def of(cls, store: Store, path: str) -> Rights:
        """Those of what is in the store now. Raises OSError."""
        found = store.stat(path)
        return cls(found.st_uid, found.st_gid, acl_of(store, path))

    @classmethod
    def recorded(cls, then: Entry | Parent) -> Rights:
        """Those that a version has of it."""
        acl = Acl.of_mode(then.mode) if then.acl is None else Acl.parse(bytes.fromhex(then.acl))
        return cls(then.uid, then.gid, acl)

    @classmethod
    def in_the_end(cls, burial: Version, *, directory: bool) -> Rights:
        """Those that a cube's directory, or its text, had when it was deleted."""
        end = burial.parents[-1]
        return cls.recorded(end if directory else burial.last or end)

    def and_now(self, store: Store, *places: str) -> Rights:
        """These as far as today's give them too: those of the first place where there is something.

        Where there is nothing, all is as it was.
        """
        for path in places:
            try:
                now = Rights.of(store, path)
            except (FileNotFoundError, NotADirectoryError):
                continue
            return self.within(now)
        return self

    def within(self, now: Rights) -> Rights:
        """What these give and later ones, too. The group is the later.

        Where there was another owner, neither is one any more, and the file is shown as root's. The
        mount's own user stays the owner: he has the files of the versions on the disk as well, and
        may have moved the store to a machine that knows him by another number.
        """
        owners = None if self.uid == now.uid else (self.uid, now.uid)
        acl = self.acl.meet(now.acl, same_group=self.gid == now.gid, owners=owners)
        return Rights(now.uid if now.uid in (self.uid, os.geteuid()) else 0, now.gid, acl)

    def allow(self, caller: Caller, wanted: int) -> bool:
        """Whether they give a user who is not root all of READ, WRITE, SEARCH that is wanted."""
        return self.acl.allows(caller.uid, caller.gids, self.uid, self.gid, wanted)


def may_read(store: Store, caller: Caller, newest: Version) -> bool:
    """Whether a cube can be read where it is now; one that is gone, whether it could be come to.

    Args:
        caller: not root.
        newest: the cube's last version.
    """
    above = [""]
    for part in newest.path.split("/"):
        above.append(layout.join(above[-1], part))
    try:
        if newest.deleted:
            ways = zip(newest.parents, above, strict=True)
            rights = [Rights.recorded(parent).and_now(store, path) for parent, path in ways]
            text = Rights.in_the_end(newest, directory=False)
            return all(r.allow(caller, SEARCH) for r in rights) and text.allow(caller, READ)
        if not all(Rights.of(store, path).allow(caller, SEARCH) for path in above):
            return False
        return Rights.of(store, layout.join(newest.path, layout.PAYLOAD)).allow(caller, READ)
    except FileNotFoundError:
        return Rights.of(store, newest.path).allow(caller, READ)  # it has no text
    except OSError:
        return False
