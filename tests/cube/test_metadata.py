"""meta.json: what is made, what is taken, what is refused and named."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memfs.cube import metadata
from memfs.errors import InvalidMetadata

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


def changed(path: str, value: object) -> bytes:
    """A new header with one value set, by its dotted path."""
    meta: Any = metadata.new(title="Law")
    *above, last = path.split(".")
    place = meta
    for name in above:
        place = place[name]
    place[last] = value
    return json.dumps(meta).encode()


def test_what_is_made_is_valid_and_has_every_field_of_the_schema() -> None:
    made = metadata.new(title="Law")
    metadata.check(made)
    assert metadata.parse(metadata.render(made)) == made
    groups = metadata.schema()["properties"]
    for group in ("descriptive", "governance", "behavioural"):
        assert set(made[group]) == set(groups[group]["properties"])
    assert metadata.cube_id(made) != metadata.cube_id(metadata.new())


def test_every_field_of_the_schema_is_described() -> None:
    schema = metadata.schema()
    for group in ("descriptive", "governance", "behavioural"):
        for name, field in schema["properties"][group]["properties"].items():
            assert field["description"], name


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("memfs", 2),
        ("descriptive.id", "not-a-uuid"),
        ("descriptive.tags", ["a", "a"]),
        ("descriptive.tags", "a"),
        ("descriptive.created", "yesterday"),
        ("governance.mode", "0999"),
        ("governance.access", [{"who": "Ann", "rights": []}]),
        ("governance.access", [{"who": "user:ann", "rights": ["fly"]}]),
        ("governance.priority", 101),
        ("governance.priority", True),
        ("governance.sensitivity", "hush"),
        ("behavioural.reads", -1),
        ("behavioural.versions", ["ab"]),
        ("state.lifecycle", "lost"),
        ("state.frozen", 1),
    ],
)
def test_a_wrong_value_is_refused_by_name(path: str, value: object) -> None:
    with pytest.raises(InvalidMetadata) as raised:
        metadata.parse(changed(path, value))
    assert path in str(raised.value)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"{}",
        b'{"memfs": 1}',
        b"\xff",
        b"[" * 200_000,
        b'{"memfs": NaN}',
        b'{"memfs": 1e999}',
        b'"' + b"x" * metadata.MAX_BYTES + b'"',
    ],
)
def test_what_is_no_header_is_refused(text: bytes) -> None:
    with pytest.raises(InvalidMetadata):
        metadata.parse(text)


@given(st.dictionaries(st.text(), JSON, max_size=4))
def test_unknown_keys_are_kept(extra: dict[str, Any]) -> None:
    meta = metadata.new()
    for place in (meta, meta["descriptive"], meta["governance"]):
        for key, value in extra.items():
            place.setdefault(key, value)
    assert metadata.parse(metadata.render(meta)) == meta


def test_live_values_are_laid_over_and_nothing_is_changed() -> None:
    stored = metadata.new()
    before = json.dumps(stored)
    live = {"behavioural": {"reads": 3}, "state": {"kv": {"state": "ready"}}}
    shown = metadata.show(stored, live)
    assert shown["behavioural"] == stored["behavioural"] | {"reads": 3}
    assert shown["state"]["kv"] == {"state": "ready"}
    assert shown["state"]["frozen"] is False
    assert json.dumps(stored) == before
    assert live["state"] == {"kv": {"state": "ready"}}


def test_a_copy_has_its_own_id_and_says_what_it_is_a_copy_of() -> None:
    original = metadata.new(title="Law") | {"mine": [1]}
    original["behavioural"]["reads"] = 7
    copied = metadata.as_copy(original)
    metadata.check(copied)
    assert copied["descriptive"]["id"] != original["descriptive"]["id"]
    assert copied["descriptive"]["origin"]["copied_from"] == original["descriptive"]["id"]
    assert copied["behavioural"]["reads"] == 0
    assert copied["mine"] == [1]


def test_a_header_with_the_least_there_may_be_can_be_copied() -> None:
    least = {"memfs": 1, "descriptive": {"id": metadata.cube_id(metadata.new())}}
    metadata.check(metadata.as_copy(least))


def test_times() -> None:
    assert metadata.rfc3339(0) == "1970-01-01T00:00:00Z"


@pytest.mark.parametrize("text", ["\ud800", "a\udcffb"])
def test_half_a_surrogate_pair_survives(text: str) -> None:
    meta = metadata.new(title=text)
    assert metadata.parse(metadata.render(meta)) == meta


@pytest.mark.parametrize("depth", [metadata.MAX_DEPTH, 500, 100_000])
def test_a_header_too_deep_to_walk_is_refused(depth: int) -> None:
    text = metadata.render(metadata.new()).rstrip()[:-1] + b', "deep": '
    with pytest.raises(InvalidMetadata):
        metadata.parse(text + b"[" * depth + b"]" * depth + b"}")


def test_a_header_may_be_as_deep_as_anyone_needs() -> None:
    deep: object = 1
    for _ in range(metadata.MAX_DEPTH - 1):
        deep = {"in": deep}
    meta = metadata.new() | {"deep": deep}
    assert metadata.parse(metadata.render(meta)) == meta
    metadata.check(metadata.as_copy(meta))
    assert metadata.show(meta, {})["deep"] == deep
