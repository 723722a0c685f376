# ruff: noqa: ARG002  callbacks take all that FUSE gives
"""The thin adapter between the tree and FUSE: libfuse 3 through mfusepy, imported here alone.

mfusepy's own wrappers are kept where they pass on all that the kernel says. Those that drop a file
handle or a flag, or copy what could be read in place, are overridden in ``_Session``.

``copy_file_range`` is not defined, so the kernel copies by reading and writing; nor are locks,
which it then keeps by itself. Every callback runs in a thread of libfuse's.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from threading import get_ident as _get_ident
from typing import Any, ClassVar

from memfs.errors import MemfsError, MountFailed
from memfs.filesystem import libfuse
from memfs.filesystem.attributes import ATTRIBUTE_SECONDS, fill
from memfs.filesystem.context import Context
from memfs.filesystem.handles.handle import Handle
from memfs.filesystem.handles.staged import Staged
from memfs.filesystem.tree import WAITERS, Tree

log = logging.getLogger(__name__)

_KILLPRIV = 1 << 20
"""FUSE_CAP_HANDLE_KILLPRIV: that the file system clears setuid bits. The kernel does it better:
root's mount writes with rights under which no file loses them.
"""

_READDIRPLUS = 1 << 13 | 1 << 14
"""FUSE_CAP_READDIRPLUS and its AUTO: listings with attributes, which nothing here believes for
longer than the listing takes.
"""

_PASSTHROUGH = 1 << 29
"""FUSE_CAP_PASSTHROUGH."""
_BACKING_ID = 36
"""Offset of ``backing_id`` in struct fuse_file_info since libfuse 3.17; mfusepy has it not."""

_POSIX_ACL = 1 << 19
"""FUSE_CAP_POSIX_ACL: the kernel reads the files' access lists, and holds them as it does modes."""

_DONT_MASK = 1 << 6
"""FUSE_CAP_DONT_MASK: the umask is ours to apply, as a directory's default list may replace it."""

_UNCHANGED = 0xFFFFFFFF
"""-1 as an unsigned user or group id."""


_library = libfuse.find()
if _library is None:
    raise MountFailed("libfuse 3 is not installed; try: apt-get install fuse3")
os.environ["FUSE_LIBRARY_PATH"] = _library  # mfusepy would find libfuse 2 by itself

import mfusepy  # noqa: E402  it loads the library as it is imported

_VERSION = (mfusepy.fuse_version_major, mfusepy.fuse_version_minor)
_THREADS_STAY = _VERSION >= (3, 12)
"""Whether libfuse can be told how many threads to keep. Before, it started as many as there was
work for, and ended those that had none.
"""

_get_context = mfusepy._libfuse.fuse_get_context
_get_session = mfusepy._libfuse.fuse_get_session
_get_session.argtypes, _get_session.restype = (ctypes.c_void_p,), ctypes.c_void_p
_get_descriptor = mfusepy._libfuse.fuse_session_fd
_get_descriptor.argtypes = (ctypes.c_void_p,)
_is_interrupted = mfusepy._libfuse.fuse_interrupted


def context() -> Context:
    """Who asks for the operation that the calling thread, one of libfuse's, is in."""
    found = _get_context().contents
    return Context(found.uid, found.gid, found.pid, _interrupted, found.umask)


def serve(
    tree: Tree,
    mountpoint: str,
    options: dict[str, str | bool],
    *,
    started: Callable[[], None],
    ended: Callable[[], None],
) -> None:
    """Mounts, and serves until the mount ends. In the main thread.

    Args:
        options: of the mount, as after ``-o``.
        started: called when file operations are about to be answered.
        ended: called when none comes any more.

    Raises:
        MountFailed: it could not be mounted; libfuse has said why on stderr.
    """
    if _THREADS_STAY:
        threads = str(2 * WAITERS)
        options = {"max_threads": threads, "max_idle_threads": threads, **options}
    if "noatime" in options:
        tree.passthrough.decline("the kernel would set access times in the store (noatime)")
    callbacks = _Callbacks(tree, started, ended)
    try:
        _Session(
            callbacks,
            mountpoint,
            raw_fi=True,
            foreground=True,
            encoding=sys.getfilesystemencoding(),
            errors="surrogateescape",
            default_permissions=True,
            **options,
        )
    except RuntimeError as e:
        if not callbacks.served:
            raise MountFailed(f"libfuse gave up ({e})") from e
        log.info("libfuse ended with %s, as it does at a signal", e)
    if callbacks.failure is not None:
        raise callbacks.failure


class _Callbacks(mfusepy.Operations):
    """The operations as mfusepy calls them: paths begin with ``/``, handles are numbers."""

    use_ns = True

    def __init__(self, tree: Tree, started: Callable[[], None], ended: Callable[[], None]) -> None:
        self.tree = tree
        self.served = False
        self.failure: Exception | None = None
        self._handles = tree.handles
        self._started = started
        self._ended = ended

    def init_with_config(self, connection: Any, config: Any) -> None:
        # Every path is looked up anew, so what is changed beside the mount shows at once. What a
        # lookup said of a file is believed for the moment in which the rest of the system call
        # would ask for it again.
        config.entry_timeout = config.negative_timeout = 0.0
        config.attr_timeout = ATTRIBUTE_SECONDS
        config.use_ino = 1
        config.nullpath_ok = 1  # handles know their paths, and a read takes no lock on one
        if _VERSION >= (3, 17):
            connection.want_ext &= ~(_KILLPRIV | _READDIRPLUS)
            connection.want_ext |= connection.capable_ext & (_POSIX_ACL | _DONT_MASK)
            # Without this it hears no more that a caller was sent a signal. It sends us one in
            # turn, which does nothing: whoever waits asks libfuse now and then.
            config.intr, config.intr_signal = 1, signal.SIGUSR2
        else:
            connection.want &= ~(_KILLPRIV | _READDIRPLUS)
            connection.want |= connection.capable & (_POSIX_ACL | _DONT_MASK)
        self._ask_for_passthrough(connection)
        self.served = True
        try:
            self._started()
        except Exception as e:  # noqa: BLE001  libfuse would go on without
            self.failure = e
            mfusepy.fuse_exit()

    def _ask_for_passthrough(self, connection: Any) -> None:
        reason = self.tree.passthrough.reason or libfuse.no_passthrough(_VERSION)
        if not reason and not connection.capable_ext & _PASSTHROUGH:
            reason = "this kernel was built without it"
        if reason:
            self.tree.passthrough.decline(reason)
            return
        connection.want_ext |= _PASSTHROUGH
        connection.max_backing_stack_depth = 1  # files of a disk; the mount itself can be stacked
        session = _get_session(_get_context().contents.fuse)
        self.tree.passthrough.offer(_get_descriptor(session))

    def destroy(self, path: str) -> None:
        self._ended()

    # Defined so that they are registered; _Session does them.

    def getattr(self, path: str, fh: Any = None) -> dict[str, Any]:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), path)

    read = write = lseek = rename = chmod = chown = truncate = utimens = getattr

    def readlink(self, path: str) -> str:
        return self.tree.readlink(path[1:])

    def mknod(self, path: str, mode: int, dev: int) -> None:
        self.tree.names.mknod(path[1:], mode, dev)

    def mkdir(self, path: str, mode: int) -> None:
        self.tree.names.mkdir(path[1:], mode)

    def unlink(self, path: str) -> None:
        self.tree.names.unlink(path[1:])

    def rmdir(self, path: str) -> None:
        self.tree.names.rmdir(path[1:])

    def symlink(self, target: str, source: str) -> None:
        self.tree.names.symlink(target[1:], source)

    def link(self, target: str, source: str) -> None:
        self.tree.names.link(source[1:], target[1:])

    def open(self, path: str, fi: Any) -> None:
        self._opened(self.tree.opening.open(path[1:], fi.flags), fi)

    def create(self, path: str, mode: int, fi: Any) -> None:
        self._opened(self.tree.opening.create(path[1:], mode, fi.flags), fi)

    def _opened(self, handle: Handle, fi: Any) -> None:
        fi.fh, passed = self.tree.opened(handle)
        fi.direct_io = handle.direct_io
        fi.keep_cache = handle.keep_cache
        if _VERSION >= (3, 11):
            fi.noflush = handle.noflush
        if passed is not None:
            backing_id = ctypes.c_int32.from_address(ctypes.addressof(fi) + _BACKING_ID)
            backing_id.value = passed.number

    def flush(self, path: str | None, fi: Any) -> None:
        handle = self._handles.get(fi.fh)
        if not isinstance(handle, Staged) or handle.is_closed_by(fi.lock_owner):
            handle.flush()

    def fsync(self, path: str | None, datasync: int, fi: Any) -> None:
        self._handles.get(fi.fh).fsync(data_only=bool(datasync))

    def release(self, path: str | None, fi: Any) -> None:
        self.tree.release(fi.fh)

    def fallocate(self, path: str | None, mode: int, offset: int, size: int, fi: Any) -> None:
        self._handles.get(fi.fh).fallocate(mode, offset, size)

    def opendir(self, path: str) -> int:
        return self._handles.add(self.tree.opening.open_directory(path[1:]))[0]

    def readdir(self, path: str | None, fh: int) -> Iterator[tuple[str, dict[str, int], int]]:
        for name, kind, ino in self.tree.entries(self._handles.get(fh)):
            yield name, {"st_mode": kind, "st_ino": ino}, 0

    def fsyncdir(self, path: str | None, datasync: int, fh: int) -> None:
        self._handles.get(fh).fsync(data_only=bool(datasync))

    def releasedir(self, path: str | None, fh: int) -> None:
        self.tree.release(fh)

    def statfs(self, path: str) -> dict[str, int]:
        found = self.tree.statfs()
        return {name: getattr(found, name) for name in dir(found) if name.startswith("f_")}

    def getxattr(self, path: str, name: str, position: int = 0) -> bytes:
        return self.tree.getxattr(path[1:], name)

    def listxattr(self, path: str) -> list[str]:
        return self.tree.listxattr(path[1:])

    def setxattr(self, path: str, name: str, value: bytes, options: int, position: int = 0) -> None:
        self.tree.setxattr(path[1:], name, value, options)

    def removexattr(self, path: str, name: str) -> None:
        self.tree.removexattr(path[1:], name)


class _Session(mfusepy.FUSE):
    """mfusepy's session, with the wrappers that are not enough replaced."""

    _known_threads: ClassVar[set[int]] = set()

    def _wrapper(self, function: Callable[..., Any], *args: Any) -> int:
        """Runs a callback; its error as libfuse wants it. Nothing may escape into C."""
        if _get_ident() not in self._known_threads:
            self._stay()
        try:
            return int(function(*args) or 0)
        except OSError as e:
            return -(e.errno or errno.EIO)
        except MemfsError as e:
            log.debug("%s: %s", function.__name__, e)
            return -e.errno
        except Exception:
            log.exception("%s failed", function.__name__)
            return -errno.EIO

    def _stay(self) -> None:
        """Python keeps what it knows of the calling thread, one of libfuse's, until the mount ends.

        Otherwise it makes that anew for every callback and throws it away, which takes longer than
        most callbacks do.
        """
        self._known_threads.add(_get_ident())
        if _THREADS_STAY:
            ctypes.pythonapi.PyGILState_Ensure()  # and no release: the next ensure finds it there

    def _path(self, raw: bytes) -> str:
        return raw[1:].decode(self.encoding, self.errors)

    def _handle(self, info: Any) -> Handle | None:
        return self._tree.handles.get(info.contents.fh) if info else None

    @property
    def _tree(self) -> Tree:
        tree: Tree = self.operations.tree
        return tree

    def _target(self, raw: bytes | None, info: Any) -> str:
        """The path that an operation on a path or an open file is for."""
        if raw is not None:
            return self._path(raw)
        handle = self._handle(info)
        if handle is None or handle.path is None:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return handle.path

    def getattr_fuse_3(self, raw: bytes | None, buffer: Any, info: Any) -> None:
        found = self._tree.open_status(info.contents.fh) if info else None
        if found is None:
            found = self._tree.status(self._target(raw, info))
        fill(buffer, found)

    def read(self, raw: bytes | None, buffer: Any, size: int, offset: int, info: Any) -> int:
        handle = self._tree.handles.get(info.contents.fh)
        return handle.read(_memory(buffer, size), offset)

    def write(self, raw: bytes | None, buffer: Any, size: int, offset: int, info: Any) -> int:
        handle = self._tree.handles.get(info.contents.fh)
        if isinstance(handle, Staged):
            handle.written_by(info.contents.lock_owner)
        return handle.write(_memory(buffer, size), offset)

    def lseek(self, raw: bytes | None, offset: int, whence: int, info: Any) -> int:
        return self._tree.handles.get(info.contents.fh).seek(offset, whence)

    def rename_fuse_3(self, old: bytes, new: bytes, flags: int) -> int:
        self._tree.names.rename(self._path(old), self._path(new), flags)
        return 0

    def chmod_fuse_3(self, raw: bytes | None, mode: int, info: Any) -> int:
        self._tree.chmod(self._target(raw, info), mode)
        return 0

    def chown_fuse_3(self, raw: bytes | None, uid: int, gid: int, info: Any) -> int:
        ids = [-1 if number == _UNCHANGED else number for number in (uid, gid)]
        self._tree.chown(self._target(raw, info), *ids)
        return 0

    def truncate_fuse_3(self, raw: bytes | None, length: int, info: Any) -> int:
        handle = self._handle(info)
        if handle is not None:
            handle.truncate(length)
        else:
            self._tree.truncate(self._target(raw, info), length)
        return 0

    def utimens_fuse_3(self, raw: bytes | None, times: Any, info: Any) -> int:
        accessed, modified = times.contents.actime, times.contents.modtime
        self._tree.utimens(
            self._target(raw, info),
            (accessed.tv_sec, accessed.tv_nsec),
            (modified.tv_sec, modified.tv_nsec),
        )
        return 0


def _interrupted() -> bool:
    return bool(_is_interrupted())


def _memory(pointer: Any, size: int) -> memoryview:
    """libfuse's own buffer, to be filled or written from without a copy."""
    address = ctypes.cast(pointer, ctypes.c_void_p).value or 0
    return memoryview((ctypes.c_char * size).from_address(address)).cast("B")
