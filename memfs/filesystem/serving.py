"""The parts of a served mount, put together; started and ended in the right order.

Used by ``mount`` in the process that serves. Threads are started in ``start``, which FUSE calls
after the fork; until then nothing here opens the index or a connection.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from memfs.config import Config
from memfs.cube import layout
from memfs.filesystem import fuse
from memfs.filesystem.backing import Backing
from memfs.filesystem.catalogue import Catalogue
from memfs.filesystem.control import MountFacts
from memfs.filesystem.link import Link
from memfs.filesystem.pinned import load_pinned
from memfs.filesystem.registry import MountRecord
from memfs.filesystem.tree import Tree
from memfs.vault.store import HIDDEN_DIR, Store

if TYPE_CHECKING:
    from memfs.index.lmdb_index import Index

log = logging.getLogger(__name__)

STOP_SECONDS = 11.0
"""How long the end of a mount may take; usage counters are written for up to ten seconds of it."""
_SWITCH_SECONDS = 0.0005
"""How long a thread that computes keeps Python's lock from one that has a file operation to answer.
"""


class Server:
    """One mount: its tree, its catalogue, its link to the runtime."""

    def __init__(
        self, store: Store, record: MountRecord, config: Config, *, noatime: bool = False
    ) -> None:
        self._store = store
        self._config = config
        self._mountpoint = record.mountpoint
        self._catalogue = Catalogue(store, self._cube_changed, config.versions_budget_bytes)
        self._link = Link(config, str(store.root), self)
        facts = MountFacts(record.store, record.mountpoint, config.mount_on_read)
        backing = Backing(store, noatime=noatime)
        self._tree = Tree(facts, backing, self._catalogue, self._link, fuse.context)

    def serve(self, options: Mapping[str, str | bool], started: Callable[[], None]) -> None:
        """Serves until the mount ends; ``started`` is called when it can be used."""
        fuse.serve(self._tree, self._mountpoint, dict(options), started=started, ended=self._ended)

    def start(self) -> None:
        """Starts all that goes on behind the file operations."""
        sys.setswitchinterval(_SWITCH_SECONDS)
        faulthandler.register(signal.SIGUSR1)  # what every thread is at, into the log
        if self._store.writable:
            self._clear_unlinked()
        self._catalogue.start()
        self._link.start()
        log.info("%s is mounted at %s", self._store.root, self._mountpoint)

    # What the link says; in a thread of its own.

    def model_known(self, fingerprint: Mapping[str, str]) -> None:
        """A model is resident: the states of all KV caches depend on it."""
        self._catalogue.set_model(fingerprint)
        self._catalogue.keeper.soon(self._load_pinned)

    def happened(self, event: dict[str, Any]) -> None:
        """Something happened to a cube: the audit trail keeps it."""
        kept = {name: value for name, value in event.items() if name not in ("store", "time")}
        self._catalogue.journal.log(kept)
        path = str(event.get("path"))
        if event.get("event") == "asked":
            self._catalogue.count(path, questions=1)
        elif event.get("event") == "encoded":
            self._catalogue.keeper.later_below(path)

    def _load_pinned(self, index: Index) -> None:
        paths = [path for path, _ in index.find(pinned=True)]
        if paths:
            wanted = (self._config, str(self._store.root), paths)
            threading.Thread(target=load_pinned, args=wanted, name="pins", daemon=True).start()

    def _cube_changed(self, path: str) -> None:
        self._link.changed(path)

    def _ended(self) -> None:
        self._link.stop()
        stopping = threading.Thread(target=self._catalogue.stop, daemon=True)
        stopping.start()
        stopping.join(STOP_SECONDS)
        if stopping.is_alive():
            # A KV cache of many gigabytes is being checked: its index is not closed, which is as
            # if the process was killed, and no worse.
            faulthandler.dump_traceback()
        log.info("%s is not mounted any more", self._store.root)

    def _clear_unlinked(self) -> None:
        """Files that were unlinked while open, in a mount that was killed, go for good now."""
        _, name = layout.split(HIDDEN_DIR)
        with self._store.opened(layout.CONTROL) as control:
            shutil.rmtree(name, ignore_errors=True, dir_fd=control)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=control)  # no directory: the store came from elsewhere
            os.mkdir(name, 0o700, dir_fd=control)
