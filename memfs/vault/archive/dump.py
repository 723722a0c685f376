"""Writing an archive of cubes: what travels of each, and the file that follows from it.

Files are opened without changing their access times: through a mount that is no read of a memory,
so nothing is mounted, made or counted by it. Each is read twice, for SHA256SUMS stands in front; if
it was changed in between, the dump fails and says so. Used by ``memfs dump``; any thread.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import BinaryIO

from memfs.cube import layout, metadata, redact
from memfs.errors import InvalidRequest, MemfsError, NotACube, NotAllowed
from memfs.vault.archive import contents
from memfs.vault.archive.check import CHUNK
from memfs.vault.archive.contents import Entry, PackedCube
from memfs.vault.store import Store, open_regular_at

MAX_CONFIG = 1 << 20
_ADAPTER_CONFIG = f"{layout.ADAPTER}/{layout.ADAPTER_CONFIG}"
_MEMORIES = frozenset(
    {
        layout.PAYLOAD,
        layout.KV,
        layout.META,
        layout.ADAPTER,
        _ADAPTER_CONFIG,
        f"{layout.ADAPTER}/{layout.ADAPTER_WEIGHTS}",
    }
)
"""All that travels of a redacted cube: nobody has looked at what else lies beside it."""


@dataclass(frozen=True)
class Source:
    """A cube to be dumped: its path in an open store, or in the mount of one."""

    store: Store
    path: str


@dataclass(frozen=True)
class Choice:
    """What is to travel."""

    redacted: bool = False
    text_only: bool = False


class Dump:
    """The cubes as they are found, each file of theirs read once; ``write`` writes the archive."""

    def __init__(
        self, sources: Sequence[Source], choice: Choice, progress: Callable[[int], None]
    ) -> None:
        """Reads everything.

        Args:
            progress: told of the bytes read so far.

        Raises:
            NotACube, InvalidMetadata: one cannot be dumped.
            InvalidRequest: two have one name, or a name cannot be in an archive.
            NotAllowed: redacted, and too sensitive for that.
            OSError: a file cannot be read.
        """
        self.left_out: list[str] = []
        """Links and the like, which no archive has, by their path in it."""
        self._choice = choice
        self._progress = progress
        self._done = 0
        self._sources: dict[str, Source] = {}
        self._made: dict[str, bytes] = {}
        """What does not travel as it is on the disk, by its path in the archive."""
        self._digests: list[tuple[str, str]] = []
        for source in sources:
            other = self._sources.setdefault(source.path, source)
            if other.store.root != source.store.root:
                raise InvalidRequest(
                    f"two cubes are called {source.path!r}, in {other.store.root} and in"
                    f" {source.store.root}: dump them one at a time"
                )
        self.cubes = [
            self._pack(self._sources[p]) for p in sorted(self._sources, key=contents.order)
        ]
        if sum(len(cube.entries) for cube in self.cubes) > contents.MAX_MEMBERS:
            raise InvalidRequest(f"more than {contents.MAX_MEMBERS:,} files: dump them in parts")

    def write(self, out: BinaryIO, sign: Callable[[bytes], bytes] | None) -> int:
        """Writes the archive; its bytes.

        Args:
            sign: makes the signature of SHA256SUMS.

        Raises:
            MemfsError: a file is not what it was when it was read first; the output is worthless.
        """
        manifest = contents.manifest_bytes(
            self.cubes, redacted=self._choice.redacted, text_only=self._choice.text_only
        )
        listed = (contents.MANIFEST, hashlib.sha256(manifest).hexdigest())
        sums = contents.sums_bytes([listed, *self._digests])
        lists = {contents.SUMS: sums}
        if sign is not None:
            lists[contents.SIGNATURE] = sign(sums)
        lists[contents.MANIFEST] = manifest
        size = 0
        for name, data in lists.items():
            size += _put(out, contents.member_header(name, size=len(data)))
            size += _put(out, data, contents.padding(len(data)))
        digests = dict(self._digests)
        for cube, entry, path in contents.members(self.cubes):
            header = contents.member_header(
                path, size=entry.size, mode=entry.mode, mtime_ns=entry.mtime_ns
            )
            size += _put(out, header)
            if entry.size is not None:
                self._copy(self._sources[cube.path], entry, path, digests[path], out)
                size += entry.size + _put(out, contents.padding(entry.size))
        return size + _put(out, contents.ending(size))

    def _pack(self, source: Source) -> PackedCube:
        try:
            directory = source.store.open_dir(source.path)
        except (FileNotFoundError, NotADirectoryError):
            raise NotACube(source.path) from None
        try:
            if not layout.is_cube(os.listdir(directory)):
                raise NotACube(f"{source.path} is a collection: name the cubes in it")
            found = sorted(self._found(source, directory, ""), key=lambda e: contents.order(e.name))
        finally:
            os.close(directory)
        for entry in found:
            path = layout.join(source.path, entry.name) if entry.name else source.path
            reason = contents.wrong_with(path)
            if reason is not None or path in contents.LISTS:
                reason = reason or "is what a list of the archive is called"
                raise InvalidRequest(f"{path!r} {reason}: rename it, to dump the cube")
        cube_id = self._require_meta(source) if any(e.name == layout.META for e in found) else None
        packed = (_dated(e, found) if e.size is None else self._read(source, e) for e in found)
        return PackedCube(source.path, cube_id, tuple(packed))

    def _found(self, source: Source, directory: int, name: str) -> Iterator[Entry]:
        """A directory of a cube and all below it that travels; sizes are as ``stat`` says them."""
        status = os.fstat(directory)
        yield Entry(name, status.st_mode & 0o777, status.st_mtime_ns)
        for last in os.listdir(directory):
            inside = layout.join(name, last)
            if not self._travels(inside):
                continue
            status = os.stat(last, dir_fd=directory, follow_symlinks=False)
            if stat.S_ISREG(status.st_mode):
                yield Entry(inside, status.st_mode & 0o777, status.st_mtime_ns, status.st_size)
            elif stat.S_ISDIR(status.st_mode):
                below = source.store.open_dir(layout.join(source.path, inside))
                try:
                    if not layout.is_cube(os.listdir(below)):  # that is another cube
                        yield from self._found(source, below, inside)
                finally:
                    os.close(below)
            else:
                self.left_out.append(layout.join(source.path, inside))

    def _travels(self, name: str) -> bool:
        if name == layout.REJECTED or layout.is_temporary(name):
            return False
        if self._choice.text_only and name in (layout.KV, layout.ADAPTER):
            return False
        return not self._choice.redacted or name in _MEMORIES

    def _require_meta(self, source: Source) -> str:
        """The cube's id; its header, and what else does not travel as it is, is kept as it does."""
        path = layout.join(source.path, layout.META)
        meta = metadata.parse(source.store.read(path, metadata.MAX_BYTES))
        sensitivity = meta.get("governance", {}).get("sensitivity")
        if not self._choice.redacted:
            self._made[path] = metadata.render(redact.carried(meta))
        elif sensitivity in redact.TOO_SENSITIVE:
            raise NotAllowed(
                f"{source.path} is {sensitivity}: redacting takes nothing away from its text"
            )
        else:
            self._made[path] = metadata.render(redact.redacted(meta))
        return metadata.cube_id(meta)

    def _read(self, source: Source, entry: Entry) -> Entry:
        """The entry with the size that was really read; its digest is kept."""
        path = layout.join(source.path, entry.name)
        if self._choice.redacted and entry.name == _ADAPTER_CONFIG:
            self._made[path] = redact.adapter_config(source.store.read(path, MAX_CONFIG))
        digest, size = hashlib.sha256(), 0
        for part in self._parts(source, path):
            digest.update(part)
            size += len(part)
        self._digests.append((path, digest.hexdigest()))
        return replace(entry, size=size)

    def _parts(self, source: Source, path: str) -> Iterator[bytes]:
        """The bytes of a file as it travels, piece by piece."""
        if path in self._made:
            yield self._made[path]
            return
        for part in _parts(source, path):
            yield part
            self._done += len(part)
            self._progress(self._done)

    def _copy(self, source: Source, entry: Entry, path: str, sha256: str, out: BinaryIO) -> None:
        digest, left = hashlib.sha256(), entry.size or 0
        for part in self._parts(source, path):
            if len(part) > left:
                break
            digest.update(part)
            out.write(part)
            left -= len(part)
        if left or digest.hexdigest() != sha256:
            raise MemfsError(f"{path} was changed while it was dumped; please try again")


def _dated(directory: Entry, entries: Sequence[Entry]) -> Entry:
    """A directory with the time of the youngest file in it.

    Its own changes with whatever was published there, be it what was there before.
    """
    below = directory.name + "/" if directory.name else ""
    times = [e.mtime_ns for e in entries if e.size is not None and e.name.startswith(below)]
    return replace(directory, mtime_ns=max(times, default=0))


def _put(out: BinaryIO, *parts: bytes) -> int:
    for part in parts:
        out.write(part)
    return sum(map(len, parts))


def _parts(source: Source, path: str) -> Iterator[bytes]:
    parent, name = layout.split(path)
    directory = source.store.open_dir(parent)
    try:
        fd = _open_quietly(directory, name, path)
    finally:
        os.close(directory)
    try:
        while part := os.read(fd, CHUNK):
            yield part
    finally:
        os.close(fd)


def _open_quietly(directory: int, name: str, path: str) -> int:
    try:
        return open_regular_at(directory, name, os.O_RDONLY | os.O_NOATIME, shown=path)
    except PermissionError:
        # Only a file's owner may ask for that. To anybody else it is a read like any other.
        return open_regular_at(directory, name, shown=path)
