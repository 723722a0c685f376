"""Counts go from the index into meta.json and back, and change nothing else on the way."""

from __future__ import annotations

import os
import shutil
from typing import Any

import pytest

from memfs.cube import metadata
from memfs.index.history import usage_in, write_back_usage
from memfs.index.lmdb_index import Index, Usage
from memfs.index.rebuild import index_directory, rebuild
from memfs.index.refresh import refresh

Place = Any


@pytest.mark.parametrize(
    ("group", "usage"),
    [
        ({}, Usage()),
        ({"behavioural": {}}, Usage()),
        ({"behavioural": {"reads": 2, "last_used": "1970-01-01T00:00:01.5Z"}}, Usage(2, 0, 1.5)),
        ({"behavioural": {"questions": 3, "last_used": "2026-99-99T00:00:00Z"}}, Usage(0, 3)),
        ({"behavioural": {"reads": 10**30, "questions": 2**64}}, Usage(2**63 - 1, 2**63 - 1)),
    ],
)
def test_what_a_header_says(group: dict[str, Any], usage: Usage) -> None:
    assert usage_in(group) == usage


def test_counts_are_written_back_and_nothing_else_changes(place: Place) -> None:
    header = metadata.new(title="Law") | {"mine": ["ü"]}
    cube = place.cube("law", header=header)
    os.utime(cube / "meta.json", ns=(1, 10**18 + 7))
    (cube / "meta.json").chmod(0o640)
    place.cube("unused")
    for path in ("law", "unused"):
        refresh(place.store, place.index, path, None)
    place.settle()
    refresh(place.store, place.index, "law", None)
    before = (cube / "meta.json").stat()
    place.index.count(metadata.cube_id(header), reads=2, questions=1, at=1767323045.25)

    assert write_back_usage(place.store, place.index) == 1
    after = (cube / "meta.json").stat()
    assert (after.st_mtime_ns, after.st_mode) == (before.st_mtime_ns, before.st_mode)
    written = place.header("law")
    assert (
        written["behavioural"] | {"reads": 0, "questions": 0, "last_used": None}
        == (header["behavioural"])
    )
    assert usage_in(written) == Usage(2, 1, 1767323045.0)
    assert written | {"behavioural": None} == header | {"behavioural": None}
    # Done once; and the index knows the file as it is now.
    assert write_back_usage(place.store, place.index) == 0
    assert not refresh(place.store, place.index, "law", None).matters
    place.index.count(metadata.cube_id(header), reads=1)
    assert write_back_usage(place.store, place.index) == 1


def test_an_index_made_from_files_alone_knows_the_counts(place: Place) -> None:
    place.cube("law")
    refresh(place.store, place.index, "law", None)
    known = place.id_of("law")
    place.index.count(known, reads=5, at=7.0)
    assert write_back_usage(place.store, place.index) == 1
    place.index.close()
    shutil.rmtree(place.index.directory)
    rebuild(place.store, index_directory(place.store))
    with Index.open(index_directory(place.store)) as index:
        assert index.usage(known) == Usage(5, 0, 7.0)


@pytest.mark.parametrize("what", ["gone", "invalid", "changed", "link"])
def test_a_header_that_is_not_as_known_is_left(place: Place, what: str) -> None:
    cube = place.cube("law")
    refresh(place.store, place.index, "law", None)
    place.settle()
    refresh(place.store, place.index, "law", None)
    place.index.count(place.id_of("law"), reads=1)
    path = cube / "meta.json"
    if what == "changed":
        path.write_bytes(metadata.render(metadata.new(title="another")))
    elif what == "invalid":
        path.write_text("{")
    else:
        path.rename(cube / "kept")
        if what == "link":
            path.symlink_to("kept")
    before = {p.name: p.lstat() for p in cube.iterdir()}
    assert write_back_usage(place.store, place.index) == 0
    assert {p.name: p.lstat() for p in cube.iterdir()} == before


def test_an_unmount_does_not_wait_for_long(place: Place) -> None:
    for i in range(3):
        place.cube(f"c{i}")
        refresh(place.store, place.index, f"c{i}", None)
        place.index.count(place.id_of(f"c{i}"), reads=1)
    assert write_back_usage(place.store, place.index, limit_s=0.0) == 0
    assert write_back_usage(place.store, place.index) == 3
