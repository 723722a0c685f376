"""What a check of a store finds wrong. Made by whoever checks a part of it, gathered by fsck."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing that is not as it should be."""

    area: str
    """files, metadata, digests, index, versions or trail."""
    path: str
    """Where, as in ``memfs.cube.layout``; below ``.memfs/`` for what is memfs's own."""
    what: str
    """What is wrong, in a sentence for people."""
    mend: Callable[[], str] | None = None
    """Mends it and says what was done, or raises OSError or MemfsError and changes nothing. None
    where nothing that memfs may decide by itself would help."""
