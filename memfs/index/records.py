"""The bytes of the index: keys, and values with a checksum each.

LMDB checks no page, so every value carries the xxh3 of its key and content: a damaged record, or
one that stands under another's key, is IndexDamaged and never an answer. Used by the index; pure.

| database | key | value |
| --- | --- | --- |
| ``cubes`` | path | facts and path, JSON |
| ``ids`` | cube id | ``0`` or ``1``, then the path: ``0`` is the path that owns the id |
| ``facets`` | kind of facet, then its value | path |
| ``times`` | when a memory changed, big-endian microseconds | path |
| ``usage`` | cube id | ``Usage``, and whether it is still to be written to meta.json |
| ``info`` | name | JSON |

A path (or tag) that is too long for a key is cut, and ends in NUL and a digest of the whole; NUL is
in no path, so no two paths have one key, and those under one directory still stand together.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from typing import Any, NamedTuple

import xxhash

from memfs.errors import IndexDamaged
from memfs.vault.facts import CubeFacts

FORMAT = 5
"""Raised whenever a key, a value or a field of CubeFacts changes its meaning: an index of another
format is made again."""

DATABASES = {
    "cubes": False,
    "ids": True,
    "facets": True,
    "times": True,
    "usage": False,
    "info": False,
}

MOST = (1 << 63) - 1
"""A count ends there; a header may claim any number."""

CUT = 440
_DIGEST = 20
_USAGE = struct.Struct("<QQd?")


class Usage(NamedTuple):
    """How often a cube was used."""

    reads: int = 0
    questions: int = 0
    last_used: float | None = None
    """Seconds since 1970."""


def path_key(path: str) -> bytes:
    """The key of a path."""
    return _short(os.fsencode(path))


def facet_key(kind: str, value: str) -> bytes:
    """The key of a facet: ``kind`` is state, tag, owner or pinned."""
    return _short(f"{kind}={value}".encode("utf-8", "surrogatepass"))


def facets_of(facts: CubeFacts) -> set[bytes]:
    """Keys in ``facets`` that a cube with these facts stands under."""
    keys = {facet_key("state", facts.kv_state), facet_key("owner", str(facts.uid))}
    if facts.pinned:
        keys.add(facet_key("pinned", ""))
    return keys | {facet_key("tag", tag) for tag in facts.tags}


def time_key(seconds: float) -> bytes:
    """The key of a time; times before 1970 are as 1970."""
    return struct.pack(">Q", min(max(int(seconds * 1e6), 0), (1 << 63) - 1))


def seal(key: bytes, content: bytes) -> bytes:
    """The value to store ``content`` under ``key``."""
    return _checksum(key, content) + content


def unseal(key: bytes, value: bytes) -> bytes:
    """The content of a stored value. Raises IndexDamaged where it is not what was stored."""
    content = value[8:]
    if value[:8] != _checksum(key, content):
        raise IndexDamaged(f"the record of {os.fsdecode(key)[:80]!r} does not match its checksum")
    return content


def seal_cube(key: bytes, path: str, facts: CubeFacts) -> bytes:
    """The value of a cube."""
    return seal(key, dump({"path": path, **facts.to_json()}))


def unseal_cube(key: bytes, value: bytes) -> tuple[str, CubeFacts]:
    """Path and facts of a stored cube."""
    data = load(unseal(key, value))
    try:
        return data.pop("path"), CubeFacts.from_json(data)
    except (KeyError, TypeError) as e:
        raise IndexDamaged(f"a record of another format ({e})") from e


def seal_usage(key: bytes, usage: Usage, *, unwritten: bool) -> bytes:
    """The value of a cube's usage."""
    last = float("nan") if usage.last_used is None else usage.last_used
    counts = min(usage.reads, MOST), min(usage.questions, MOST)
    return seal(key, _USAGE.pack(*counts, last, unwritten))


def unseal_usage(key: bytes, value: bytes) -> tuple[Usage, bool]:
    """Usage as stored, and whether meta.json has yet to be told."""
    reads, questions, last, unwritten = _USAGE.unpack(unseal(key, value))
    return Usage(reads, questions, None if math.isnan(last) else last), unwritten


def dump(data: object) -> bytes:
    """JSON, compact and in ASCII, so that names that are not UTF-8 survive it."""
    return json.dumps(data, separators=(",", ":")).encode("ascii")


def load(content: bytes) -> Any:
    """What ``dump`` was given."""
    return json.loads(content)


def _short(name: bytes) -> bytes:
    if len(name) <= CUT:
        return name or b"\0"
    return name[:CUT] + b"\0" + hashlib.blake2b(name, digest_size=_DIGEST).digest()


def _checksum(key: bytes, content: bytes) -> bytes:
    return xxhash.xxh3_64_digest(content, seed=xxhash.xxh3_64_intdigest(key))
