"""Which versions are kept: the policy's promises, for any history."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from memfs.operation.retention import (
    DAILY,
    EVERYTHING,
    GONE,
    HOURLY,
    Held,
    expired,
    over_budget,
    room,
)

NOW = datetime(2026, 11, 22, 10, 42, tzinfo=UTC)
ages = st.lists(
    st.integers(0, 400 * 86400).map(lambda seconds: timedelta(seconds=seconds)),
    unique=True,
    max_size=60,
)


def history(ages: list[timedelta]) -> list[datetime]:
    return sorted(NOW - age for age in ages)


@given(ages)
def test_a_living_cube_keeps_its_newest_and_all_of_a_day(ages: list[timedelta]) -> None:
    times = history(ages)
    gone = expired(times, NOW, deleted=False)
    assert times[-1:] == [time for time in times[-1:] if time not in gone]
    assert all(NOW - time > EVERYTHING for time in gone)
    assert gone == sorted(gone)


@given(ages)
def test_of_every_hour_day_and_week_the_last_is_kept(ages: list[timedelta]) -> None:
    times = history(ages)
    gone = set(expired(times, NOW, deleted=False))
    for time in gone:
        age = NOW - time
        span = timedelta(hours=1) if age <= HOURLY else timedelta(days=1 if age <= DAILY else 7)
        assert any(time < other < time + span for other in times if other not in gone)


@given(ages, st.integers(0, 60 * 86400))
def test_what_is_kept_stays_kept_whenever_one_looks(ages: list[timedelta], later: int) -> None:
    """Pruning often keeps what pruning once would: nothing depends on when it is done."""
    times = history(ages)
    kept = [time for time in times if time not in expired(times, NOW, deleted=False)]
    assert expired(kept, NOW, deleted=False) == []
    then = NOW + timedelta(seconds=later)
    at_once = [time for time in times if time not in expired(times, then, deleted=False)]
    twice = [time for time in kept if time not in expired(kept, then, deleted=False)]
    assert set(twice) <= set(at_once) | set(kept)
    assert twice[-1:] == at_once[-1:]


@given(ages)
def test_a_deleted_cube_is_kept_for_a_month(ages: list[timedelta]) -> None:
    times = history(ages)
    gone = expired(times, NOW, deleted=True)
    if times and NOW - times[-1] > GONE:
        assert gone == times
    else:
        assert gone == expired(times, NOW, deleted=False)


def test_the_policy_by_example() -> None:
    minutes = [NOW - timedelta(minutes=20 * n) for n in range(3 * 24 * 30)]
    times = sorted(minutes)
    kept = [time for time in times if time not in expired(times, NOW, deleted=False)]
    ages = [NOW - time for time in kept]
    assert sum(age <= EVERYTHING for age in ages) == 3 * 24 + 1
    assert sum(EVERYTHING < age <= HOURLY for age in ages) in (6 * 24, 6 * 24 + 1)
    assert sum(age > HOURLY for age in ages) in (23, 24)


held = st.lists(
    st.builds(
        Held,
        st.sampled_from(["a", "b", "c"]),
        st.integers(0, 50).map(str),
        st.dictionaries(st.integers(0, 30), st.just(10), max_size=4),
        st.booleans(),
    ),
    unique_by=lambda version: (version.cube_id, version.stamp),
    max_size=40,
)


def taken(versions: list[Held]) -> int:
    return sum({n: size for v in versions for n, size in v.blocks.items()}.values())


@given(held, st.integers(0, 400), st.integers(-400, 400))
def test_the_budget_is_kept_and_no_more_goes_than_must(
    versions: list[Held], budget: int, room: int
) -> None:
    allowed = min(budget, taken(versions) + room)
    going = over_budget(versions, budget, room)
    rest = [version for version in versions if version not in going]
    assert not any(version.protected for version in going)
    assert taken(rest) <= allowed or all(version.protected for version in rest)
    assert [v.stamp for v in going] == sorted(v.stamp for v in going)
    if going:
        assert taken([*rest, going[-1]]) > allowed


def test_a_twentieth_of_the_disk_is_left_free_at_most_a_gibibyte() -> None:
    assert room(free=1000, disk=8000) == 600
    assert room(free=100, disk=8000) == -300
    assert room(free=1 << 30, disk=1 << 40) == 0
