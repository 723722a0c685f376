"""Segmented LRU within a byte budget: a scan cannot push out what is used."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memfs.errors import OverBudget
from memfs.runtime.mounting.residency import PROTECTED_SHARE, Residency


@dataclass
class Block:
    nbytes: int


def filled(budget: int, *names: str) -> Residency[Block]:
    residency: Residency[Block] = Residency(budget)
    for name in names:
        put(residency, name)
    return residency


def put(residency: Residency[Block], name: str, nbytes: int = 1) -> list[str]:
    """As the service does it: room is made, it is added, it is used."""
    gone = [entry.key for entry in residency.make_room(nbytes)]
    residency.add(name, Block(nbytes), tokens=nbytes)
    residency.use(name)
    return gone


def names(residency: Residency[Block]) -> set[str]:
    return {entry.key for entry in residency}


def test_the_least_recently_used_goes_first() -> None:
    residency = filled(3, "a", "b", "c")
    assert put(residency, "d") == ["a"]
    assert put(residency, "e") == ["b"]


def test_a_scan_does_not_push_out_what_was_used_twice() -> None:
    residency = filled(10, "used", "also")
    residency.use("used")
    residency.use("also")
    for number in range(1000):
        put(residency, f"scanned {number}")
    assert {"used", "also"} <= names(residency)


def test_what_is_protected_goes_back_on_probation_when_there_is_too_much() -> None:
    residency = filled(10, *"abcdefghij")
    for name in "abcdefghij":
        residency.use(name)
    protected = [entry.key for entry in residency if entry.protected]
    assert len(protected) == 10 * PROTECTED_SHARE
    assert put(residency, "k") == ["a"], "the first to be protected was the first sent back"


def test_pinned_and_used_entries_stay() -> None:
    residency = filled(3, "pinned", "asked", "idle")
    pinned, asked = residency.peek("pinned"), residency.peek("asked")
    assert pinned and asked
    pinned.pinned = True
    asked.users = 1
    assert put(residency, "new") == ["idle"]
    assert put(residency, "newer") == ["new"]
    with pytest.raises(OverBudget, match="pinned or in use"):
        residency.make_room(2)
    assert names(residency) == {"pinned", "asked", "newer"}, "a refusal evicts nothing"


def test_what_is_larger_than_the_budget_is_refused() -> None:
    residency = filled(3, "a")
    with pytest.raises(OverBudget):
        residency.make_room(4)
    assert names(residency) == {"a"}


def test_rename_keeps_the_place() -> None:
    residency = filled(3, "a", "b", "c")
    residency.rename("a", "z")
    assert residency.peek("a") is None
    assert put(residency, "d") == ["z"]


@given(st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(1, 6)), max_size=60))
def test_the_budget_holds(uses: list[tuple[str, int]]) -> None:
    residency: Residency[Block] = Residency(12)
    for name, nbytes in uses:
        if residency.use(name) is None:
            put(residency, name, nbytes)
        assert residency.used_bytes <= 12
        assert residency.peek(name) is not None
        assert len({e.key for e in residency}) == len(list(residency))


def test_pins_leave_room_for_what_is_asked_next() -> None:
    residency = filled(10, *"abcdefghij")
    for name in "abcdefgh":
        entry = residency.peek(name)
        assert entry
        residency.pin(entry)
        residency.pin(entry)  # which changes nothing
    ninth = residency.peek("i")
    assert ninth
    with pytest.raises(OverBudget, match="memfs pin --off"):
        residency.pin(ninth)
    assert not ninth.pinned
    put(residency, "new", 2)
    assert {*"abcdefgh", "new"} == names(residency)
