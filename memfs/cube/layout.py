"""The names in a MemCube and what a path means by its last parts. Used by every other package.

Paths are relative to the store's root, without a leading slash, ``""`` being the root. They are
``str`` decoded with ``surrogateescape``, so names that are not UTF-8 survive.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum

PAYLOAD = "payload.md"
KV = "kv.safetensors"
ADAPTER = "adapter"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
META = "meta.json"
REJECTED = "meta.json.rejected"
"""Where the text of a refused meta.json is kept, beside the one that stands."""
CONTROL = ".memfs"
"""At the store's root: memfs's own directory on disk; through a mount, the control tree."""

AT = f"{CONTROL}/at"
"""In the control tree: the whole store as it was at a moment."""
VERSIONS = ".versions"
"""In a cube: its earlier versions, never listed, always openable; no directory of the store."""
TEMPORARY = ".memfs-tmp-"
"""Start of the names of files and directories that are being published."""
INCOMING = TEMPORARY + "load-"
"""Start of the names of directories in which cubes are put together before they get their place."""

_MARKS = frozenset({PAYLOAD, KV, ADAPTER, META})


class Role(Enum):
    """What a file is to memfs, told by its name alone."""

    PAYLOAD = "payload"
    KV = "kv"
    ADAPTER_WEIGHTS = "adapter"
    ADAPTER_CONFIG = "adapter config"
    META = "meta"
    CONTROL = "control"
    PAST = "past"
    """At or below ``VERSIONS`` or ``AT``, whatever it is called there."""
    OTHER = "other"


_BELOW = f"/{VERSIONS}/"
_ADAPTER_ROLES = {
    ADAPTER_WEIGHTS: Role.ADAPTER_WEIGHTS,
    ADAPTER_CONFIG: Role.ADAPTER_CONFIG,
}


def split(path: str) -> tuple[str, str]:
    """``path`` as (parent, name); the parent of a top-level name is ``""``."""
    parent, _, name = path.rpartition("/")
    return parent, name


def join(parent: str, name: str) -> str:
    """``parent/name`` without a leading slash."""
    return f"{parent}/{name}" if parent else name


def is_cube(names: Iterable[str]) -> bool:
    """Whether a directory with these entries is a MemCube rather than a collection."""
    return not _MARKS.isdisjoint(names)


def is_temporary(path: str) -> bool:
    """Whether something is being published, or lies within what is: part of no cube as yet."""
    return f"/{TEMPORARY}" in f"/{path}"


def classify(path: str) -> tuple[Role, str]:
    """The role of ``path`` and the cube directory it belongs to (``""`` where it has none).

    A mark at the store's root makes no cube: the root is always a collection. Nor does one in a
    directory that is being published.
    """
    if path == CONTROL or path.startswith(CONTROL + "/"):
        past = path == AT or path.startswith(AT + "/")
        return (Role.PAST if past else Role.CONTROL), ""
    if VERSIONS in path:
        cube, found, _ = (path + "/").partition(_BELOW)
        if found:
            return Role.PAST, cube
    parent, name = split(path)
    if not parent or is_temporary(parent):
        return Role.OTHER, ""
    if name == PAYLOAD:
        return Role.PAYLOAD, parent
    if name == KV:
        return Role.KV, parent
    if name == META:
        return Role.META, parent
    if name in _ADAPTER_ROLES:
        cube, holder = split(parent)
        if holder == ADAPTER and cube:
            return _ADAPTER_ROLES[name], cube
    return Role.OTHER, ""
