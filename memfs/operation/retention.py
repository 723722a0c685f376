"""Which versions are kept. Pure functions, used by the mount's housekeeping.

Of a living cube: every version for a day, the last of each hour for a week, the last of each day
for a month, the last of each week after that; and the newest, always. Of a deleted cube: the same,
until it has been gone for a month. Where all versions of a store together take more than the budget
the oldest go first, whosever they are, but never the newest of a living cube. Likewise where they
leave too little of the disk free: whoever writes to it goes before what was.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

EVERYTHING = timedelta(days=1)
HOURLY = timedelta(days=7)
DAILY = timedelta(days=31)
GONE = timedelta(days=30)
"""How long a deleted cube can be brought back."""
FREE_SHARE, FREE_MOST = 20, 1 << 30
"""Versions leave a twentieth of the disk free, but no more than so many bytes."""


@dataclass(frozen=True)
class Held:
    """A version as the budget sees it."""

    cube_id: str
    stamp: str
    blocks: Mapping[int, int]
    """Bytes on the disk of each of its files, by the file's number: several may share one."""
    protected: bool = False
    """Whether it is the newest of a living cube."""


def expired(times: Sequence[datetime], now: datetime, *, deleted: bool) -> list[datetime]:
    """Those of a cube's versions that are not kept any longer.

    Args:
        times: when its versions were made, oldest first; no two are the same.
        deleted: whether the newest of them is the cube's end.
    """
    if not times or (deleted and now - times[-1] > GONE):
        return list(times)
    last: dict[tuple[object, ...], datetime] = {_span(time, now): time for time in times}
    kept = {*last.values(), times[-1]}
    return [time for time in times if time not in kept]


def room(free: int, disk: int) -> int:
    """By how many bytes versions may grow; where it is less than nothing they have to shrink.

    Args:
        free: bytes of the disk.
        disk: all of its bytes.
    """
    return free - min(disk // FREE_SHARE, FREE_MOST)


def over_budget(held: Iterable[Held], budget: int, room: int) -> list[Held]:
    """The versions that have to go, oldest first, for the rest to take no more than ``budget``,
    and than there is ``room`` for.

    The newest of living cubes stay, and may take more than that by themselves.
    """
    ordered = sorted(held, key=lambda version: (version.stamp, version.cube_id))
    size = {number: count for version in ordered for number, count in version.blocks.items()}
    users = Counter(number for version in ordered for number in version.blocks)
    total, going = sum(size.values()), []
    budget = min(budget, total + room)
    for version in ordered:
        if total <= budget:
            break
        if version.protected:
            continue
        going.append(version)
        for number in version.blocks:
            users[number] -= 1
            if not users[number]:
                total -= size[number]
    return going


def _span(time: datetime, now: datetime) -> tuple[object, ...]:
    """What a version is the only one kept of: itself, its hour, its day or its week."""
    age = now - time
    if age <= EVERYTHING:
        return (time,)
    if age <= HOURLY:
        return (time.date(), time.hour)
    if age <= DAILY:
        return (time.date(),)
    return time.isocalendar()[:2]
