"""Setting aside: what is of no use where it lies is moved below ``.memfs/aside/``, never deleted.

Each repair has a directory of its own there, named by its time; in it a file keeps the path that
it had in the store. Used by ``memfs fsck --repair``, under the store's lock; one thread.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime

from memfs.cube import layout
from memfs.vault.publish import sync_directory
from memfs.vault.rename import RENAME_NOREPLACE, renameat2
from memfs.vault.store import Store, give_to_owner

ASIDE_DIR = f"{layout.CONTROL}/aside"


class Aside:
    """Where one repair puts things. Nothing is made before the first of them comes."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._directory = f"{ASIDE_DIR}/{datetime.now(UTC):%Y-%m-%dT%H%M%S.%fZ}"

    def put(self, path: str) -> str:
        """Moves what is at ``path``, a directory with all in it; where it is now.

        Raises OSError, and moves nothing, where that cannot be done at once: where another
        filesystem is mounted within the store, it is EXDEV.
        """
        parent, name = layout.split(path)
        target = layout.join(self._directory, path)
        holder, _ = layout.split(target)
        self._make(holder)
        with self._store.opened(parent) as source, self._store.opened(holder) as destination:
            name_there = _free(destination, name)
            os.rename(name, name_there, src_dir_fd=source, dst_dir_fd=destination)
            # First where it is now: a crash in between shows it twice rather than never.
            sync_directory(destination)
            sync_directory(source)
        return layout.join(holder, name_there)

    def take_back(self, place: str, path: str) -> None:
        """Moves what ``put`` gave the place of to where it was, if nothing else is there now."""
        (holder, name), (parent, last) = layout.split(place), layout.split(path)
        with self._store.opened(holder) as source, self._store.opened(parent) as destination:
            renameat2(source, name, destination, last, RENAME_NOREPLACE)
            sync_directory(destination)

    def _make(self, path: str) -> None:
        """Makes a directory, and those above that are missing, for the store's owner."""
        parent, name = layout.split(path)
        if not name:
            return
        if parent:
            self._make(parent)
        above = self._store.open_dir(parent)
        try:
            os.mkdir(name, 0o700, dir_fd=above)
        except FileExistsError:
            return
        else:
            with self._store.opened(path) as made:
                give_to_owner(self._store, made)
            sync_directory(above)
        finally:
            os.close(above)


def _free(directory: int, name: str) -> str:
    """``name``, or one like it that nothing in an open directory has."""
    taken, number = set(os.listdir(directory)), 1
    candidate = name
    while candidate in taken:
        number += 1
        candidate = f"{name}.{number}"
    return candidate
