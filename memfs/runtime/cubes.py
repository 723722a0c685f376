"""The runtime's way to a cube's files: on behalf of a caller, from the store itself, never by FUSE.

The runtime may be allowed more than the user who asks, so a caller's rights are checked here, from
the modes of the store's own files. Blocking; used by the service, in its I/O threads.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from memfs.cube import layout, metadata
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
from memfs.vault.rights import read_acl
from memfs.vault.store import Store, open_regular_at

MAX_TEXT = 64 << 20
"""Bytes of a payload that are looked at; no model's context is near that long."""

MAX_PATH = 4096
"""Characters of a cube's path, the kernel's own limit: one that is refused stands in the trail."""

Signature = tuple[int, int, int, int]
"""(inode, size, mtime, ctime in ns): the same as long as a file is the same."""


@dataclass(frozen=True)
class Text:
    """A payload as it was when it was read."""

    data: bytes
    sha256: str
    signature: Signature

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

    def open(self, caller: Caller | None, right: str | None = None) -> Files:
        """Its files, as far as ``caller`` may read them and has a right; None is the daemon itself.

        The answer for what may not be read is that of the kernel: it does not tell whether there is
        anything behind a directory that may not be entered, and nothing is looked at before. Each
        directory is reached from the one before it, so another that takes its place meanwhile is
        not the one that is read.

        Args:
            right: mount or promote.

        Raises:
            NotAllowed; NotFound (NotACube where there is no such directory).
        """
        try:
            fd = self.store.enter(self.path, lambda fd, at: self._require_search(caller, fd, at))
        except (FileNotFoundError, NotADirectoryError) as e:
            raise NotACube(self.path) from e
        files = Files(self, caller, fd)
        try:
            files.require(right)
        except BaseException:
            files.close()
            raise
        return files

    def visible(self, caller: Caller) -> bool:
        """Whether ``caller`` may have it mounted."""
        try:
            self.open(caller, "mount").close()
        except (MemfsError, OSError):
            return False
        return True

    def require_writable(self) -> None:
        """Raises NotAllowed where the cube, or one that it lies in, is frozen."""
        if Frozen(self.store).over(self.path) is not None:
            raise NotAllowed(f"{self.path} is frozen: no {layout.KV} is made for it")

    def _require_search(self, caller: Caller | None, fd: int, at: str) -> None:
        if not may(caller, fd, SEARCH):
            raise NotAllowed(f"{self.path}: you may not enter {at or 'the store'}")


class Files:
    """The files of a cube, held open: what a caller was let to is what is read.

    Closed by whoever opened it, or at the end of a ``with``; a request that was given up while a
    thread opened them for it leaves them to nobody, and then they go by themselves.
    """

    def __init__(self, cube: Cube, caller: Caller | None, fd: int) -> None:
        """``fd`` is the cube's directory, and from now on this object's."""
        self.cube = cube
        self.directory = Store(cube.store.root / cube.path, fd, writable=cube.store.writable)
        """The cube's directory; its files are named without the cube's path."""
        self._caller = caller
        self._payload = self._kv = -1

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives the descriptors back."""
        opened = [fd for fd in (self._payload, self._kv) if fd >= 0]
        self._payload = self._kv = -1
        for fd in opened:
            os.close(fd)
        self.directory.close()

    __del__ = close

    def require(self, right: str | None) -> None:
        """Opens the payload. Raises NotFound, NotAllowed (it may not be read, or no ``right``)."""
        self._payload = self._open(layout.PAYLOAD)
        if self._caller is None or right is None:
            return
        owner = os.fstat(self._payload).st_uid
        governed = Governed(owner, readable=True, granted=self._granted())
        why = denial(self._caller, right, governed)
        if why is not None:
            raise NotAllowed(f"{self.cube.path}: {why}")

    def again(self) -> Files:
        """The same directory's files as they are by now."""
        files = Files(self.cube, self._caller, os.dup(self.directory.fd))
        try:
            files.require(None)
        except BaseException:
            files.close()
            raise
        return files

    @property
    def signature(self) -> Signature:
        """Of the payload."""
        return signature_of(self._payload)

    @property
    def owner(self) -> int:
        """The user whose payload it is."""
        return os.fstat(self._payload).st_uid

    def text(self) -> Text:
        """The payload, whole."""
        signature = self.signature
        if signature[1] > MAX_TEXT:
            shown = layout.join(self.cube.path, layout.PAYLOAD)
            raise InvalidRequest(f"{shown} is longer than {MAX_TEXT} bytes")
        os.lseek(self._payload, 0, os.SEEK_SET)
        with open(self._payload, "rb", closefd=False) as file:
            data = file.read(signature[1])
        return Text(data, hashlib.sha256(data).hexdigest(), signature)

    def open_kv(self) -> tuple[int, Signature]:
        """A descriptor of the KV cache, closed with the rest, and its signature.

        Raises NotFound, NotAllowed (it may not be read).
        """
        if self._kv < 0:
            self._kv = self._open(layout.KV)
        return self._kv, signature_of(self._kv)

    def pinned(self) -> bool:
        """Whether its header pins it."""
        return bool(self._header().get("state", {}).get("pinned"))

    def storage(self) -> str:
        """How its header wants the KV cache to be stored."""
        return metadata.storage(self._header())

    def _header(self) -> metadata.Meta:
        """The header; nothing where it cannot be read."""
        try:
            return read_meta(self.directory, "")
        except (OSError, InvalidMetadata, NotAllowed):
            return {}

    def _open(self, name: str) -> int:
        shown = layout.join(self.cube.path, name)
        try:
            fd = open_regular_at(self.directory.fd, name, shown=shown)
        except FileNotFoundError as e:
            raise NotFound(f"{self.cube.path} has no {name}") from e
        if not may(self._caller, fd, READ):
            os.close(fd)
            raise NotAllowed(f"{shown}: you may not read it")
        return fd

    def _granted(self) -> dict[str, Grantees] | None:
        """Whom the header names for each right; None where it cannot be read."""
        try:
            header = read_meta(self.directory, "")
        except FileNotFoundError:
            return {}
        except (OSError, InvalidMetadata, NotAllowed):
            return None
        return granted_by(header.get("governance", {}).get("access", []))


class Stores:
    """The stores that requests have named, each opened once."""

    def __init__(self) -> None:
        self._open: dict[str, Store] = {}

    def cube(self, root: str, path: str, caller: Caller, *, by_mount: bool) -> Cube:
        """The cube at ``path`` in the store at ``root``. Raises InvalidRequest, NotFound.

        To other users than the daemon's own every directory that is no store, or that they may not
        enter, is the same: NotAllowed.

        Args:
            by_mount: whether a mount asks for ``caller``: they reach the store's root through the
                mount, which need not lie where the store lies.
        """
        if not os.path.isabs(root) or not path or path.startswith("/"):
            raise InvalidRequest("a cube is named by an absolute store and a path within it")
        if len(path) > MAX_PATH:
            raise InvalidRequest(f"the path of a cube has at most {MAX_PATH} characters")
        own = caller.uid in (0, os.geteuid())
        try:
            store = self._store(os.path.realpath(root), own=own)
            if not own:
                _require_way(store, caller, from_root=not by_mount)
        except (NotFound, NotAllowed, OSError):
            if own:
                raise
            raise NotAllowed(f"{root}: there is no store that you may enter") from None
        return Cube(store, path)

    def _store(self, root: str, *, own: bool) -> Store:
        """``root`` is a real path: a symlink is no other store, and may lead elsewhere later."""
        store = self._open.get(root)
        if store is None or not _same_directory(store, root):
            store = Store.open(Path(root), create_control=False)
            if not own and not store.control_dir.is_dir():
                store.close()
                raise NotFound(root)
            self._open[root] = store
        return store


def may(caller: Caller | None, fd: int, rights: int) -> bool:
    """Whether the file or directory that is open gives ``caller`` all ``rights``.

    It is the daemon's own business (None) what that may read.
    """
    if caller is None:
        return True
    raw = read_acl(f"/proc/self/fd/{fd}") if caller.uid else None  # O_PATH has none of its own
    return allowed(caller, os.fstat(fd), rights, Acl.parse(raw) if raw else None)


def _require_way(store: Store, caller: Caller, *, from_root: bool) -> None:
    """Raises NotAllowed where ``caller`` may not enter a store, or a directory above it."""

    def look(fd: int, _path: str) -> None:
        if not may(caller, fd, SEARCH):
            raise NotAllowed("")

    look(store.fd, "")
    if from_root:
        way = Store(Path("/"), os.open("/", os.O_PATH | os.O_CLOEXEC), writable=False)
        with way:
            fd = way.enter(str(store.root).lstrip("/"), look)
        try:
            if not os.path.samestat(os.fstat(fd), os.fstat(store.fd)):
                raise NotFound(str(store.root))  # it was moved just now
        finally:
            os.close(fd)


def _same_directory(store: Store, root: str) -> bool:
    """Whether the directory that is open is still the one at its path."""
    try:
        return os.path.samestat(os.fstat(store.fd), os.stat(root))
    except OSError:
        return False


def signature_of(fd: int) -> Signature:
    """Of an open file."""
    found = os.fstat(fd)
    return (found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
