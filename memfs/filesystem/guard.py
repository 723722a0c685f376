"""What memfs itself refuses, beyond the modes that the kernel holds; and the trail is told of it.

A frozen cube takes no writes: no file in it is opened for writing, made, removed, renamed or given
other attributes, and its own directory keeps its place. The errno is that of an immutable file,
EPERM, for root as well. Used by the tree and its parts; any thread.
"""

from __future__ import annotations

from collections.abc import Callable

from memfs.filesystem import audit
from memfs.filesystem.catalogue import Catalogue
from memfs.filesystem.context import Context
from memfs.vault.frozen import Frozen


class Guard:
    """Refuses, and has it remembered."""

    def __init__(self, catalogue: Catalogue, context: Callable[[], Context]) -> None:
        self._catalogue = catalogue
        self._context = context
        self._frozen = Frozen(catalogue.store, self._was_frozen)

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
        self._catalogue.log(event | more | audit.actor(self._context()))

    def _was_frozen(self, cube: str) -> bool:
        known = self._catalogue.keeper.ask(lambda index: index.get(cube), None)
        return known is not None and known.frozen
