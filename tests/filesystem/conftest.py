"""A tree over a store in a temporary directory, with no FUSE and no runtime."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from memfs.config import Config
from memfs.filesystem.backing import Backing
from memfs.filesystem.catalogue import Catalogue
from memfs.filesystem.context import Context
from memfs.filesystem.control import MountFacts
from memfs.filesystem.handles.handle import Handle
from memfs.filesystem.link import Link
from memfs.filesystem.tree import Tree
from memfs.vault.store import HIDDEN_DIR, Store

from ..waiting import until


class Caller:
    """Who asks: the test's own thread as the user that it says it is."""

    def __init__(self) -> None:
        self.uid, self.gid = os.geteuid(), os.getegid()
        self.interrupted = False
        self.known = True
        """Whether the system call that the thread is in may be known."""

    def __call__(self) -> Context:
        pid = threading.get_native_id() if self.known else 0
        return Context(self.uid, self.gid, pid, lambda: self.interrupted)


class Deaf:
    """Listens to a runtime that is not there."""

    def model_known(self, fingerprint: Mapping[str, str]) -> None:
        raise AssertionError("there is no model")

    def happened(self, event: dict[str, Any]) -> None:
        """Refusals: nothing can be made."""


class Forest:
    """A tree with its parts, and short ways to use it."""

    def __init__(self, root: Path, *, indexed: bool = True) -> None:
        self.root = root
        self.indexed = indexed
        self.store = Store.open(root)
        self.backing = Backing(self.store)
        self.caller = Caller()
        self.changed: list[str] = []
        self.catalogue = Catalogue(self.store, self.changed.append)
        config = Config(model="nowhere", autostart=False)
        self.link = Link(config, str(self.store.root), Deaf())
        facts = MountFacts(str(self.store.root), "/nowhere", True)
        self.tree = Tree(facts, self.backing, self.catalogue, self.link, self.caller)
        (root / HIDDEN_DIR).mkdir(exist_ok=True)
        if indexed:
            self.catalogue.start()

    def close(self) -> None:
        self.link.stop()
        if self.indexed:
            self.catalogue.stop()
        self.store.close()

    def opened(self, path: str, flags: int = os.O_RDONLY) -> tuple[int, Handle]:
        return self.added(self.tree.opening.open(path, flags))

    def created(self, path: str, mode: int = 0o644) -> tuple[int, Handle]:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        return self.added(self.tree.opening.create(path, mode, flags))

    def added(self, handle: Handle) -> tuple[int, Handle]:
        return self.tree.opened(handle)[0], handle

    def closed(self, number: int) -> None:
        """What the kernel does for a last ``close``."""
        try:
            self.tree.handles.get(number).flush()
        finally:
            handle = self.tree.handles.remove(number)
            assert handle is not None
            handle.release()

    def write(self, path: str, data: bytes) -> None:
        """As an editor does that writes in place."""
        try:
            number, handle = self.opened(path, os.O_WRONLY | os.O_TRUNC)
        except FileNotFoundError:
            number, handle = self.created(path)
        try:
            if data:
                assert handle.write(memoryview(bytearray(data)), 0) == len(data)
        finally:
            self.closed(number)

    def read(self, path: str) -> bytes:
        number, handle = self.opened(path)
        try:
            buffer = bytearray(4 << 20)
            return bytes(buffer[: handle.read(memoryview(buffer), 0)])
        finally:
            self.closed(number)

    def names(self, path: str) -> list[str]:
        handle = self.tree.opening.open_directory(path)
        try:
            found = [name for name, _, _ in self.tree.entries(handle)]
        finally:
            handle.release()
        return sorted(name for name in found if name not in (".", ".."))

    def hide(self, path: str, number: int) -> str:
        """What libfuse does with a file that is unlinked while it is open, or is to be replaced.

        Which of the two cannot be known here.
        """
        parent = path.rpartition("/")[0]
        hidden = f"{parent}/" * bool(parent) + f".fuse_hidden{number:016x}"
        self.caller.known = False
        try:
            self.tree.names.rename(path, hidden, 0)
        finally:
            self.caller.known = True
        return hidden


@pytest.fixture
def forest(tmp_path: Path) -> Iterator[Forest]:
    root = tmp_path / "store"
    root.mkdir()
    forest = Forest(root)
    until(lambda: forest.catalogue.cubes() is not None)
    yield forest
    forest.close()


def number_of(function: Callable[..., Any], *args: Any) -> str:
    """The name of the errno that a call ends with, "" for none."""
    try:
        function(*args)
    except OSError as e:
        return errno.errorcode[e.errno or 0]
    return ""
