"""Writing the audit trail: one event is one ``write`` at the end of a file.

One process writes, under the store's lock: the mount, or a command while there is none. A thread
flushes what was written to the disk within a second, and then says so in ``head``. A process that
is killed loses nothing; a machine that stops may lose that second. Any thread.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from memfs.cube import layout
from memfs.vault.publish import publish_bytes
from memfs.vault.store import Store, give_to_owner
from memfs.vault.trail.records import (
    HEAD,
    START,
    TRAIL,
    Head,
    Link,
    lines_of,
    list_files,
    name_of,
    parse,
    read_head,
    render,
)

log = logging.getLogger(__name__)

FILE_BYTES = 4 << 20
"""A file that is longer is followed by a new one."""
KEEP_FILES = 16
"""Files kept, together some 200,000 events; the oldest are dropped whole."""
SYNC_SECONDS = 1.0

_OWN = frozenset({"seq", "prev", "hash"})


class Trail:
    """The trail of one store, open to be written."""

    def __init__(self, store: Store) -> None:
        """Opens it, or makes it. The caller holds the store's lock.

        What a crash left is put right here, and the trail itself says so: half a line is cut off;
        after anything worse a new file is begun, and what is there stays as evidence.
        """
        self._store = store
        self._lock = threading.Lock()  # the file, its end, and the last line
        self._head_lock = threading.Lock()
        self._head_seq = 0
        self._dirty = threading.Event()
        self._closing = threading.Event()
        self._lost = 0
        _prepare_directory(store)
        head = read_head(store)
        self._dropped = head.dropped if head else START
        self._last, self._file, self._size, found = _resume(store, head, list_files(store))
        self._fd = self._open(self._file)
        if head is None:
            self._write_head(self._head())  # from here on, one that is missing was taken away
        for what in found:
            self.append({"event": "trail", "what": what})
        self._thread = threading.Thread(target=self._flush_all, name="trail", daemon=True)
        self._thread.start()

    def append(self, event: Mapping[str, Any]) -> int:
        """Adds an event, with the time where it has none; its number.

        One that cannot be written (the disk is full) does not fail what it tells of: it is counted,
        and the count is written as soon as there is room. Its number is then 0, as it is after
        ``close``.
        """
        with self._lock:
            if self._fd < 0:
                return 0
            try:
                if self._lost:
                    self._write({"event": "trail", "what": f"{self._lost} events were lost"})
                    self._lost = 0
                return self._write(event)
            except OSError as e:
                if not self._lost:
                    log.warning("the audit trail cannot be written: %s", e.strerror)
                self._lost += 1
                return 0

    def close(self) -> None:
        """Flushes it to the disk. Nothing is appended any more."""
        self._closing.set()
        self._dirty.set()
        self._thread.join()
        with self._lock:
            fd, self._fd = self._fd, -1
        os.close(fd)

    def __enter__(self) -> Trail:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self, event: Mapping[str, Any]) -> int:
        seq = self._last.seq + 1
        content = {name: value for name, value in event.items() if name not in _OWN}
        when = content.pop("time", None) or round(time.time(), 6)
        line, digest = render(seq, when, content, self._last.hash)
        if self._size and self._size + len(line) > FILE_BYTES:
            self._next_file(seq)
        if os.write(self._fd, line) != len(line):
            os.ftruncate(self._fd, self._size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._last = Link(seq, digest)
        self._size += len(line)
        self._dirty.set()
        return seq

    def _next_file(self, seq: int) -> None:
        os.fdatasync(self._fd)
        fd = self._open(seq)
        os.close(self._fd)
        self._fd, self._file, self._size = fd, seq, 0
        files = list_files(self._store)
        surplus, kept = files[:-KEEP_FILES], files[-KEEP_FILES:]
        if surplus:
            first = parse(next(iter(lines_of(self._store, kept[0])), b""))
            prev = first["prev"] if first else self._last.hash
            # The head first: a crash between leaves a file more, and none less than it says.
            self._dropped = Link(kept[0] - 1, prev)
        self._write_head(self._head())
        if surplus:
            _remove(self._store, surplus)

    def _open(self, number: int) -> int:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        fd = self._store.open_file(name_of(number), flags, 0o600)
        give_to_owner(self._store, fd)
        return fd

    def _flush_all(self) -> None:
        while True:
            self._dirty.wait()
            self._closing.wait(SYNC_SECONDS)
            closing = self._closing.is_set()
            self._dirty.clear()
            with self._lock:
                fd, head = os.dup(self._fd), self._head()
            try:
                os.fdatasync(fd)  # outside the lock: no event waits for the disk
                self._write_head(head)
            except OSError as e:
                log.warning("the audit trail cannot be flushed: %s", e.strerror)
            finally:
                os.close(fd)
            if closing:
                return

    def _head(self) -> Head:
        return Head(*self._last, self._file, self._size, *self._dropped)

    def _write_head(self, head: Head) -> None:
        with self._head_lock:
            if head.seq >= self._head_seq:  # else a new file was begun meanwhile
                publish_bytes(self._store, HEAD, json.dumps(asdict(head)).encode(), like=TRAIL)
                self._head_seq = head.seq


def _resume(store: Store, head: Head | None, files: list[int]) -> tuple[Link, int, int, list[str]]:
    """The last line; the file to go on with, and its size; what must be said of how it was found.

    Lines that are not in the head yet were written after its last flush.
    """
    last, found = head.last if head else START, [] if head or not files else ["head was missing"]
    if not files:
        return last, last.seq + 1, 0, ["its files are gone"] if last.seq else []
    if head and head.file in files:
        file, size = head.file, head.size
    else:
        last, file, size = Link(files[-1] - 1, ""), files[-1], 0
        found += ["the file that its head names is gone"] if head else []
    rest = b""
    for number in files[files.index(file) :]:
        if rest:
            break  # an end like this can only be the last
        file, size = number, size if number == file else 0
        end, last, rest = _follow(store, number, size, last)
        size += end
    torn = rest.strip(b"\0")
    if file == files[-1] and b"\n" not in torn and last.hash:
        if rest:
            _cut(store, file, size)
            found.append(f"{len(rest)} bytes of an unfinished line were cut off")
        return last, file, size, found
    found.append(f"it is damaged after line {last.seq}")
    last = Link(max(last.seq, files[-1]), last.hash or START.hash)
    return last, last.seq + 1, 0, found


def _follow(store: Store, number: int, start: int, last: Link) -> tuple[int, Link, bytes]:
    """How many bytes of a file, from ``start`` on, are lines that continue the chain from ``last``.

    Gives the last of them, and what follows. Where ``last`` has no hash, any first line does.
    """
    fd = store.open_regular(name_of(number))
    with os.fdopen(fd, "rb") as file:
        file.seek(start)
        data = file.read()
        if os.fstat(fd).st_size < start:
            return 0, last, b"\n"  # it ends before: nothing can follow here
    end = 0
    while (newline := data.find(b"\n", end)) >= 0:
        event = parse(data[end:newline])
        if event is None or event["seq"] != last.seq + 1 or last.hash not in ("", event["prev"]):
            break
        last, end = Link(event["seq"], event["hash"]), newline + 1
    return end, last, data[end:]


def _prepare_directory(store: Store) -> None:
    """Makes the directory; clears from it what a crash left of a head."""
    control = store.open_dir(layout.CONTROL)
    try:
        os.mkdir(layout.split(TRAIL)[1], 0o700, dir_fd=control)
    except FileExistsError:
        pass
    finally:
        os.close(control)
    with store.opened(TRAIL) as fd:
        give_to_owner(store, fd)
        for name in filter(layout.is_temporary, os.listdir(fd)):
            os.unlink(name, dir_fd=fd)


def _remove(store: Store, files: list[int]) -> None:
    with store.opened(TRAIL) as directory:
        for number in files:
            os.unlink(layout.split(name_of(number))[1], dir_fd=directory)


def _cut(store: Store, number: int, size: int) -> None:
    fd = store.open_regular(name_of(number), os.O_WRONLY)
    try:
        os.ftruncate(fd, size)
    finally:
        os.close(fd)
