"""What memfs itself refuses, beyond the modes that the kernel holds; and the trail is told of it.

A frozen cube takes no writes: no file in it is opened for writing, made, removed, renamed or given
other attributes, and its own directory keeps its place. The errno is that of an immutable file,
EPERM, for root as well. Used by the tree and its parts; any thread.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable

from memfs.cube.access import allowed
from memfs.cube.acl import READ, SEARCH, WRITE, Acl
from memfs.cube.process import overrides
from memfs.filesystem import audit
from memfs.filesystem.attributes import Status
from memfs.filesystem.catalogue import Catalogue
from memfs.filesystem.context import Context, opens
from memfs.vault.rights import acl_bytes

_RIGHTS = {os.O_RDONLY: READ, os.O_WRONLY: WRITE, os.O_RDWR: READ | WRITE}


class Guard:
    """Refuses, and has it remembered."""

    def __init__(self, catalogue: Catalogue, context: Callable[[], Context]) -> None:
        self._catalogue = catalogue
        self._context = context
        self._frozen = catalogue.frozen

    def is_frozen(self, cube: str) -> bool:
        """Whether a cube, or one that it lies in, is frozen."""
        return self._frozen.over(cube) is not None

    def require_writable(self, path: str) -> None:
        """Raises PermissionError where ``path`` is or lies in a frozen cube."""
        try:
            self._frozen.require(path)
        except PermissionError:
            self.denied(self._frozen.over(path) or path, "write", "frozen", file=path)
            raise

    def denied(self, cube: str, right: str, why: str, **more: str) -> None:
        """Has the trail say that the caller was denied something."""
        event = {"event": "denied", "path": cube, "right": right, "reason": why}
        self._catalogue.journal.log(event | more | audit.actor(self._context()))

    def may_read(self, path: str) -> bool:
        """Whether the caller may read a file of the store, which memfs could for anybody.

        Raises FileNotFoundError where there is none.
        """
        found = self._catalogue.store.stat(path)
        raw = acl_bytes(self._catalogue.store, path) if stat.S_ISREG(found.st_mode) else None
        return allowed(self._context().caller(), found, READ, Acl.parse(raw) if raw else None)

    def looked_at(self, path: str, cube: str, found: Status) -> None:
        """The kernel asks for the status of a file before it lets somebody open it, or does not.

        It refuses by itself and does not tell; but what the asking thread is about to do is known
        (see ``context``), and that it may not. So the trail is told of refused opens of a cube's
        files, and of its directory. Costs a comparison where mode bits let everybody in.
        """
        context = self._context()
        if context.uid == 0:
            return
        shift = 6 if context.uid == found.st_uid else 0
        if found.st_mode >> shift & (READ | WRITE) == READ | WRITE:
            return
        flags = opens(context.pid)
        if flags is None or flags & os.O_PATH or (flags & os.O_EXCL and flags & os.O_CREAT):
            return
        wanted = _RIGHTS[flags & os.O_ACCMODE] | (WRITE if flags & os.O_TRUNC else 0)
        if stat.S_ISDIR(found.st_mode):
            wanted = READ | SEARCH
        status = os.stat_result((found.st_mode, 0, 0, 1, found.st_uid, found.st_gid, 0, 0, 0, 0))
        caller, acl = context.caller(), self._acl(path)
        denied = [r for r in (READ, WRITE, SEARCH) if wanted & r]
        denied = [r for r in denied if not allowed(caller, status, r, acl)]
        if not denied or (stat.S_ISDIR(found.st_mode) and len(denied) < 2):
            return
        if not overrides(context.pid):
            right = "write" if WRITE in denied else "read"
            self.denied(cube, right, "mode or access list", file=path)

    def _acl(self, path: str) -> Acl | None:
        try:
            raw = acl_bytes(self._catalogue.store, path)
        except OSError:
            return None
        return Acl.parse(raw) if raw else None
