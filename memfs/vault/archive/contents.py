"""The archive of cubes: what is in it, and how each byte of it follows from its lists.

An archive is an uncompressed tar in the pax format, so that ``tar xf`` and ``sha256sum -c`` are all
that it takes to unpack it. Its members, in this order and no other::

    SHA256SUMS             of every file below, as ``sha256sum -c`` reads it
    SHA256SUMS.sig         only where it is signed: made by ``ssh-keygen -Y sign -n memfs``
    memfs-archive.json     the manifest: the cubes, each with its directories and files
    handbook/              a cube's own directory, then what is in it, sorted
    handbook/meta.json …

The manifest says name, size, mode and time of each member, and is itself in SHA256SUMS: with the
signature everything is signed. Owners are not carried, and nothing of the moment of the dump is:
the same cubes give the same file. As a header follows from the manifest, ``check`` compares it with
the one that ``member_header`` makes, and an archive has no room for anything that is not on its
lists. Pure functions; any thread.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from memfs.cube import layout
from memfs.errors import BadArchive

FORMAT = "memfs-archive-1"
SUMS = "SHA256SUMS"
SIGNATURE = "SHA256SUMS.sig"
MANIFEST = "memfs-archive.json"
LISTS = (SUMS, SIGNATURE, MANIFEST)

BLOCK = tarfile.BLOCKSIZE
RECORD = tarfile.RECORDSIZE
"""The whole file's length is a multiple of it, as tar's always is."""

MAX_LIST = 64 << 20
"""Bytes of SHA256SUMS, and of the manifest, which are read into memory."""
MAX_MEMBERS = 200_000
MAX_NAME = 255
"""Bytes of one name, as filesystems have it."""
MAX_PATH = 2048
"""Bytes of a path in an archive: there must be room for where it is loaded."""
MAX_DEPTH = 200
"""Names in a path: what walks directories takes a step deeper for each."""
MAX_TIME_NS = 1 << 63

_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_RESERVED = frozenset({layout.CONTROL, layout.VERSIONS})


@dataclass(frozen=True)
class Entry:
    """A directory or a file of a cube."""

    name: str
    """Its path within the cube; "" for the cube's own directory."""
    mode: int
    """Permission bits."""
    mtime_ns: int
    size: int | None = None
    """Bytes; None for a directory."""


@dataclass(frozen=True)
class PackedCube:
    """A cube as an archive has it."""

    path: str
    """Where it lay in its store, and lies in the archive."""
    id: str | None
    """As its meta.json says; None where it has none."""
    entries: tuple[Entry, ...]
    """Its own directory first, then by path; what lies in a directory comes after that."""

    @property
    def size(self) -> int:
        """Bytes of its files."""
        return sum(entry.size or 0 for entry in self.entries)

    @property
    def files(self) -> int:
        """How many files it has."""
        return sum(entry.size is not None for entry in self.entries)


def order(path: str) -> list[bytes]:
    """The key by which members are sorted: a directory stands before what is in it."""
    return [part.encode("utf-8", "surrogateescape") for part in path.split("/") if path]


def wrong_with(path: str) -> str | None:
    """Why a path may not be in an archive, as the end of a sentence; None where it may."""
    raw = path.encode("utf-8", "surrogateescape")
    if path.startswith("/"):
        return "is an absolute path"
    for part in path.split("/"):
        if part == "..":
            return "leads out of its directory by '..'"
        if part in ("", "."):
            return f"has an empty name or '.' in it ({path[:80]!r})"
        if len(part.encode("utf-8", "surrogateescape")) > MAX_NAME:
            return f"has a name of more than {MAX_NAME} bytes"
        folded = part.casefold()
        if folded in _RESERVED or folded.startswith(layout.TEMPORARY):
            return f"has {part!r} in it, a name that is memfs's own"
    if any(c < 32 or c in b"\x7f\\" for c in raw):
        return "has a control character or a backslash in it"
    if len(raw) > MAX_PATH:
        return f"is longer than {MAX_PATH} bytes"
    if path.count("/") >= MAX_DEPTH:
        return f"is more than {MAX_DEPTH} names deep"
    return None


def member_header(path: str, *, size: int | None, mode: int = 0o644, mtime_ns: int = 0) -> bytes:
    """The tar header of a member, its pax records included; ``size`` is None for a directory."""
    info = tarfile.TarInfo(path)
    info.type = tarfile.DIRTYPE if size is None else tarfile.REGTYPE
    info.size = size or 0
    info.mode = mode
    seconds, nanoseconds = divmod(mtime_ns, 10**9)
    info.mtime = seconds
    if nanoseconds or not 0 <= seconds < 8**11:
        info.mtime = seconds if 0 <= seconds < 8**11 else 0
        sign, (whole, rest) = "-" if mtime_ns < 0 else "", divmod(abs(mtime_ns), 10**9)
        info.pax_headers = {"mtime": f"{sign}{whole}.{rest:09d}"}
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def padding(size: int, unit: int = BLOCK) -> bytes:
    """The zeros after so many bytes."""
    return bytes(-size % unit)


def ending(size: int) -> bytes:
    """The end of an archive whose members take ``size`` bytes."""
    return bytes(2 * BLOCK) + padding(size + 2 * BLOCK, RECORD)


def members(cubes: Sequence[PackedCube]) -> Iterator[tuple[PackedCube, Entry, str]]:
    """Every member after the lists, in order: its cube, its entry, its path in the archive."""
    for cube in cubes:
        for entry in cube.entries:
            yield cube, entry, layout.join(cube.path, entry.name) if entry.name else cube.path


def sums_bytes(digests: Sequence[tuple[str, str]]) -> bytes:
    """SHA256SUMS of (path, SHA-256 in hex), the lines as ``sha256sum`` writes them."""
    lines = (f"{digest}  {path}\n" for path, digest in digests)
    return "".join(lines).encode("utf-8", "surrogateescape")


def parse_sums(data: bytes) -> dict[str, str]:
    """Path to digest, in the order of the lines. Raises BadArchive."""
    found: dict[str, str] = {}
    for number, line in enumerate(data.decode("utf-8", "surrogateescape").split("\n")[:-1], 1):
        match = re.fullmatch(r"([0-9a-f]{64})  (.+)", line)
        if match is None:
            raise BadArchive(f"line {number} of {SUMS} is not a digest and a path")
        if match[2] in found:
            raise BadArchive(f"{SUMS} has {match[2]!r} twice")
        found[match[2]] = match[1]
    if sums_bytes(list(found.items())) != data:
        raise BadArchive(f"{SUMS} does not end with a line's end")
    return found


def manifest_bytes(cubes: Sequence[PackedCube], *, redacted: bool, text_only: bool) -> bytes:
    """The manifest of an archive."""
    data = {
        "format": FORMAT,
        "redacted": redacted,
        "text_only": text_only,
        "cubes": [
            {"path": c.path, "id": c.id, "entries": [_entry_json(e) for e in c.entries]}
            for c in cubes
        ],
    }
    return (json.dumps(data, indent=1) + "\n").encode("ascii")


def parse_manifest(data: bytes) -> list[PackedCube]:
    """The cubes of an archive, all that it says of them checked. Raises BadArchive."""
    try:
        raw = json.loads(data.decode("ascii"))
        if raw["format"] != FORMAT:
            raise BadArchive(
                f"{MANIFEST} says format {str(raw['format'])[:40]!r}, and not {FORMAT!r}"
            )
        cubes = [_cube(said) for said in raw["cubes"]]
        again = manifest_bytes(cubes, redacted=raw["redacted"], text_only=raw["text_only"])
        if again != data:
            raise BadArchive(f"{MANIFEST} is not written as memfs dump writes it")
        _require_sound(cubes)  # which meets names that no file can have: half a surrogate pair
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as e:
        raise BadArchive(f"{MANIFEST} is not one: {type(e).__name__}: {e}") from e
    return cubes


def _entry_json(entry: Entry) -> dict[str, Any]:
    said: dict[str, Any] = {"name": entry.name}
    if entry.size is not None:
        said["bytes"] = entry.size
    return said | {"mode": f"{entry.mode:04o}", "mtime_ns": entry.mtime_ns}


def _cube(said: dict[str, Any]) -> PackedCube:
    entries = tuple(_entry(entry) for entry in said["entries"])
    if not isinstance(said["path"], str) or not isinstance(said["id"], str | None):
        raise TypeError("a path or an id is no string")
    return PackedCube(said["path"], said["id"], entries)


def _entry(said: dict[str, Any]) -> Entry:
    name, mtime_ns, size = said["name"], said["mtime_ns"], said.get("bytes")
    if [type(name), type(mtime_ns)] != [str, int] or type(size) not in (int, type(None)):
        raise TypeError(f"the entry {str(name)[:80]!r} is not a name, a time and a size")
    return Entry(name, int(said["mode"], 8), mtime_ns, size)


def _require_sound(cubes: Sequence[PackedCube]) -> None:
    """Raises BadArchive where the manifest names what no archive may have."""
    if not cubes:
        raise BadArchive("there is no cube in it")
    paths = {cube.path for cube in cubes}
    if [order(cube.path) for cube in cubes] != sorted(order(path) for path in paths):
        raise BadArchive(f"{MANIFEST} does not name each cube once, in order")
    if sum(len(cube.entries) for cube in cubes) > MAX_MEMBERS:
        raise BadArchive(f"it has more than {MAX_MEMBERS:,} members")
    files = {path for _, entry, path in members(cubes) if entry.size is not None}
    for cube in cubes:
        if files.intersection(_above(cube.path)):
            raise BadArchive(f"{cube.path!r} lies in what is a file of another cube")
        if cube.path.split("/")[0] in LISTS:
            raise BadArchive(f"a cube is called {cube.path!r}, as one of the archive's lists")
        if cube.id is not None and not _ID.fullmatch(cube.id):
            raise BadArchive(f"{cube.path!r}: {cube.id!r} is not the id of a cube")
        for entry in cube.entries:
            _require_entry(cube, entry)
        _require_cube(cube, paths)


def _above(path: str) -> Iterator[str]:
    """The path and each directory above it."""
    while path:
        yield path
        path = layout.split(path)[0]


def _require_entry(cube: PackedCube, entry: Entry) -> None:
    path = layout.join(cube.path, entry.name) if entry.name else cube.path
    reason = wrong_with(path)
    if reason is not None:
        raise BadArchive(f"{path[:200]!r} {reason}")
    if not 0 <= entry.mode <= 0o777:
        raise BadArchive(f"{path!r} has the mode {entry.mode:o}")
    if not -MAX_TIME_NS < entry.mtime_ns < MAX_TIME_NS:
        raise BadArchive(f"{path!r} has a time that no file has")
    if entry.size is not None and not 0 <= entry.size < 1 << 62:
        raise BadArchive(f"{path!r} is said to have {entry.size} bytes")


def _require_cube(cube: PackedCube, cubes: set[str]) -> None:
    """It is a cube with its own files alone, each within a directory that comes before it."""
    names = [entry.name for entry in cube.entries]
    if not names or names[0] or cube.entries[0].size is not None:
        raise BadArchive(f"{cube.path!r} does not begin with its own directory")
    if [order(name) for name in names] != sorted(order(name) for name in set(names)):
        raise BadArchive(f"{cube.path!r} has an entry twice, or not in order")
    directories = {e.name for e in cube.entries if e.size is None}
    inside: dict[str, list[str]] = {name: [] for name in directories}
    for entry in cube.entries[1:]:
        parent, name = layout.split(entry.name)
        if parent not in directories:
            raise BadArchive(f"{cube.path!r} has {entry.name!r} in what is no directory of it")
        if layout.join(cube.path, entry.name) in cubes:
            raise BadArchive(f"{cube.path!r} has another cube among its entries: {entry.name!r}")
        inside[parent].append(name)
    for parent, found in inside.items():
        if not layout.is_cube(found) and not parent:
            raise BadArchive(f"{cube.path!r} is not a cube")
        if layout.is_cube(found) and parent:
            raise BadArchive(f"{cube.path!r} has a cube in it that is not named: {parent!r}")
    for name in (layout.PAYLOAD, layout.KV, layout.META):
        if name in directories:
            raise BadArchive(f"{layout.join(cube.path, name)!r} is a directory")
    if layout.ADAPTER in names and layout.ADAPTER not in directories:
        raise BadArchive(f"{layout.join(cube.path, layout.ADAPTER)!r} is not a directory")
    if (layout.META in names) != (cube.id is not None):
        raise BadArchive(f"{cube.path!r} has an id and no {layout.META}, or the other way round")
