"""Watching the store for changes made beside the mount: git pull, rsync, an editor.

The kernel's events come through watchdog. They are gathered until the store is quiet for a moment
and handed on as a set of directories. Events can be lost, where the kernel's queue overflows or
there are more directories than it will watch: everything has to be looked at then. Used by the
mount. Both callbacks run in the watcher's own thread; while one runs, further events are gathered.

What passes through the mount raises events too, and each that is handled takes the interpreter from
the threads that serve files. So of a write nothing is heard before the file is closed, the queue is
read a few times a second only, and of what happened to the files of one directory since, one event
is handled.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator

from watchdog.events import (
    DirCreatedEvent,
    DirDeletedEvent,
    DirMovedEvent,
    FileAttribEvent,
    FileClosedEvent,
    FileCreatedEvent,
    FileDeletedEvent,
    FileMovedEvent,
    FileSystemEvent,
    FileSystemEventHandler,
)
from watchdog.observers.api import BaseObserver
from watchdog.observers.inotify import InotifyEmitter, InotifyWatchGroup
from watchdog.observers.inotify_c import (
    CallbackId,
    InotifyConstants,
    InotifyEvent,
    InotifyFD,
    Mask,
    WatchCallback,
    WatchDescriptor,
)

from memfs.cube import layout
from memfs.errors import MemfsError
from memfs.vault.store import Store

log = logging.getLogger(__name__)

QUIET_S, LONGEST_S = 0.2, 1.0
"""Events are handed on once none came for so long, and after so long in any case."""
READ_S = 0.05
"""How long events are left in the kernel's queue after it was read."""
RESCAN_S = 15.0
"""How often all is looked at where not everything can be watched."""
RESCAN_SHARE = 5
"""Looking at everything takes at most one part in so many of the watcher's time."""

_EVENTS: list[type[FileSystemEvent]] = [
    DirCreatedEvent,
    DirDeletedEvent,
    DirMovedEvent,
    FileAttribEvent,
    FileClosedEvent,
    FileCreatedEvent,
    FileDeletedEvent,
    FileMovedEvent,
]
_MASK = Mask(
    InotifyConstants.IN_CREATE
    | InotifyConstants.IN_DELETE
    | InotifyConstants.IN_MOVE
    | InotifyConstants.IN_CLOSE_WRITE
    | InotifyConstants.IN_ATTRIB
    | InotifyConstants.IN_DELETE_SELF
    | InotifyConstants.IN_ONLYDIR
    | InotifyConstants.IN_EXCL_UNLINK
)
_WHOLE = InotifyConstants.IN_ISDIR | InotifyConstants.IN_IGNORED | InotifyConstants.IN_Q_OVERFLOW
"""Events that are about more than a file in a directory."""


class Watcher(FileSystemEventHandler):
    """Watches one store from ``start`` to ``stop``."""

    def __init__(
        self, store: Store, on_paths: Callable[[set[str]], None], on_lost: Callable[[], None]
    ) -> None:
        """Nothing happens yet.

        Args:
            on_paths: given the directories in which something changed, and those that came or went:
                cubes, collections, and what is gone by now.
            on_lost: called where anything may have changed; returns once all was looked at. Also
                called once, when watching has begun, for what was changed before.
        """
        self._root = os.path.join(store.root, "")  # ends in a slash
        self._on_paths = on_paths
        self._on_lost = on_lost
        self._thread = threading.Thread(target=self._run, name="watcher", daemon=True)
        self._wake = threading.Condition()
        self._paths: set[str] = set()
        self._lost = True
        self._not_before = self._again = 0.0
        self._first = self._last = 0.0  # when the first and the last of what is gathered came
        self._unwatched = False  # whether there is something that no event will tell of
        self._stopping = False

    def start(self) -> None:
        """Begins in the background: setting up many thousand watches takes seconds."""
        self._thread.start()

    def stop(self) -> None:
        """Ends watching: no callback runs any more once it returns."""
        with self._wake:
            self._stopping = True
            self._wake.notify_all()
        if self._thread.ident is not None:
            self._thread.join()

    def on_any_event(self, event: FileSystemEvent) -> None:
        """Called by watchdog, in a thread of its own."""
        for path in (event.src_path, event.dest_path):
            if path:
                self._gather(os.fsdecode(path), is_directory=event.is_directory)

    def _gather(self, path: str, *, is_directory: bool) -> None:
        if not path.startswith(self._root):
            return
        relative = path[len(self._root) :]
        parent, _ = layout.split(relative)
        if layout.is_temporary(relative) or relative.split("/", 1)[0] == layout.CONTROL:
            return
        found = {parent} | ({relative} if is_directory else set())
        holder, last = layout.split(parent)
        if last == layout.ADAPTER:
            found.add(holder)
        found.discard("")
        if found:
            with self._wake:
                self._paths |= found
                self._stamp()

    def _lose(self) -> None:
        with self._wake:
            self._lost = True
            self._stamp()

    def _stamp(self) -> None:
        """Something came; the lock is held."""
        self._last = time.monotonic()
        self._first = self._first or self._last
        self._wake.notify_all()

    def _limit(self) -> None:
        """A directory cannot be watched."""
        if not self._unwatched:
            log.warning(
                "%s has more directories than fs.inotify.max_user_watches allows to watch:"
                " changes beside the mount are seen within a minute or so",
                self._root,
            )
        self._unwatched = True

    def _run(self) -> None:
        # A directory that was moved out of the store and back is still being watched; that is well.
        warnings.filterwarnings("ignore", "Callback with id .* already exists", RuntimeWarning)
        notifier = observer = None
        try:
            notifier = _Notifier(self._root, self._lose, self._limit, lambda: self._stopping)
            notifier.start()
            observer = BaseObserver(_Emitter, inotify_fd=notifier)
            observer.schedule(self, self._root, recursive=True, event_filter=_EVENTS)
            observer.start()
        except OSError as e:
            self._unwatched = True
            if not self._stopping:
                log.warning("%s cannot be watched: %s", self._root, e.strerror)
        try:
            while (due := self._await(notifier)) is not None:
                self._call_back(due)
        finally:
            if notifier is not None:
                # Where two directories were exchanged, watchdog has lost track of one.
                with contextlib.suppress(KeyError):
                    notifier.stop()
                notifier.join()
            if observer is not None and observer.is_alive():
                observer.stop()
                observer.join()

    def _await(self, notifier: threading.Thread | None) -> set[str] | None:
        """What is due, once something is: paths, none of them for everything; None to end."""
        with self._wake:
            while not self._stopping:
                now = time.monotonic()
                if notifier is not None and not notifier.is_alive():
                    self._unwatched = True
                if self._unwatched and now >= self._again:
                    self._lost = True
                quiet_at = min(self._last + QUIET_S, self._first + LONGEST_S) if self._first else 0
                lost_at = max(quiet_at, self._not_before) if self._lost else math.inf
                if now >= lost_at:
                    self._lost, self._first, self._paths = False, 0.0, set()
                    return set()
                if self._paths and now >= quiet_at:
                    paths, self._paths, self._first = self._paths, set(), 0.0
                    return paths
                due = min(lost_at, quiet_at if self._paths else math.inf, now + RESCAN_S)
                self._wake.wait(due - now)
        return None

    def _call_back(self, paths: set[str]) -> None:
        began = time.monotonic()
        try:
            if paths:
                self._on_paths(paths)
            else:
                self._on_lost()
        except (OSError, MemfsError) as e:
            log.warning("%s: changes beside the mount were not taken in: %s", self._root, e)
        if not paths:
            now = time.monotonic()
            self._not_before = now + max(1.0, (now - began) * RESCAN_SHARE)
            self._again = now + max(RESCAN_S, (now - began) * RESCAN_SHARE)


class _Notifier(InotifyFD):
    """The kernel's queue, which tells of what watchdog itself passes over in silence."""

    def __init__(
        self,
        root: str,
        on_overflow: Callable[[], None],
        on_limit: Callable[[], None],
        stopping: Callable[[], bool],
    ) -> None:
        super().__init__()
        self._stopping = stopping
        self._control = os.fsencode(os.path.join(root, layout.CONTROL))
        self._on_overflow = on_overflow
        self._on_limit = on_limit

    def add_callback(
        self, path: bytes, mask: Mask, callback: WatchCallback, id_: CallbackId
    ) -> WatchDescriptor:
        """Watches one directory. An error leaves out that directory alone, but for the root."""
        if path == self._control or path.startswith(self._control + b"/"):
            raise FileNotFoundError(errno.ENOENT, "memfs's own", path)  # the index writes there
        if layout.is_temporary(os.fsdecode(path)):
            raise FileNotFoundError(errno.ENOENT, "not published yet", path)
        if self._stopping():
            raise InterruptedError(errno.EINTR, "stopping", path)  # the rest need not be watched
        try:
            return super().add_callback(path, mask, callback, id_)
        except OSError as e:
            if e.errno == errno.ENOSPC:
                self._on_limit()
            raise

    def read_events(self, **options: int) -> list[InotifyEvent]:
        """What came since it was last asked; of the files in a directory, what came first."""
        self.stopped_event.wait(READ_S)
        found, directories = [], set()
        for event in super().read_events(**options):
            if event.name and not event.mask & _WHOLE:
                if event.wd in directories or layout.is_temporary(os.fsdecode(event.name)):
                    continue
                directories.add(event.wd)
            found.append(event)
        return found

    def handle_event(self, event: InotifyEvent) -> None:
        """One event of the queue."""
        lost = event.is_queue_overflow
        try:
            super().handle_event(event)
        except KeyError:
            lost = True  # of two directories that were exchanged, watchdog has lost track of one
        if lost:
            self._on_overflow()  # after watchdog has watched what was made meanwhile


class _Group(InotifyWatchGroup):
    """The watches below the root, found by a walk that follows no symlink: see ``_walk``."""

    def _add_all_callbacks(self, path: bytes) -> None:
        for directory, _, _ in _walk(path):
            self._add_callback(directory)

    def _recursive_simulate(self, src_path: bytes) -> list[InotifyEvent]:
        """Events for what was in a new directory already when its watch began."""
        events = []
        made, of_directory = InotifyConstants.IN_CREATE, InotifyConstants.IN_ISDIR
        for directory, directories, files in _walk(src_path):
            watch = self._active_callbacks_by_path.get(directory)
            if watch is not None:
                events += [
                    InotifyEvent(watch, Mask(made | of_directory), 0, n) for n in directories
                ]
                events += [InotifyEvent(watch, made, 0, name) for name in files]
        return events


def _walk(top: bytes) -> Iterator[tuple[bytes, list[bytes], list[bytes]]]:
    """Each directory from ``top`` down with the names of its directories and of all else in it.

    ``os.walk`` asks of each symlink whether a directory is behind it, even where it follows none:
    the symlink's access time changes, and one that leads into the mount makes the watcher wait.
    """
    pending = [top]
    while pending:
        path = pending.pop()
        directories: list[bytes] = []
        others: list[bytes] = []
        with contextlib.suppress(OSError), _opened(path) as fd, os.scandir(fd) as entries:
            for entry in entries:
                kind = directories if entry.is_dir(follow_symlinks=False) else others
                kind.append(os.fsencode(entry.name))
        yield path, directories, others
        pending += [os.path.join(path, name) for name in directories]


@contextlib.contextmanager
def _opened(path: bytes) -> Iterator[int]:
    """A directory to be listed. Its access time is its users': who makes one may set it at once."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
    try:
        fd = os.open(path, flags | os.O_NOATIME)
    except PermissionError:  # the kernel gives O_NOATIME only to the owner
        fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


class _Emitter(InotifyEmitter):
    """Asks the kernel for the events that are used, and no others."""

    def on_thread_start(self) -> None:
        self._inotify = _Group(
            self._inotify_fd,
            os.fsencode(self.watch.path),
            is_recursive=True,
            event_mask=self.get_event_mask_from_filter(),
        )

    def get_event_mask_from_filter(self) -> Mask:
        return _MASK
