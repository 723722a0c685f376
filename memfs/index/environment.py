"""One LMDB environment: transactions that grow the map, and errors in memfs's own words.

**Durability.** The environment is opened with ``sync=False``: a commit reaches the page cache, not
the disk, so a count written at every read costs microseconds. A process that is killed loses
nothing. A machine that stops may leave the file torn, and that is noticed: ``unclean`` beside the
data names the boot in which the environment was opened for writing, and is removed once ``close``
has flushed everything. Found again after a reboot, the index is not trusted; it is disposable, and
made again from the files.

**Threads.** Any thread. One lock is held for each transaction: LMDB's map may be grown only while
no transaction of this process is open, and under Python's own lock nothing is lost by it.
Transactions are short; nothing that waits runs in one. Other processes may read at the same time.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import stat
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import lmdb

from memfs.errors import IndexDamaged

T = TypeVar("T")
if TYPE_CHECKING:
    Txn: TypeAlias = lmdb.Transaction[bytes]

INITIAL_MAP = 64 << 20
"""Bytes of address space at first, doubled whenever it is full; the file is as long as it must."""
BATCH = 256
"""Records read in one transaction by what reads many."""
DATA, LOCK, UNCLEAN = "data.mdb", "lock.mdb", "unclean"

_PLAIN = (lmdb.KeyExistsError, lmdb.NotFoundError, lmdb.BadValsizeError)
"""Errors of the caller, not of the file: left as they are."""


class Environment:
    """An open environment and its named databases."""

    def __init__(
        self,
        directory: Path,
        databases: dict[str, bool],
        *,
        read_only: bool = False,
        map_size: int = INITIAL_MAP,
    ) -> None:
        """Opens it, or makes it where there is none and it may be written.

        Args:
            databases: names, each with whether one key may have several values.

        Raises:
            IndexDamaged: it is none, or not safe to open. Truncation is not found here, and
                may kill the process later: see ``check.sound``.
            OSError: the directory cannot be used.
        """
        self.directory = directory
        self.read_only = read_only
        self._databases = databases
        self._map_size = map_size
        self._lock = threading.RLock()
        self._closed = True
        self._exchanging = False
        self._open()

    def _open(self) -> None:
        _require_plain(self.directory)
        if not self.read_only:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._mark_unclean()
        with _own_errors():
            self._env = lmdb.open(
                os.fspath(self.directory),
                map_size=max(self._map_size, _data_size(self.directory)),
                mode=0o600,
                create=not self.read_only,
                readonly=self.read_only,
                sync=False,
                readahead=False,
                max_dbs=len(self._databases),
                max_readers=512,
            )
        try:
            with _own_errors():
                self._env.reader_check()  # slots of readers that were killed
                self.db = {
                    name: self._env.open_db(name.encode(), dupsort=dup, create=not self.read_only)
                    for name, dup in self._databases.items()
                }
        except BaseException as e:
            self._env.close()
            if isinstance(e, lmdb.NotFoundError):
                raise IndexDamaged("a database is missing") from e
            raise
        self._closed = self._exchanging = False

    def read(self, body: Callable[[Txn], T]) -> T:
        """What ``body`` returns within a read transaction."""
        return self._run(body, write=False)

    def write(self, body: Callable[[Txn], T]) -> T:
        """What ``body`` returns within a write transaction, which is committed after it.

        ``body`` may be run again where the map was full. Raises OSError for a full disk: nothing of
        the transaction is then kept, and the environment goes on.
        """
        return self._run(body, write=True)

    def pairs(self, name: str, start: bytes, stem: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        """Keys and values from ``start`` on whose keys begin with ``stem``, in order of the keys.

        Read some hundred at a time, so no transaction is open while the caller works, and what
        changes meanwhile may or may not be seen. Not for a database of several values a key.
        """
        while True:
            batch = self.read(partial(self.slice, name=name, start=start, stem=stem, limit=BATCH))
            yield from batch
            if len(batch) < BATCH:
                return
            if batch[-1][0] < start:
                raise IndexDamaged(f"the keys of {name} are out of order")
            start = batch[-1][0] + b"\0"

    def slice(
        self, txn: Txn, name: str, start: bytes, stem: bytes, limit: int | None = None
    ) -> list[tuple[bytes, bytes]]:
        """The first of what ``pairs`` gives, within a transaction."""
        with txn.cursor(self.db[name]) as cursor:
            if not (cursor.set_range(start) if start else cursor.first()):
                return []
            beginning = itertools.takewhile(lambda item: item[0].startswith(stem), cursor)
            return list(itertools.islice(beginning, limit))

    def entries(self, name: str) -> int:
        """How many keys (or values, of several a key) a database has."""
        return self.read(lambda txn: int(txn.stat(self.db[name])["entries"]))

    def walk_pages(self) -> None:
        """Reads every page there is and raises IndexDamaged where the tree does not add up."""
        with open(os.devnull, "wb") as nowhere, self._lock, _own_errors():
            self._require_open()
            self._env.copyfd(nowhere.fileno(), compact=True)

    def sync(self) -> None:
        """Flushes everything committed to the disk."""
        with self._lock, _own_errors():
            self._require_open()
            self._env.sync(True)

    def close(self) -> None:
        """Flushes and closes. Closing twice is allowed; anything else is then EBADF."""
        with self._lock:
            self._exchanging = False
            if self._closed:
                return
            if not self.read_only:
                try:
                    self.sync()
                    (self.directory / UNCLEAN).unlink(missing_ok=True)
                except (OSError, IndexDamaged):
                    pass  # it stays marked: not trusted after a reboot
            self._closed = True
            self._env.close()

    @contextlib.contextmanager
    def exchanged(self) -> Iterator[None]:
        """Closes it while the block puts other files in its place, and opens those.

        Every other thread waits. Where they cannot be opened (the disk is full), that raises, and
        is tried again at each use.
        """
        with self._lock:
            self.close()
            self._exchanging = True
            try:
                yield
            finally:
                self._open()

    def _run(self, body: Callable[[Txn], T], *, write: bool) -> T:
        with self._lock:
            self._require_open()
            while True:
                try:
                    with _own_errors(), self._env.begin(write=write) as txn:
                        return body(txn)
                except _Full:
                    with _own_errors():
                        self._env.set_mapsize(2 * int(self._env.info()["map_size"]))
                except _Resized:
                    with _own_errors():
                        self._env.set_mapsize(0)  # as large as another process made it

    def _require_open(self) -> None:
        if self._exchanging:
            self._open()
        if self._closed:
            raise OSError(errno.EBADF, "it is closed", "index")

    def _mark_unclean(self) -> None:
        (self.directory / UNCLEAN).unlink(missing_ok=True)  # it may be another user's
        fd = os.open(
            self.directory / UNCLEAN,
            os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC,
            0o600,
        )
        try:
            os.write(fd, boot_id().encode())
            os.fsync(fd)
        finally:
            os.close(fd)
        sync_directory(self.directory)


class _Full(Exception):
    """The map is full."""


class _Resized(Exception):
    """Another process made the map larger."""


@contextlib.contextmanager
def _own_errors() -> Iterator[None]:
    """LMDB's errors as IndexDamaged, or as OSError where the system refused something."""
    try:
        yield
    except lmdb.MapFullError as e:
        raise _Full from e
    except lmdb.MapResizedError as e:
        raise _Resized from e
    except _PLAIN:
        raise
    except lmdb.ReadersFullError as e:
        raise OSError(errno.EAGAIN, "too many readers", "index") from e
    except lmdb.Error as e:
        if 0 < e.code < 200:  # an errno; LMDB's own codes are negative
            raise OSError(e.code, os.strerror(e.code), "index") from e
        raise IndexDamaged(str(e)) from e


def batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """``items`` in lists of ``size``; the last may be shorter."""
    rest = iter(items)
    while batch := list(itertools.islice(rest, size)):
        yield batch


def sync_directory(directory: Path) -> None:
    """Flushes the names in a directory to the disk."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def boot_id() -> str:
    """Names this run of the kernel; "" where it does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def torn(directory: Path) -> bool:
    """Whether the machine stopped while the environment was open for writing."""
    try:
        found = (directory / UNCLEAN).read_text()
    except FileNotFoundError:
        return False
    except (OSError, UnicodeDecodeError):
        return True
    return not found or found != boot_id()


def _require_plain(directory: Path) -> None:
    """A store from elsewhere may carry an index of symlinks: LMDB is given plain files only."""
    try:
        if not stat.S_ISDIR(os.lstat(directory).st_mode):
            raise IndexDamaged(f"{directory} is not a directory")
    except FileNotFoundError:
        return
    for name in (DATA, LOCK, UNCLEAN):
        try:
            found = os.lstat(directory / name)
        except FileNotFoundError:
            continue
        if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
            raise IndexDamaged(f"{directory / name} is not a plain file")


def _data_size(directory: Path) -> int:
    try:
        return os.stat(directory / DATA).st_size
    except FileNotFoundError:
        return 0
