"""Times as people type them, for a look at the past. Pure; used by the mount and the commands."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta, timezone

_MOMENT = re.compile(
    r"(?P<year>\d{4})(-(?P<month>\d\d)(-(?P<day>\d\d)"
    r"([T _](?P<hour>\d\d)(:(?P<minute>\d\d)(:(?P<second>\d\d)(\.(?P<part>\d{1,6}))?)?)?)?)?)?"
    r"(?P<zone>Z|[+-]\d\d:?\d\d)?",
    re.ASCII,
)
_LEAST = {"year": 1, "month": 1, "day": 1, "hour": 0, "minute": 0, "second": 0}
_TICK = timedelta(microseconds=1)


def end_of(text: str) -> datetime:
    """The last microsecond, in UTC, of the year, month, day, hour, minute or second in ``text``.

    ``2026-11-22`` is all of that day, ``2026-11-22T10:42`` all of that minute. Local time; in UTC
    with a ``Z``, or with an offset such as ``+01:00``. Raises ValueError.
    """
    found = _MOMENT.fullmatch(text)
    if found is None:
        raise ValueError(f"{text!r} is no time: 2026-11-22, 2026-11-22T10:42 or 2026-11-22T09:42Z")
    parts = found.groupdict()
    fraction = parts["part"] or ""
    numbers = [int(parts[name] or least) for name, least in _LEAST.items()]
    try:
        year, month, day, hour, minute, second = numbers
        start = datetime(year, month, day, hour, minute, second, int(fraction.ljust(6, "0")))
        unit = [name for name in _LEAST if parts[name] is not None][-1]
        end = _after(start, unit, len(fraction)) - _TICK
        return _zoned(end, parts["zone"]).astimezone(UTC)
    except OverflowError as e:
        raise ValueError(f"{text!r} is too far away") from e


def _after(start: datetime, unit: str, digits: int) -> datetime:
    """When the unit of time that begins at ``start`` is over."""
    if digits:
        return start + timedelta(microseconds=10 ** (6 - digits))
    if unit == "year":
        return start.replace(year=start.year + 1)
    if unit == "month":
        return (start + timedelta(days=31)).replace(day=1)
    return start + timedelta(**{f"{unit}s": 1})


def _zoned(moment: datetime, zone: str | None) -> datetime:
    if zone is None:
        return moment.astimezone()
    if zone == "Z":
        return moment.replace(tzinfo=UTC)
    sign, hours, minutes = zone[0], int(zone[1:3]), int(zone[-2:])
    offset = timedelta(hours=hours, minutes=minutes)
    return moment.replace(tzinfo=timezone(-offset if sign == "-" else offset))
