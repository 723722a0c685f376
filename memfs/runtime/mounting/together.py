"""Which cubes a user uses together, learned from what was asked and mounted. Pure and bounded.

Two cubes are together where they were in one question, or were mounted within ``SECONDS`` of one
another, ``OFTEN`` times. A burst of more than ``MOST`` mounts is a scan and teaches nothing. Used
by ``ahead``, in the service's event loop.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable

from memfs.runtime.cubes import Cube

SECONDS = 5.0
"""Between two mounts that belong together."""
OFTEN = 2
MOST = 8
"""Cubes of one burst or question, and companions of one cube; twice as many are on trial."""
CUBES = 256
"""Cubes remembered of one user."""
USERS = 64


class Together:
    """What one user uses together."""

    def __init__(self) -> None:
        self._seen: OrderedDict[str, Counter[str]] = OrderedDict()
        self._cubes: dict[str, Cube] = {}
        self._burst: dict[str, Cube] = {}
        self._last = 0.0

    def mounted(self, cube: Cube, now: float) -> None:
        """A cube was mounted; ``now`` is in seconds, from any beginning."""
        if now - self._last > SECONDS:
            self._learn(self._burst.values())
            self._burst = {}
        self._last = now
        self._burst[cube.key] = cube

    def asked(self, cubes: list[Cube]) -> None:
        """Cubes were in one question."""
        self._learn(cubes)

    def companions(self, cube: Cube) -> list[Cube]:
        """Those that are used together with a cube, the most frequent first."""
        found = self._seen.get(cube.key, Counter())
        return [self._cubes[key] for key, times in found.most_common(MOST) if times >= OFTEN]

    def _learn(self, cubes: Iterable[Cube]) -> None:
        group = {cube.key: cube for cube in cubes}
        if not 2 <= len(group) <= MOST:
            return
        self._cubes |= group
        for key in group:
            counts = self._seen.setdefault(key, Counter())
            self._seen.move_to_end(key)
            counts.update(other for other in group if other != key)
            while len(counts) > 2 * MOST:
                del counts[min(counts, key=counts.__getitem__)]  # of the rarest, the oldest
        while len(self._seen) > CUBES:
            self._seen.popitem(last=False)
        named = set(self._seen).union(*self._seen.values())
        self._cubes = {key: cube for key, cube in self._cubes.items() if key in named}
