"""What a user uses together, and what is no such thing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from memfs.runtime.cubes import Cube
from memfs.runtime.mounting import together
from memfs.runtime.mounting.together import Together
from memfs.vault.store import Store


@pytest.fixture
def cube(tmp_path: Path) -> Iterator[Callable[[str], Cube]]:
    with Store.open(tmp_path, create_control=False) as store:
        yield lambda path: Cube(store, path)


def test_one_question_teaches_nothing_and_two_do(cube: Callable[[str], Cube]) -> None:
    known = Together()
    a, b, c = cube("a"), cube("b"), cube("c")
    known.asked([a, b])
    assert known.companions(a) == []
    known.asked([b, a, c])
    assert known.companions(a) == [b] and known.companions(b) == [a]
    known.asked([a])
    assert known.companions(c) == []


def test_mounts_in_one_burst_are_together(cube: Callable[[str], Cube]) -> None:
    known = Together()
    for began in (0.0, 100.0, 200.0):
        known.mounted(cube("a"), began)
        known.mounted(cube("b"), began + 1)
        known.mounted(cube("later"), began + 50)
    assert known.companions(cube("a")) == [cube("b")]
    assert known.companions(cube("later")) == []


def test_a_scan_is_none(cube: Callable[[str], Cube]) -> None:
    known = Together()
    for began in range(0, 5000, 1000):
        for number in range(together.MOST + 1):
            known.mounted(cube(f"c{number}"), began + number)
    known.mounted(cube("end"), 9999.0)
    assert all(known.companions(cube(f"c{number}")) == [] for number in range(together.MOST + 1))


def test_it_is_bounded(cube: Callable[[str], Cube]) -> None:
    known = Together()
    center = cube("center")
    for number in range(3 * together.CUBES):
        for _ in range(together.OFTEN):
            known.asked([center, cube(f"c{number}")])
    assert len(known.companions(center)) <= together.MOST
    assert len(known._seen) <= together.CUBES
    assert len(known._cubes) <= together.CUBES * (2 * together.MOST + 1)


def test_a_new_companion_takes_the_place_of_what_was_chance(cube: Callable[[str], Cube]) -> None:
    known = Together()
    for number in range(3 * together.MOST):
        known.asked([cube("a"), cube(f"once {number}")])
    for _ in range(together.OFTEN):
        known.asked([cube("a"), cube("new")])
    assert known.companions(cube("a")) == [cube("new")]
