"""Times as people type them."""

from __future__ import annotations

import time
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memfs.operation.moment import end_of


@pytest.mark.parametrize(
    ("text", "end"),
    [
        ("2026Z", "2026-12-31T23:59:59.999999"),
        ("2026-11Z", "2026-11-30T23:59:59.999999"),
        ("2026-12Z", "2026-12-31T23:59:59.999999"),
        ("2026-11-22Z", "2026-11-22T23:59:59.999999"),
        ("2026-11-22T10Z", "2026-11-22T10:59:59.999999"),
        ("2026-11-22T10:42Z", "2026-11-22T10:42:59.999999"),
        ("2026-11-22 10:42Z", "2026-11-22T10:42:59.999999"),
        ("2026-11-22_10:42+01:00", "2026-11-22T09:42:59.999999"),
        ("2026-11-22T10:42-0130", "2026-11-22T12:12:59.999999"),
        ("2026-11-22T10:42:13Z", "2026-11-22T10:42:13.999999"),
        ("2026-11-22T10:42:13.1Z", "2026-11-22T10:42:13.199999"),
        ("2026-11-22T10:42:13.123456Z", "2026-11-22T10:42:13.123456"),
    ],
)
def test_the_end_of_what_was_named(text: str, end: str) -> None:
    assert end_of(text) == datetime.fromisoformat(end + "+00:00")


@pytest.mark.parametrize(
    "text",
    [
        *("", "now", "2026-13", "2026-02-30", "2026-11-22T25", "2026-11-22T10:42z", "26-11-22"),
        *("9999Z", "2026-11-22T10:42:13.1234567Z", "2026-11-22T10:42+25:00", "٢٠٢٦"),
    ],
)
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        end_of(text)


def test_local_time_where_no_zone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    try:
        assert end_of("2026-11-22T10:42") == end_of("2026-11-22T09:42Z")
        assert end_of("2026-07-01") == end_of("2026-07-01T21:59Z")
    finally:
        monkeypatch.undo()
        time.tzset()


@given(st.datetimes(datetime(1970, 1, 2), datetime(2200, 1, 1), timezones=st.just(UTC)))
def test_a_stamp_names_itself(moment: datetime) -> None:
    text = moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    assert end_of(text) == moment
    assert end_of(text[:10] + "Z") >= moment
    assert end_of(text[:16] + "Z") >= moment
