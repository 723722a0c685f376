"""Checking an archive of cubes, all of it, before a byte of it is used.

Nothing in the file is followed. The lists at its beginning say what must come, byte for byte (see
``contents``), and each header is compared with that. So links, devices, sparse files, pax records
that set another path or size, GNU's long names, a second archive behind the first, and whatever
else a tar can hold, are all the same to it: not what must stand there. ``_explain`` then says what
does. Used by ``memfs load``; any thread, one archive each.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tarfile
from collections.abc import Callable
from dataclasses import dataclass

from memfs.cube import layout, metadata
from memfs.errors import BadArchive, InvalidMetadata
from memfs.vault.archive import contents
from memfs.vault.archive.contents import BLOCK, MANIFEST, SIGNATURE, SUMS, Entry, PackedCube

CHUNK = 1 << 20
MAX_SIGNATURE = 64 << 10
_SHOWN = 120

_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
}
_KINDS = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symlink",
    tarfile.CHRTYPE: "a character device",
    tarfile.BLKTYPE: "a block device",
    tarfile.FIFOTYPE: "a fifo",
    tarfile.CONTTYPE: "a contiguous file",
    tarfile.GNUTYPE_LONGNAME: "a GNU long name",
    tarfile.GNUTYPE_LONGLINK: "a GNU long link",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
    tarfile.XGLTYPE: "a global pax header",
    tarfile.SOLARIS_XHDTYPE: "a Solaris header",
}


@dataclass(frozen=True)
class File:
    """Where the bytes of a file are in an archive, and what they must hash to."""

    entry: Entry
    offset: int
    sha256: str


@dataclass(frozen=True)
class Checked:
    """An archive that is whole, and is what it says."""

    cubes: list[PackedCube]
    files: dict[str, list[File]]
    """By the path of the cube."""
    sums: bytes
    """What a signature is over."""
    signature: bytes | None


def check(fd: int, progress: Callable[[int], None] = lambda _: None) -> Checked:
    """Reads an archive through, and says what is in it.

    Args:
        fd: of an ordinary file, at any position.
        progress: told how far it is, in bytes.

    Raises:
        BadArchive: naming what is wrong.
    """
    return _Walk(fd, progress).check()


class _Walk:
    """One way through an archive, from its first byte to its last."""

    def __init__(self, fd: int, progress: Callable[[int], None]) -> None:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise BadArchive("it is not a regular file")
        self._fd = fd
        self._size = found.st_size
        self._offset = 0
        self._progress = progress
        self._seen: set[str] = set()

    def check(self) -> Checked:
        self._require_tar()
        sums = self._list(SUMS, contents.MAX_LIST)
        signature = None
        if self._name() == SIGNATURE:
            signature = self._list(SIGNATURE, MAX_SIGNATURE)
        manifest = self._list(MANIFEST, contents.MAX_LIST)
        digests = contents.parse_sums(sums)
        if digests.get(MANIFEST) != hashlib.sha256(manifest).hexdigest():
            raise BadArchive(f"{MANIFEST} is not the one in {SUMS}")
        cubes = contents.parse_manifest(manifest)
        _require_listed(digests, cubes)
        files: dict[str, list[File]] = {cube.path: [] for cube in cubes}
        for cube, entry, path in contents.members(cubes):
            self._header(path, entry)
            if entry.size is not None:
                files[cube.path].append(File(entry, self._offset, digests[path]))
                self._data(cube, entry, path, digests[path])
        self._end()
        return Checked(cubes, files, sums, signature)

    def _require_tar(self) -> None:
        start = self._read(8, at=0)
        for magic, name in _COMPRESSED.items():
            if start.startswith(magic):
                raise BadArchive(f"it is compressed ({name}); memfs dump writes a plain tar")
        if self._size < contents.RECORD or self._size % contents.RECORD:
            raise BadArchive(
                f"it is {self._size} bytes long: it was cut short, or is no tar that memfs wrote"
            )

    def _name(self) -> str | None:
        """The name in the header that is next, where it is a plain one."""
        try:
            return self._parsed(self._offset).name
        except tarfile.HeaderError:
            return None

    def _list(self, name: str, limit: int) -> bytes:
        """A member at the beginning, whose size only its header says."""
        try:
            found = self._parsed(self._offset)
        except tarfile.HeaderError:
            raise self._explain(name, None) from None
        if found.name == name and found.isreg() and found.size > limit:
            raise BadArchive(f"{name} is said to have {found.size} bytes; at most {limit}")
        entry = Entry("", 0o644, 0, found.size if 0 <= found.size <= limit else 0)
        self._header(name, entry)
        data = self._read(entry.size or 0, at=self._offset)
        self._skip(entry.size or 0, name)
        return data

    def _header(self, path: str, entry: Entry) -> None:
        expected = contents.member_header(
            path, size=entry.size, mode=entry.mode, mtime_ns=entry.mtime_ns
        )
        if self._read(len(expected), at=self._offset) != expected:
            raise self._explain(path, entry)
        self._offset += len(expected)
        self._seen.add(path)

    def _data(self, cube: PackedCube, entry: Entry, path: str, sha256: str) -> None:
        assert entry.size is not None
        if self._offset + entry.size > self._size:
            raise BadArchive(f"{_shown(path)} ends behind the end of the archive")
        digest = hashlib.sha256()
        is_header = entry.name == layout.META
        if is_header and entry.size > metadata.MAX_BYTES:
            raise BadArchive(f"{_shown(path)} has {entry.size} bytes")
        for start in range(0, entry.size, CHUNK):
            part = self._read(min(CHUNK, entry.size - start), at=self._offset + start)
            digest.update(part)
            self._progress(self._offset + start + len(part))
        if digest.hexdigest() != sha256:
            raise BadArchive(f"{_shown(path)} is not what {SUMS} says")
        if is_header:
            _require_meta(cube, path, self._read(entry.size, at=self._offset))
        self._skip(entry.size, path)

    def _skip(self, size: int, path: str) -> None:
        """Past a member's bytes, and the zeros after them."""
        self._offset += size
        zeros = contents.padding(size)
        if self._read(len(zeros), at=self._offset) != zeros:
            raise BadArchive(f"{_shown(path)} is followed by something else than zeros")
        self._offset += len(zeros)

    def _end(self) -> None:
        zeros = contents.ending(self._offset)
        if self._read(len(zeros), at=self._offset) != zeros:
            raise self._explain("the end", None)
        over = self._size - self._offset - len(zeros)
        if over:
            raise BadArchive(f"it goes on for {over} bytes after its end")

    def _read(self, size: int, *, at: int) -> bytes:
        """So many bytes; fewer where the file ends before."""
        parts = []
        while size and at < self._size and (part := os.pread(self._fd, min(size, CHUNK), at)):
            parts.append(part)
            size -= len(part)
            at += len(part)
        return b"".join(parts)

    def _parsed(self, offset: int) -> tarfile.TarInfo:
        block = self._read(BLOCK, at=offset)
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")

    def _explain(self, wanted: str, entry: Entry | None) -> BadArchive:
        """What stands where the header of ``wanted`` must: an error that says it."""
        if not any(self._read(BLOCK, at=self._offset)):
            return BadArchive(f"it ends where {_shown(wanted)} must come")
        try:
            found, records = self._parsed(self._offset), ""
            if found.type == tarfile.XHDTYPE:
                records = self._records(found)
                past = BLOCK + max(0, found.size) + len(contents.padding(found.size))
                found = self._parsed(self._offset + past)
        except tarfile.HeaderError as e:
            return BadArchive(f"the header of {_shown(wanted)} is damaged or no tar header ({e})")
        name = found.name.rstrip("/") if found.name.strip("/") else found.name
        reason = contents.wrong_with(name)
        if found.type in _KINDS:
            return BadArchive(f"{_shown(name)} is {_KINDS[found.type]}")
        if reason is not None:
            return BadArchive(f"{_shown(name)} {reason}")
        if name in self._seen:
            return BadArchive(f"{_shown(name)} is in it twice")
        if name != wanted and "path=" not in records:
            return BadArchive(f"{_shown(name)} stands where {_shown(wanted)} must")
        if records:
            return BadArchive(f"{_shown(wanted)} has pax records of its own: {records}")
        if entry is not None and found.size != (entry.size or 0):
            said = f"{found.size} bytes in its header, {entry.size or 0} in the manifest"
            return BadArchive(f"{_shown(wanted)} has {said}")
        return BadArchive(f"the header of {_shown(wanted)} is not as memfs dump writes it")

    def _records(self, found: tarfile.TarInfo) -> str:
        """The pax records of a header, as an error shows them."""
        raw = self._read(max(0, min(found.size, _SHOWN)), at=self._offset + BLOCK)
        return repr(raw.decode("utf-8", "replace").strip())


def _require_listed(digests: dict[str, str], cubes: list[PackedCube]) -> None:
    """SHA256SUMS has the manifest and the manifest's files, in this order and no other."""
    files = [path for _, entry, path in contents.members(cubes) if entry.size is not None]
    named, wanted = list(digests), [MANIFEST, *files]
    if named == wanted:
        return
    for path in named:
        reason = contents.wrong_with(path)
        if reason is not None:
            raise BadArchive(f"{_shown(path)} {reason}")
    missing, extra = set(wanted) - set(named), set(named) - set(wanted)
    if missing:
        raise BadArchive(f"{_shown(min(missing))} is not in {SUMS}")
    if extra:
        raise BadArchive(f"{_shown(min(extra))} is in {SUMS} and not in {MANIFEST}")
    raise BadArchive(f"the lines of {SUMS} are not in order")


def _require_meta(cube: PackedCube, path: str, data: bytes) -> None:
    try:
        meta = metadata.parse(data)
    except InvalidMetadata as e:
        raise BadArchive(f"{_shown(path)} is not valid: {e.detail}") from e
    if metadata.cube_id(meta) != cube.id:
        raise BadArchive(f"{_shown(path)} has another id than {MANIFEST} says")


def _shown(path: str) -> str:
    return repr(path if len(path) <= _SHOWN else path[:_SHOWN] + "…")
