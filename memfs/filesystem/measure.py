"""What a directory of files can do: the measures of ``memfs bench fs``, the same for a plain
directory, a C FUSE program's mount of it and memfs's.

Every measure takes the place it is taken in and the number of the run, and gives one number. Files
are looked at by name from an open directory, and each file by one run alone, so that no arm answers
from what it was asked before. Used by the command; one thread.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import struct
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from memfs.cube import layout

BLOCK = 1 << 20
BLOB_BYTES = 256 << 20
WRITE_BYTES = 256 << 20
SLICE = 1000
"""Files that one run looks at, opens or makes."""

_BLOB = f"cube/{layout.KV}"
_SMALL, _PLAIN, _CUBES = "small", "plain", "cubes"
_DROP_CACHES = "/proc/sys/vm/drop_caches"


@dataclass(frozen=True)
class Place:
    """A directory to measure."""

    root: Path
    """Where its files are seen."""
    store: Path
    """Where they lie on the disk."""


def prepare(store: Path, files: int, runs: int) -> None:
    """Makes the files that are measured, on the disk.

    Args:
        files: how many a walk finds in plain directories, and again in cubes (three in each).
    """
    blob = store / _BLOB
    blob.parent.mkdir()
    (blob.parent / layout.PAYLOAD).write_text("A text.\n")
    with blob.open("wb") as file:
        file.write(struct.pack("<Q", 2) + b"{}")
        for _ in range(BLOB_BYTES // BLOCK):
            file.write(os.urandom(BLOCK))
        os.fsync(file.fileno())
    for number in range(2 * runs):
        directory = store / _SMALL / str(number)
        directory.mkdir(parents=True)
        for name in range(SLICE):
            (directory / str(name)).touch()
    for number in range(files):
        directory = store / _PLAIN / str(number // SLICE)
        if number % SLICE == 0:
            directory.mkdir(parents=True)
        (directory / str(number)).touch()
    for number in range(files // 3):
        directory = store / _CUBES / str(number // SLICE) / f"cube-{number}"
        directory.mkdir(parents=True)
        (directory / layout.PAYLOAD).write_text("A text.\n")
        (directory / layout.META).write_text("{}")
        (directory / "notes").touch()
    os.sync()


def can_drop_caches() -> bool:
    """Whether the kernel's directory cache may be emptied, which cold walks need."""
    return os.access(_DROP_CACHES, os.W_OK)


def blob_warm(place: Place, run: int) -> float:  # noqa: ARG001  every measure takes both
    """MB/s of a blob that is in the page cache."""
    _read(place.root / _BLOB)
    return statistics.median(_read(place.root / _BLOB) for _ in range(5))


def blob_cold(place: Place, run: int) -> float:  # noqa: ARG001
    """MB/s of a blob that is not."""
    _forget(place)
    return _read(place.root / _BLOB)


def copies(place: Place, run: int) -> float:  # noqa: ARG001
    """How often a blob is in memory once it was read, by what the page cache has grown."""
    _forget(place)
    before = _cached()
    _read(place.root / _BLOB)
    return max(0, _cached() - before) / BLOB_BYTES


def walk_plain(place: Place, run: int) -> float:  # noqa: ARG001
    """Seconds in which ``find`` sees every file in plain directories, nothing cached."""
    return _find(place.root / _PLAIN)


def walk_cubes(place: Place, run: int) -> float:  # noqa: ARG001
    """The same in cubes of three files each."""
    return _find(place.root / _CUBES)


def getattr_(place: Place, run: int) -> float:
    """Microseconds of a ``stat``."""
    with _directory(place.root / _SMALL / str(2 * run)) as fd:
        began = time.perf_counter()
        for name in range(SLICE):
            os.stat(str(name), dir_fd=fd)
        return (time.perf_counter() - began) / SLICE * 1e6


def open_close(place: Place, run: int) -> float:
    """Microseconds of an ``open`` for reading and a ``close``, the lookup of the name included."""
    with _directory(place.root / _SMALL / str(2 * run + 1)) as fd:
        began = time.perf_counter()
        for name in range(SLICE):
            os.close(os.open(str(name), os.O_RDONLY, dir_fd=fd))
        return (time.perf_counter() - began) / SLICE * 1e6


def write(place: Place, run: int) -> float:
    """MB/s of a new file, written 1 MiB at a time."""
    path, block = place.root / f"written-{run}", os.urandom(BLOCK)
    began = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for _ in range(WRITE_BYTES // BLOCK):
            file.write(block)
    rate = WRITE_BYTES / 1e6 / (time.perf_counter() - began)
    path.unlink()
    return rate


def create(place: Place, run: int) -> float:
    """Files made in a second."""
    path = place.root / f"made-{run}"
    path.mkdir()
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    with _directory(path) as fd:
        began = time.perf_counter()
        for name in range(SLICE):
            os.close(os.open(str(name), flags, 0o644, dir_fd=fd))
        rate = SLICE / (time.perf_counter() - began)
        for name in range(SLICE):
            os.unlink(str(name), dir_fd=fd)
    path.rmdir()
    return rate


@contextlib.contextmanager
def _directory(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield fd
    finally:
        os.close(fd)


def _read(path: Path) -> float:
    buffer = bytearray(BLOCK)
    fd = os.open(path, os.O_RDONLY)
    try:
        began, done = time.perf_counter(), 0
        while count := os.readv(fd, [buffer]):
            done += count
        return done / 1e6 / (time.perf_counter() - began)
    finally:
        os.close(fd)


def _forget(place: Place) -> None:
    """The kernel forgets the blob's pages, those of the mount and those of the disk."""
    for root in {place.root, place.store}:
        fd = os.open(root / _BLOB, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def _cached() -> int:
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("Cached:"))


def _find(path: Path) -> float:
    if can_drop_caches():
        with open(_DROP_CACHES, "w") as file:
            file.write("2")
    began = time.perf_counter()
    subprocess.run(["find", path, "-name", "nothing"], check=True)
    return time.perf_counter() - began
