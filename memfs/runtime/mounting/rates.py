"""What loading a KV cache and what prefilling its text cost on this machine, and which is cheaper.

``Rates`` is measured once the model is idle (``gauge``) and corrected by everything that is loaded
and prefilled from then on. Plain arithmetic without torch; belongs to the service's event loop.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from memfs.runtime.mounting.page_cache import missing_share

WEIGHT = 0.25
"""Of the newest in an exponential average."""
MARGIN = 0.98
"""Prefilling must take less than this share of loading to be chosen: mounting is to be no more than
2% slower than that."""
DOUBT = 0.95
"""What is left of a correction each time that it keeps from loading: it may hold no longer."""
IN_CACHE = 1 / 16
"""Of a file on the disk: a load with less than that tells nothing of the disk."""


@dataclass(frozen=True)
class Prefilling:
    """Seconds of a prefill as they were measured at first."""

    chunk_rows: int
    chunk: float
    """For a chunk, whatever is in it."""
    row: float
    """For a row."""
    pair: float
    """For a row to attend to a row."""

    def seconds(self, before: int, rows: int) -> float:
        """For ``rows`` rows behind ``before``."""
        total = 0.0
        for start in range(0, rows, self.chunk_rows):
            size = min(self.chunk_rows, rows - start)
            total += self.chunk + size * (self.row + self.pair * (before + start + size))
        return total


@dataclass(frozen=True)
class Loading:
    """Seconds of a load from the page cache as they were measured at first."""

    file: float
    """For a file, however short."""
    byte: float

    def seconds(self, nbytes: int) -> float:
        """For a file of ``nbytes``."""
        return self.file + self.byte * nbytes


@dataclass(frozen=True)
class Stored:
    """A file that could be loaded."""

    nbytes: int
    on_disk: float
    """The share of it that is not in the page cache."""
    device: int
    """The number of the disk it is on."""

    @classmethod
    def of(cls, fd: int) -> Stored:
        """The file that is open. Does not wait for the disk."""
        found = os.fstat(fd)
        return cls(found.st_size, missing_share(fd), found.st_dev)


@dataclass(frozen=True)
class Choice:
    """Loaded or prefilled, and why."""

    load: bool
    why: str
    load_s: float | None = None
    prefill_s: float | None = None
    """The estimates; None before anything was measured."""


class Rates:
    """This machine's rates."""

    def __init__(self) -> None:
        """Nothing is known yet: what is there is loaded."""
        self.prefilling: Prefilling | None = None
        self.loading: Loading | None = None
        self._prefill_factor = 1.0
        """How many times as long as at first it takes now."""
        self._load_factor = 1.0
        self._disks: dict[int, float] = {}
        """Seconds a byte takes from each disk, beyond what it takes from the page cache."""

    def prefill_seconds(self, before: int, rows: int) -> float | None:
        """What prefilling ``rows`` rows behind ``before`` would take."""
        if self.prefilling is None:
            return None
        return self._prefill_factor * self.prefilling.seconds(before, rows)

    def load_seconds(self, file: Stored) -> float | None:
        """What loading a file would take."""
        if self.loading is None:
            return None
        cached = self._load_factor * self.loading.seconds(file.nbytes)
        return cached + self._disks.get(file.device, 0.0) * file.on_disk * file.nbytes

    def choose(self, file: Stored, before: int, rows: int, *, exact: bool) -> Choice:
        """Whether ``rows`` rows behind ``before`` are loaded from a file or prefilled.

        Args:
            exact: whether the file holds the very rows that a prefill makes.
        """
        load, prefill = self.load_seconds(file), self.prefill_seconds(before, rows)
        if load is None or prefill is None:
            return Choice(True, "nothing is measured yet")
        if not exact:
            return Choice(True, "its rows are not those that are computed", load, prefill)
        if prefill >= MARGIN * load:
            return Choice(True, "loading takes no longer", load, prefill)
        self._disks = {disk: DOUBT * seconds for disk, seconds in self._disks.items()}
        self._load_factor = 1 + DOUBT * (self._load_factor - 1)
        return Choice(False, "prefilling is faster", load, prefill)

    def prefilled(self, before: int, rows: int, seconds: float) -> None:
        """Corrects by a prefill that took ``seconds``."""
        if self.prefilling is not None and rows:
            ratio = seconds / self.prefilling.seconds(before, rows)
            self._prefill_factor += WEIGHT * (ratio - self._prefill_factor)

    def loaded(self, file: Stored, seconds: float) -> None:
        """Corrects by a load that took ``seconds``; ``file`` is as it was before."""
        if self.loading is None:
            return
        cached = self.loading.seconds(file.nbytes)
        if file.on_disk == 0:
            self._load_factor += WEIGHT * (seconds / cached - self._load_factor)
        elif file.on_disk > IN_CACHE:
            found = (seconds - self._load_factor * cached) / (file.on_disk * file.nbytes)
            known = self._disks.get(file.device)
            weight = 1.0 if known is None else WEIGHT
            self._disks[file.device] = max(0.0, (known or 0.0) * (1 - weight) + found * weight)

    def facts(self) -> dict[str, Any] | None:
        """For ``status``: seconds and bytes; None before anything was measured."""
        if self.prefilling is None or self.loading is None:
            return None
        byte = self._load_factor * self.loading.byte
        return {
            "prefill_s_for_256_rows": self.prefill_seconds(0, 256),
            "prefill_s_for_256_rows_behind_4096": self.prefill_seconds(4096, 256),
            "load_s_at_least": self._load_factor * self.loading.file,
            "load_bytes_per_s": 1 / byte if byte else None,
            "disks": [
                {
                    "device": f"{os.major(disk)}:{os.minor(disk)}",
                    "bytes_per_s": 1 / (byte + seconds) if byte + seconds else None,
                }
                for disk, seconds in self._disks.items()
            ],
        }
