"""Which KV caches stay in memory: a byte budget, segmented LRU, pins.

A memory used once is on probation, one used again is protected; protected ones take at most
``PROTECTED_SHARE`` of the budget, so a scan of many cubes pushes out only what was itself scanned
(segmented LRU, Karedla et al. 1994). What is pinned, ``PINNED_SHARE`` of the budget at most, or in
use by an answer is never evicted.
Plain bookkeeping without torch; belongs to the service's event loop.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from memfs.errors import OverBudget

PROTECTED_SHARE = 0.8
PINNED_SHARE = 0.8
"""Of the budget, at most, by pinned ones: what is asked next must find room."""


class Sized(Protocol):
    """What can be kept: it knows its bytes."""

    @property
    def nbytes(self) -> int:
        """Bytes of memory it holds."""


T = TypeVar("T", bound=Sized)


@dataclass
class Entry(Generic[T]):
    """Something resident."""

    key: str
    value: T
    tokens: int
    hits: int = 0
    pinned: bool = False
    protected: bool = False
    users: int = field(default=0)
    """Answers that are using it now."""


class Residency(Generic[T]):
    """Entries within a byte budget."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self._probation: OrderedDict[str, Entry[T]] = OrderedDict()  # least recently used first
        self._protected: OrderedDict[str, Entry[T]] = OrderedDict()

    @property
    def used_bytes(self) -> int:
        """Bytes held by all entries."""
        return sum(entry.value.nbytes for entry in self)

    def __iter__(self) -> Iterator[Entry[T]]:
        yield from self._protected.values()
        yield from self._probation.values()

    def peek(self, key: str) -> Entry[T] | None:
        """The entry, without counting a use."""
        return self._protected.get(key) or self._probation.get(key)

    def use(self, key: str) -> Entry[T] | None:
        """The entry, counted as used: the second use protects it."""
        entry = self.peek(key)
        if entry is None:
            return None
        entry.hits += 1
        if entry.protected:
            self._protected.move_to_end(key)
        elif entry.hits > 1:
            del self._probation[key]
            entry.protected = True
            self._protected[key] = entry
            self._demote()
        else:
            self._probation.move_to_end(key)
        return entry

    def make_room(self, nbytes: int) -> list[Entry[T]]:
        """Evicts until ``nbytes`` more fit, those on probation first; gives what went.

        Raises OverBudget, and evicts nothing, where they cannot fit.
        """
        missing = self.used_bytes + nbytes - self.budget_bytes
        going = self._coldest(missing)
        if sum(entry.value.nbytes for entry in going) < missing:
            # Not how much is: whose it is, is not known here, nor who will read this.
            raise OverBudget(
                f"{nbytes} bytes are wanted; too much of the budget of {self.budget_bytes} bytes "
                "is pinned or in use; `memfs pin --off` something, or raise budget_bytes"
            )
        for entry in going:
            self.remove(entry.key)
        return going

    def pin(self, entry: Entry[T]) -> None:
        """Keeps an entry until it is unpinned. Raises OverBudget where too much would be pinned."""
        pinned = sum(other.value.nbytes for other in self if other.pinned and other is not entry)
        if pinned + entry.value.nbytes > self.budget_bytes * PINNED_SHARE:
            raise OverBudget(
                f"{entry.value.nbytes} more bytes cannot be pinned: what is pinned may take "
                f"{PINNED_SHARE:.0%} of the budget of {self.budget_bytes} bytes; `memfs pin --off` "
                "another one, or raise budget_bytes"
            )
        entry.pinned = True

    def shed(self, nbytes: int) -> list[Entry[T]]:
        """Evicts ``nbytes``, or all that may go where that is less; gives what went."""
        going = self._coldest(nbytes)
        for entry in going:
            self.remove(entry.key)
        return going

    def _coldest(self, nbytes: int) -> list[Entry[T]]:
        """What would have to go for ``nbytes`` to be free, in the order of going."""
        going: list[Entry[T]] = []
        for entry in [*self._probation.values(), *self._protected.values()]:
            if nbytes <= 0:
                break
            if not entry.pinned and not entry.users:
                going.append(entry)
                nbytes -= entry.value.nbytes
        return going

    def add(self, key: str, value: T, tokens: int) -> Entry[T]:
        """A new entry, on probation. Room must have been made for it."""
        entry = Entry(key, value, tokens)
        self._probation[key] = entry
        return entry

    def remove(self, key: str) -> Entry[T] | None:
        """Takes an entry out; who is using it may finish."""
        return self._probation.pop(key, None) or self._protected.pop(key, None)

    def rename(self, key: str, new: str) -> None:
        """Gives an entry another key, in its place in the order."""
        if key == new:
            return
        for segment in (self._probation, self._protected):
            for entry in list(segment.values()):
                del segment[entry.key]
                if entry.key == key:
                    entry.key = new
                segment[entry.key] = entry

    def _demote(self) -> None:
        """Sends the least recently used protected entries back while they are over their share."""
        limit = self.budget_bytes * PROTECTED_SHARE
        held = sum(entry.value.nbytes for entry in self._protected.values())
        for entry in list(self._protected.values())[:-1]:
            if held <= limit:
                return
            if not entry.pinned:
                held -= entry.value.nbytes
                del self._protected[entry.key]
                entry.protected = False
                self._probation[entry.key] = entry
