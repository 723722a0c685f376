"""The runtime's way to a cube's files: on behalf of a caller, from the store itself, never by FUSE.

The runtime may be allowed more than the user who asks, so a caller's rights are checked here, from
the modes of the store's own files. Blocking; used by the service, in its I/O threads.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from memfs.cube import layout
from memfs.cube.access import Caller, allowed
from memfs.cube.acl import READ, SEARCH, Acl
from memfs.errors import (
    InvalidMetadata,
    InvalidRequest,
    MemfsError,
    NotACube,
    NotAllowed,
    NotFound,
)
from memfs.operation.governance import Governed, Grantees, denial, granted_by
from memfs.vault.frozen import Frozen
from memfs.vault.identity import read_meta
from memfs.vault.rights import acl_bytes
from memfs.vault.store import Store

MAX_TEXT = 64 << 20
"""Bytes of a payload that are looked at; no model's context is near that long."""

Signature = tuple[int, int, int, int]
"""(inode, size, mtime, ctime in ns): the same as long as a file is the same."""


@dataclass(frozen=True)
class Text:
    """A payload as it was when it was read."""

    data: bytes
    sha256: str
    signature: Signature
    status: os.stat_result

    @property
    def text(self) -> str:
        """As str. Raises InvalidRequest where it is not UTF-8."""
        try:
            return self.data.decode("utf-8")
        except UnicodeDecodeError as e:
            raise InvalidRequest(f"payload.md is not UTF-8 at byte {e.start}") from e


@dataclass(frozen=True)
class Cube:
    """A MemCube in a store, named by a request."""

    store: Store
    path: str

    @property
    def key(self) -> str:
        """Names it among all stores."""
        return f"{self.store.root}\0{self.path}"

    @property
    def payload(self) -> str:
        """Path of its text."""
        return layout.join(self.path, layout.PAYLOAD)

    @property
    def kv(self) -> str:
        """Path of its KV cache."""
        return layout.join(self.path, layout.KV)

    def require(self, caller: Caller, right: str, name: str = layout.PAYLOAD) -> None:
        """Raises NotAllowed where ``caller`` may not read a file of this cube, or has not a right.

        The answer for what may not be read is that of the kernel: it does not tell whether there is
        anything behind a directory that may not be entered, and nothing is looked at before.

        Args:
            right: mount or promote.
        """
        self.require_entry(caller)
        for file in dict.fromkeys((layout.PAYLOAD, name)):
            try:
                readable = self._allowed(caller, layout.join(self.path, file), READ)
            except NotACube as e:
                raise NotFound(f"{self.path} has no {file}") from e
            if not readable:
                raise NotAllowed(f"{layout.join(self.path, file)}: you may not read it")
        owner = self._stat(self.payload).st_uid
        why = denial(caller, right, Governed(owner, readable=True, granted=self._granted()))
        if why is not None:
            raise NotAllowed(f"{self.path}: {why}")

    def require_entry(self, caller: Caller) -> None:
        """Raises NotAllowed where ``caller`` may not enter its directory, or one above it."""
        parts = self.path.split("/")
        for depth in range(len(parts) + 1):
            above = "/".join(parts[:depth])
            if not self._allowed(caller, above, SEARCH):
                raise NotAllowed(f"{self.path}: you may not enter {above or 'the store'}")

    def visible(self, caller: Caller) -> bool:
        """Whether ``caller`` may have it mounted."""
        try:
            self.require(caller, "mount")
        except (MemfsError, OSError):
            return False
        return True

    def _allowed(self, caller: Caller, path: str, rights: int) -> bool:
        found = self._stat(path)
        if caller.uid == 0:
            return allowed(caller, found, rights)
        raw = acl_bytes(self.store, path)
        return allowed(caller, found, rights, Acl.parse(raw) if raw else None)

    def _granted(self) -> dict[str, Grantees] | None:
        """Whom the header names for each right; None where it cannot be read."""
        try:
            header = read_meta(self.store, self.path)
        except FileNotFoundError:
            return {}
        except (OSError, InvalidMetadata, NotAllowed):
            return None
        return granted_by(header.get("governance", {}).get("access", []))

    def require_writable(self) -> None:
        """Raises NotAllowed where the cube, or one that it lies in, is frozen."""
        if Frozen(self.store).over(self.path) is not None:
            raise NotAllowed(f"{self.path} is frozen: no {layout.KV} is made for it")

    def text(self) -> Text:
        """The payload, whole. Raises NotACube where there is none."""
        try:
            fd = self.store.open_regular(self.payload)
        except FileNotFoundError as e:
            raise NotACube(self.path) from e
        with os.fdopen(fd, "rb") as file:
            status = os.fstat(fd)
            data = file.read(MAX_TEXT + 1)
        if len(data) > MAX_TEXT:
            raise InvalidRequest(f"{self.payload} is longer than {MAX_TEXT} bytes")
        return Text(data, hashlib.sha256(data).hexdigest(), _signature(status), status)

    def signature(self, path: str) -> Signature | None:
        """Of one of its files; None where there is none."""
        try:
            return _signature(self.store.stat(path))
        except FileNotFoundError:
            return None

    def open_kv(self) -> tuple[int, Signature]:
        """A descriptor of the KV cache, and its signature. Raises NotFound where there is none."""
        try:
            fd = self.store.open_regular(self.kv)
        except FileNotFoundError as e:
            raise NotFound(f"{self.path} has no {layout.KV}") from e
        return fd, _signature(os.fstat(fd))

    def _stat(self, path: str) -> os.stat_result:
        try:
            return self.store.stat(path)
        except (FileNotFoundError, NotADirectoryError) as e:
            raise NotACube(self.path) from e


class Stores:
    """The stores that requests have named, each opened once."""

    def __init__(self) -> None:
        self._open: dict[str, Store] = {}

    def cube(self, root: str, path: str, caller: Caller) -> Cube:
        """The cube at ``path`` in the store at ``root``. Raises InvalidRequest, NotFound.

        To other users than the daemon's own every directory that is no store, or that they may not
        enter, is the same: NotAllowed.
        """
        if not os.path.isabs(root) or not path or path.startswith("/"):
            raise InvalidRequest("a cube is named by an absolute store and a path within it")
        own = caller.uid in (0, os.geteuid())
        try:
            store = self._store(root, own=own)
            if not own:
                Cube(store, "").require_entry(caller)
        except (NotFound, NotAllowed, OSError):
            if own:
                raise
            raise NotAllowed(f"{root}: there is no store that you may enter") from None
        return Cube(store, path)

    def _store(self, root: str, *, own: bool) -> Store:
        root = os.path.realpath(root)  # a symlink is no other store, and may lead elsewhere later
        store = self._open.get(root)
        if store is None or not _same_directory(store, root):
            store = Store.open(Path(root), create_control=False)
            if not own and not store.control_dir.is_dir():
                store.close()
                raise NotFound(root)
            self._open[root] = store
        return store


def _same_directory(store: Store, root: str) -> bool:
    """Whether the directory that is open is still the one at its path."""
    try:
        return os.path.samestat(os.fstat(store.fd), os.stat(root))
    except OSError:
        return False


def _signature(found: os.stat_result) -> Signature:
    return (found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
