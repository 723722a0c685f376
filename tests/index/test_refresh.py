"""The index follows the files: each way of changing them, and the identities that go with it."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from memfs.cube import layout, metadata
from memfs.index.lmdb_index import Usage
from memfs.index.refresh import Change, refresh, refresh_all, rescan

Place = Any


def test_a_new_cube_is_indexed_and_gets_an_identity(place: Place) -> None:
    place.cube("work/law")
    change = refresh(place.store, place.index, "work/law", None)
    assert change.before is None
    assert change.after is not None
    assert change.matters
    assert place.index.get("work/law") == change.after
    assert place.index.by_id(place.id_of("work/law")) == ("work/law", change.after)


def test_what_is_no_cube_is_not_indexed(place: Place) -> None:
    place.cube("work/law")
    for path in ("work", "missing", ""):
        assert refresh(place.store, place.index, path, None) == Change(path, None, None)
    assert len(place.index) == 0


def test_nothing_matters_where_nothing_changed(place: Place) -> None:
    place.cube("law")
    refresh(place.store, place.index, "law", None)
    place.settle()
    assert not refresh(place.store, place.index, "law", None).matters
    assert not refresh(place.store, place.index, "law", None).matters
    os.utime(place.store.root / "law" / "payload.md", ns=(0, 0))
    assert refresh(place.store, place.index, "law", None).matters


def test_rm_r_halfway_is_not_undone(place: Place) -> None:
    """A cube whose header is gone does not get one while the rest is being removed."""
    cube = place.cube("law")
    refresh(place.store, place.index, "law", None)
    known = place.id_of("law")
    (cube / "meta.json").unlink()
    assert refresh(place.store, place.index, "law", None).after.id == known
    assert not (cube / "meta.json").exists()
    (cube / "payload.md").write_text("a new text")
    refresh(place.store, place.index, "law", None)
    assert place.id_of("law") == known
    (cube / "meta.json").unlink()
    refresh(place.store, place.index, "law", None, adopting=True)
    assert place.id_of("law") == known
    shutil.rmtree(cube)
    assert refresh(place.store, place.index, "law", None).after is None
    assert len(place.index) == 0
    place.cube("law")
    refresh(place.store, place.index, "law", None)
    assert place.id_of("law") != known


def test_a_copy_is_told_apart(place: Place) -> None:
    place.cube("law")
    refresh(place.store, place.index, "law", None)
    original = place.id_of("law")
    shutil.copytree(place.store.root / "law", place.store.root / "copy")
    change = refresh(place.store, place.index, "copy", None)
    assert place.id_of("law") == original
    assert place.id_of("copy") == change.after.id != original
    assert place.header("copy")["descriptive"]["origin"]["copied_from"] == original
    assert place.index.by_id(original)[0] == "law"
    assert place.index.shared_ids() == []
    # Copying the header over once more is found out, too.
    shutil.copy(place.store.root / "law" / "meta.json", place.store.root / "copy" / "meta.json")
    refresh(place.store, place.index, "copy", None)
    assert place.id_of("copy") != original
    assert not place.index.key_errors()


def test_a_move_beside_the_mount_keeps_the_id(place: Place) -> None:
    place.cube("a/law")
    refresh(place.store, place.index, "a/law", None)
    known = place.id_of("a/law")
    place.index.count(known, reads=3)
    (place.store.root / "a").rename(place.store.root / "b")
    refresh_all(place.store, place.index, ["a", "a/law", "b", "b/law"], None)
    assert [path for path, _ in place.index.under("")] == ["b/law"]
    assert place.id_of("b/law") == known
    assert place.index.by_id(known)[0] == "b/law"
    assert place.index.usage(known).reads == 3


def test_a_move_told_in_the_wrong_order(place: Place) -> None:
    place.cube("law")
    refresh(place.store, place.index, "law", None)
    known = place.id_of("law")
    (place.store.root / "law").rename(place.store.root / "new")
    refresh(place.store, place.index, "new", None)
    assert place.id_of("new") == known
    refresh(place.store, place.index, "law", None)
    assert place.index.by_id(known)[0] == "new"


def test_two_cubes_that_change_places(place: Place) -> None:
    for name in "ab":
        place.cube(name, name)
        refresh(place.store, place.index, name, None)
    ids = {name: place.id_of(name) for name in "ab"}
    root = place.store.root
    (root / "a").rename(root / "c")
    (root / "b").rename(root / "a")
    (root / "c").rename(root / "b")
    refresh_all(place.store, place.index, ["a", "b", "c"], None)
    assert (place.id_of("a"), place.id_of("b")) == (ids["b"], ids["a"])
    assert place.index.by_id(ids["a"])[0] == "b"
    assert place.index.by_id(ids["b"])[0] == "a"
    assert not place.index.key_errors()


def test_a_directory_that_is_gone_takes_its_cubes_along(place: Place) -> None:
    for path in ("w/a", "w/deep/b", "x"):
        place.cube(path)
        refresh(place.store, place.index, path, None)
    shutil.rmtree(place.store.root / "w")
    changes: list[Change] = []
    refresh_all(place.store, place.index, {"w"}, None, changes.append)
    assert [change.path for change in changes] == ["w/a", "w/deep/b"]
    assert all(change.after is None for change in changes)
    assert [path for path, _ in place.index.under("")] == ["x"]


def test_a_directory_that_became_a_link_is_gone(place: Place, tmp_path: Path) -> None:
    place.cube("w/a")
    refresh(place.store, place.index, "w/a", None)
    (place.store.root / "w").rename(tmp_path / "outside")
    (place.store.root / "w").symlink_to(tmp_path / "outside")
    refresh_all(place.store, place.index, {"w"}, None)
    assert len(place.index) == 0


def test_a_cube_from_another_machine_brings_its_history(place: Place) -> None:
    header = metadata.new(title="Law")
    header["behavioural"] |= {"reads": 5, "questions": 2, "last_used": "2026-01-02T03:04:05Z"}
    place.cube("law", header=header)
    refresh(place.store, place.index, "law", None)
    known = metadata.cube_id(header)
    assert place.id_of("law") == known
    assert place.index.usage(known) == Usage(5, 2, 1767323045.0)
    # What somebody writes there later is not taken.
    header["behavioural"]["reads"] = 1000
    place.cube("law", header=header)
    refresh(place.store, place.index, "law", None)
    assert place.index.usage(known).reads == 5


def test_a_kv_cache_may_be_left_for_later(
    place: Place, make_kv: Callable[..., bytes], kv_model: dict[str, str]
) -> None:
    cube = place.cube("law")
    (cube / "kv.safetensors").write_bytes(make_kv(b"text"))
    first = refresh(place.store, place.index, "law", kv_model, check_kv=False)
    assert first.after.kv_state == "unchecked"
    assert refresh(place.store, place.index, "law", kv_model).after.kv_state == "ready"


def test_a_rescan_finds_everything(place: Place) -> None:
    place.cube("gone")
    place.cube("changed")
    place.cube("same")
    assert rescan(place.store, place.index, None).added == 3
    place.settle()
    shutil.rmtree(place.store.root / "gone")
    place.cube("changed", "another text")
    place.cube("deep/er/new")
    changes: list[Change] = []
    scan = rescan(place.store, place.index, None, on_change=changes.append)
    assert (scan.cubes, scan.added, scan.changed, scan.removed) == (3, 1, 1, 1)
    assert scan.complete
    assert {change.path for change in changes} == {"gone", "changed", "deep/er/new"}
    assert {path for path, _ in place.index.under("")} == {"same", "changed", "deep/er/new"}
    place.settle()
    scan = rescan(place.store, place.index, None)
    assert (scan.added, scan.changed, scan.removed) == (0, 0, 0)


def test_a_rescan_reads_nothing_that_is_known(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(3):
        place.cube(f"c{i}")
    rescan(place.store, place.index, None)
    place.settle()
    rescan(place.store, place.index, None)

    def opened(*args: object, **kwargs: object) -> int:
        raise AssertionError(f"{args} was opened")

    monkeypatch.setattr("memfs.vault.facts.open_regular_at", opened)
    assert rescan(place.store, place.index, None).cubes == 3


def test_without_an_index_the_oldest_header_is_the_originals(place: Place) -> None:
    header = metadata.new()
    known = metadata.cube_id(header)
    for name in ("b", "c", "a"):  # in the order of their making
        place.cube(name, header=header)
        time.sleep(0.02)
    scan = rescan(place.store, place.index, None)
    assert scan.copies == 2
    assert place.id_of("b") == known
    assert len({place.id_of(name) for name in "abc"}) == 3
    for name in "ac":
        assert place.header(name)["descriptive"]["origin"]["copied_from"] == known
    assert place.index.by_id(known)[0] == "b"


def test_with_an_index_the_known_path_is_the_originals(place: Place) -> None:
    header = metadata.new()
    known = metadata.cube_id(header)
    place.cube("old", header=header)
    rescan(place.store, place.index, None)
    shutil.copytree(place.store.root / "old", place.store.root / "copy")
    os.utime(place.store.root / "old" / "meta.json")  # the older header by now is the copy's
    rescan(place.store, place.index, None)
    assert place.id_of("old") == known
    assert place.id_of("copy") != known


def test_a_cube_that_was_copied_and_moved_away(place: Place) -> None:
    header = metadata.new()
    known = metadata.cube_id(header)
    place.cube("law", header=header)
    rescan(place.store, place.index, None)
    root = place.store.root
    shutil.copytree(root / "law", root / "first")
    time.sleep(0.02)
    shutil.copytree(root / "law", root / "also")
    shutil.rmtree(root / "law")
    rescan(place.store, place.index, None)
    assert place.id_of("first") == known
    assert place.id_of("also") != known
    assert place.index.by_id(known)[0] == "first"


def test_a_copy_that_could_not_be_told_apart_then_is_later(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    header = metadata.new()
    for name in "ab":
        place.cube(name, header=header)
    with monkeypatch.context() as patch:  # as if it had been killed before its end
        patch.setattr(place.index, "shared_ids", lambda: [])
        rescan(place.store, place.index, None)
    assert place.id_of("a") == place.id_of("b")
    rescan(place.store, place.index, None)
    assert place.id_of("a") != place.id_of("b")


def test_a_rescan_in_the_midst_of_rm_r_undoes_nothing(place: Place) -> None:
    """Removing a large tree is what makes events get lost, and a rescan follow."""
    cube = place.cube("law")
    rescan(place.store, place.index, None)
    known = place.id_of("law")
    (cube / "meta.json").unlink()
    rescan(place.store, place.index, None)
    assert not (cube / "meta.json").exists()
    rescan(place.store, place.index, None, adopting=True)
    assert place.id_of("law") == known


def test_leftovers_of_a_crash_are_removed(place: Place) -> None:
    cube = place.cube("law")
    (cube / f"{layout.TEMPORARY}1").write_text("half")
    (place.store.root / f"{layout.TEMPORARY}2").write_text("half")
    half = place.store.root / f"{layout.INCOMING}3" / "0"  # what memfs load puts together
    half.mkdir(parents=True)
    (half / "payload.md").write_text("half")
    rescan(place.store, place.index, None)
    assert (cube / f"{layout.TEMPORARY}1").exists()
    assert (half / "payload.md").exists()
    assert list(place.index.paths()) == ["law"]
    rescan(place.store, place.index, None, leftovers_before=time.time() + 1)
    assert sorted(os.listdir(cube)) == ["meta.json", "payload.md"]
    assert sorted(os.listdir(place.store.root)) == [".memfs", "law"]


def test_a_rescan_can_be_stopped(place: Place) -> None:
    for i in range(5):
        place.cube(f"c{i}")
    seen: list[int] = []
    scan = rescan(place.store, place.index, None, progress=seen.append, stop=lambda: len(seen) >= 2)
    assert not scan.complete
    assert place.index.get_info("complete") is None
    assert len(place.index) == 2
    assert rescan(place.store, place.index, None).complete
    assert place.index.get_info("complete") is True


def test_one_cube_that_is_changed_by_many_is_right_in_the_end(place: Place) -> None:
    cube = place.cube("law")
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            refresh(place.store, place.index, "law", None)

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for i in range(100):
        (cube / "payload.md").write_text(f"text {i}")
    done.set()
    for thread in threads:
        thread.join()
    last = refresh(place.store, place.index, "law", None).after
    place.settle()
    assert refresh(place.store, place.index, "law", None).after.payload_sha256 == (
        last.payload_sha256
    )
    assert place.index.get("law").id == place.id_of("law")
    assert place.index.shared_ids() == []


def test_many_copies_at_once(place: Place) -> None:
    header = metadata.new()
    paths = [f"c{i}" for i in range(12)]
    for path in paths:
        place.cube(path, header=header)
    threads = [
        threading.Thread(target=refresh, args=(place.store, place.index, path, None))
        for path in paths
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rescan(place.store, place.index, None)
    ids = {place.id_of(path) for path in paths}
    assert len(ids) == 12
    assert metadata.cube_id(header) in ids
    assert not place.index.key_errors()
