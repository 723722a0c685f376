"""Sig: what tells from a file's status alone whether it changed since it was read. Pure."""

from __future__ import annotations

import os
import time
from typing import NamedTuple

_TICK_NS = 50_000_000
_COARSE_NS = 2_000_000_000


class Sig(NamedTuple):
    """The part of a file's status that any change of its content changes."""

    ino: int
    size: int
    mtime_ns: int
    ctime_ns: int
    """0 in a Sig that no file can have: see ``settled_sig``."""

    def unsettled(self) -> Sig:
        """The same, but equal to no file's: the file is read again at the next look."""
        return self._replace(ctime_ns=0)


def sig_of(found: os.stat_result) -> Sig:
    """The Sig of a file with this status."""
    return Sig(found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def settled_sig(found: os.stat_result, now_ns: int | None = None) -> Sig:
    """The Sig to remember for a file whose status was taken just before it was read.

    The kernel stamps changes by a clock that ticks every few milliseconds (every second or two on
    old filesystems). A change in the same tick, after the file was read, would leave the same times
    (what git calls a racy entry): where the last change is that recent, the Sig is one that no file
    has, and the file is read once more at the next look.
    """
    now = time.time_ns() if now_ns is None else now_ns
    coarse = found.st_mtime_ns % 1_000_000_000 == 0 and found.st_ctime_ns % 1_000_000_000 == 0
    young = abs(now - found.st_ctime_ns) < (_COARSE_NS if coarse else _TICK_NS)
    return sig_of(found).unsettled() if young else sig_of(found)
