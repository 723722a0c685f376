"""Which denials the audit trail is told of."""

from __future__ import annotations

from typing import Any

import pytest

from memfs.filesystem.audit import DENIALS, WITHIN_SECONDS, Denials


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def denials(clock: Clock) -> Denials:
    return Denials(clock)


def denied(path: str, uid: int = 1001) -> dict[str, Any]:
    return {"event": "denied", "path": path, "right": "read", "reason": "mode", "uid": uid}


def test_one_that_repeats_is_told_of_once_a_second(denials: Denials, clock: Clock) -> None:
    assert denials.is_told(denied("a"))
    assert not denials.is_told(denied("a"))
    assert denials.is_told(denied("b"))
    assert denials.is_told(denied("a", uid=1002))
    clock.now += 1.01
    assert denials.is_told(denied("a"))


def test_nobody_drives_the_others_out(denials: Denials, clock: Clock) -> None:
    """However many files there are that somebody may not read."""
    told = [denials.is_told(denied(f"cube{number}")) for number in range(20_000)]
    assert sum(told) == DENIALS
    assert denials.is_told(denied("a", uid=1002))
    assert denials.is_told({"event": "changed", "path": "a", "uid": 1001})
    assert list(denials.left_out()) == []
    clock.now += WITHIN_SECONDS + 1
    (event,) = denials.left_out()
    assert event["event"] == "trail"
    assert f"{20_000 - DENIALS} more denials of uid 1001" in event["what"]
    assert denials.is_told(denied("a"))


def test_thousands_of_user_ids_are_counted_together(denials: Denials) -> None:
    told = [denials.is_told(denied(f"cube{n}", uid=n)) for n in range(50_000)]
    assert DENIALS <= sum(told) < 2 * DENIALS
    (event,) = denials.left_out(ending=True)
    assert f"{50_000 - sum(told)} more denials of others" in event["what"]
    assert list(denials.left_out(ending=True)) == []
