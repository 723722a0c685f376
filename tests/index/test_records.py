"""Keys are short, in order and nobody else's; values come back as they were, or not at all."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memfs.errors import IndexDamaged
from memfs.index.records import (
    MOST,
    Usage,
    dump,
    facet_key,
    load,
    path_key,
    seal,
    seal_usage,
    time_key,
    unseal,
    unseal_usage,
)

names = st.binary(min_size=1, max_size=40).filter(lambda b: b"\0" not in b)
long_names = st.builds(lambda b, n: b * n, names, st.integers(1, 60)).map(os.fsdecode)


@given(long_names, long_names)
def test_a_path_has_a_key_of_its_own(one: str, two: str) -> None:
    assert 0 < len(path_key(one)) <= 500
    assert (path_key(one) == path_key(two)) == (one == two)
    assert facet_key("tag", one) != facet_key("owner", one)


@given(st.floats(0, 4e9), st.floats(0, 4e9))
def test_times_are_in_order(one: float, two: float) -> None:
    if one <= two:
        assert time_key(one) <= time_key(two)


@pytest.mark.parametrize("time", [-1.0, 1e300, float(2**63)])
def test_any_time_has_a_key(time: float) -> None:
    assert len(time_key(time)) == 8


@given(st.binary(min_size=1, max_size=20), st.binary(max_size=100), st.data())
def test_a_changed_value_is_found(key: bytes, content: bytes, data: st.DataObject) -> None:
    sealed = seal(key, content)
    assert unseal(key, sealed) == content
    at = data.draw(st.integers(0, len(sealed) - 1))
    changed = sealed[:at] + bytes([sealed[at] ^ data.draw(st.integers(1, 255))]) + sealed[at + 1 :]
    for wrong_key, value in ((key, changed), (key + b"x", sealed), (key, sealed[:-1]), (key, b"")):
        with pytest.raises(IndexDamaged):
            unseal(wrong_key, value)


counts = st.integers(0, MOST)


@given(st.builds(Usage, counts, counts, st.none() | st.floats(0, 1e12)), st.booleans())
def test_usage_comes_back(usage: Usage, unwritten: bool) -> None:
    assert unseal_usage(b"k", seal_usage(b"k", usage, unwritten=unwritten)) == (usage, unwritten)


def test_a_count_ends_somewhere() -> None:
    value = seal_usage(b"k", Usage(10**30, MOST + 1), unwritten=False)
    assert unseal_usage(b"k", value)[0] == Usage(MOST, MOST)


@given(st.dictionaries(st.text(st.characters()), st.text(st.characters())))
def test_any_text_comes_back(data: dict[str, str]) -> None:
    assert load(dump(data)) == data
