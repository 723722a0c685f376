"""Frozen cubes: a cube whose meta.json says ``state.frozen`` takes no writes by any way in.

The header on disk decides, looked at each time, so a cube that is frozen beside a mount is frozen
at once. Used by whoever writes into a store: the mount, the runtime, identity, versions, loading.
Any thread.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Callable

from memfs.cube import layout, metadata
from memfs.errors import NotAllowed
from memfs.vault.sig import Sig, settled_sig, sig_of
from memfs.vault.store import Store

_KEPT = 8192


class Frozen:
    """Tells whether a path of one store lies in a frozen cube."""

    def __init__(self, store: Store, last_known: Callable[[str], bool] = lambda _: False) -> None:
        """``last_known`` says it of a cube whose header was made unreadable beside the mount."""
        self._store = store
        self._last_known = last_known
        self._read: dict[str, tuple[Sig, bool]] = {}

    def over(self, path: str) -> str | None:
        """The frozen cube that ``path`` is or lies in."""
        end = 0
        while end < len(path):
            end = path.find("/", end + 1)
            end = len(path) if end < 0 else end
            if self.cube(path[:end]):
                return path[:end]
        return None

    def require(self, path: str) -> None:
        """Raises PermissionError (EPERM) where ``path`` is or lies in a frozen cube."""
        if self.over(path) is not None:
            raise PermissionError(errno.EPERM, "the cube is frozen", path)

    def cube(self, path: str) -> bool:
        """Whether there is a frozen cube at ``path``."""
        if layout.is_temporary(path):
            return False  # it is put together there, and no cube as yet
        name = f"{path}/{layout.META}"
        try:
            # Through no symlink: one may lead into the mount, which this very operation keeps from
            # answering as long as it holds the directory.
            found = self._store.stat(name)
        except OSError:
            return False
        known = self._read.get(path)
        if known is not None and known[0] == sig_of(found):
            return known[1]
        try:
            header = json.loads(self._store.read(name, metadata.MAX_BYTES))
            frozen = header["state"]["frozen"] is True
        except (KeyError, TypeError):
            frozen = False
        except (OSError, ValueError, RecursionError, NotAllowed):
            return self._last_known(path)
        if len(self._read) >= _KEPT:
            self._read.clear()
        self._read[path] = settled_sig(found), frozen
        return frozen
