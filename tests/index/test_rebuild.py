"""An index in any state is opened or made again, and what no file says is kept where it can be."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import memfs
from memfs.cube import metadata
from memfs.errors import IndexDamaged
from memfs.index.compare import Difference, compare
from memfs.index.lmdb_index import Index, Usage
from memfs.index.rebuild import (
    MODEL,
    REBUILT,
    index_directory,
    leftovers,
    open_or_empty,
    open_or_rebuild,
    rebuild,
)
from memfs.index.refresh import refresh, rescan
from memfs.vault.facts import CubeFacts
from memfs.vault.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    root = tmp_path / "store"
    root.mkdir()
    for name in ("a", "w/b", "w/c"):
        (root / name).mkdir(parents=True)
        (root / name / "payload.md").write_text(name)
    with Store.open(root) as opened:
        yield opened


def id_of(store: Store, path: str) -> str:
    return metadata.cube_id(metadata.parse((store.root / path / "meta.json").read_bytes()))


def paths(index: Index) -> list[str]:
    return sorted(path for path, _ in index.under(""))


def beside(store: Store) -> list[str]:
    return sorted(os.listdir(store.control_dir))


def damage(store: Store) -> None:
    file = index_directory(store) / "data.mdb"
    data = file.read_bytes()
    assert b'"w/b"' in data
    file.write_bytes(data.replace(b'"w/b"', b'"w/B"'))


def test_the_first_time(store: Store) -> None:
    index, reason = open_or_rebuild(store)
    assert reason == "there is none"
    assert paths(index) == ["a", "w/b", "w/c"]
    index.close()
    index, reason = open_or_rebuild(store)
    assert reason is None
    assert paths(index) == ["a", "w/b", "w/c"]
    index.close()
    assert beside(store) == [".gitignore", "index"]


@pytest.mark.parametrize("kind", ["record", "cut", "file", "symlink", "format"])
def test_a_damaged_index_is_made_again(store: Store, tmp_path: Path, kind: str) -> None:
    index, _ = open_or_rebuild(store)
    known = id_of(store, "a")
    index.count(known, reads=3, at=5.0)
    if kind == "format":
        index.set_info("format", 0)
    index.close()
    directory = index_directory(store)
    if kind == "record":
        damage(store)
    elif kind == "cut":
        os.truncate(directory / "data.mdb", 3 * 4096)
    elif kind == "file":
        shutil.rmtree(directory)
        directory.write_text("no directory")
    elif kind == "symlink":
        directory.rename(tmp_path / "elsewhere")
        directory.symlink_to(tmp_path / "elsewhere")
    index, reason = open_or_rebuild(store)
    assert reason
    assert paths(index) == ["a", "w/b", "w/c"]
    if kind in ("record", "format"):
        assert index.usage(known) == Usage(3, 0, 5.0)
    index.close()
    assert beside(store) == [".gitignore", "index"]
    assert directory.is_dir()
    if kind == "symlink":
        assert (tmp_path / "elsewhere" / "data.mdb").exists()
    assert open_or_rebuild(store)[1] is None


def test_an_index_whose_scan_did_not_end(store: Store) -> None:
    index, reason = open_or_empty(store)
    assert reason == "there is none"
    assert len(index) == 0
    index.close()
    index, reason = open_or_empty(store)
    assert reason == "the last scan did not end"
    rescan(store, index, None)
    index.close()
    index, reason = open_or_empty(store)
    assert reason is None
    index.close()


def test_a_store_that_cannot_be_written(store: Store) -> None:
    shutil.rmtree(store.control_dir)
    for name in ("a", "w/b", "w/c"):
        (store.root / name / "meta.json").write_bytes(metadata.render(metadata.new()))
    with Store.open(store.root, create_control=False) as read_only:
        index, reason = open_or_rebuild(read_only)
        assert reason == "the store is read-only"
        assert paths(index) == ["a", "w/b", "w/c"]
        directory = index.directory
        assert store.root not in directory.parents
        index.close()
        assert not directory.exists()
    assert not store.control_dir.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_the_index_is_the_store_owners(store: Store) -> None:
    os.chown(store.root, 4321, 1234)
    open_or_rebuild(store)[0].close()
    directory = index_directory(store)
    for path in (directory, directory / "data.mdb", directory / "lock.mdb"):
        assert path.stat().st_uid == 4321
        assert not stat.S_IMODE(path.stat().st_mode) & 0o077


def test_a_rebuild_from_the_files_alone(store: Store) -> None:
    index, _ = open_or_rebuild(store)
    ids = {path: id_of(store, path) for path in paths(index)}
    index.count(ids["a"], reads=3, at=5.0)
    index.set_info(MODEL, {"weights_sha256": "x"})
    index.set_info("mine", 7)
    index.put("no such cube", CubeFacts())
    index.close()
    seen: list[int] = []
    report = rebuild(store, index_directory(store), progress=seen.append)
    assert (report.cubes, report.copies, report.usage) == (3, 0, 1)
    assert seen == [1, 2, 3]
    with Index.open(index_directory(store)) as index:
        assert {path: facts.id for path, facts in index.under("")} == ids
        assert index.usage(ids["a"]) == Usage(3, 0, 5.0)
        assert index.get_info(MODEL) == {"weights_sha256": "x"}
        assert index.get_info("mine") == 7
        assert index.get_info(REBUILT)["cubes"] == 3
        assert compare(store, index) == []
    assert open_or_empty(store)[1] is None
    assert beside(store) == [".gitignore", "index"]


def test_without_the_old_index_usage_comes_from_the_headers(store: Store) -> None:
    header = metadata.new()
    header["behavioural"] |= {"reads": 4, "last_used": "1970-01-01T00:00:09Z"}
    (store.root / "a" / "meta.json").write_bytes(metadata.render(header))
    report = rebuild(store, index_directory(store))
    assert report.usage == 0
    with Index.open(index_directory(store)) as index:
        assert index.usage(metadata.cube_id(header)) == Usage(4, 0, 9.0)


def test_the_old_index_says_which_cube_is_the_original(store: Store) -> None:
    index, _ = open_or_rebuild(store)
    known = id_of(store, "w/b")
    index.close()
    shutil.copytree(store.root / "w" / "b", store.root / "a-copy")
    os.utime(store.root / "w" / "b" / "meta.json")  # the copy's header is the older one now
    (store.root / "w" / "c" / "meta.json").unlink()
    report = rebuild(store, index_directory(store))
    assert report.copies == 1
    assert id_of(store, "w/b") == known
    assert id_of(store, "a-copy") != known


def test_a_header_that_is_lost_does_not_cost_the_id(store: Store) -> None:
    open_or_rebuild(store)[0].close()
    known = id_of(store, "a")
    (store.root / "a" / "meta.json").unlink()
    rebuild(store, index_directory(store))
    assert id_of(store, "a") == known


def test_an_index_in_use_is_mended_in_place(store: Store) -> None:
    index, _ = open_or_rebuild(store)
    known = id_of(store, "a")
    index.close()
    damage(store)
    index = Index.open(index_directory(store))
    with pytest.raises(IndexDamaged):
        list(index.under(""))
    index.count(known, reads=1)
    report = rebuild(store, index_directory(store), index=index)
    assert report.cubes == 3
    assert paths(index) == ["a", "w/b", "w/c"]
    assert index.usage(known).reads == 1
    assert compare(store, index) == []
    index.close()


def test_an_empty_index_in_use_is_exchanged_too(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    with Store.open(tmp_path / "store") as store:
        index, _ = open_or_rebuild(store)
        rebuild(store, index_directory(store), index=index)
        index.put("a", CubeFacts())
        index.close()
        with Index.open(index_directory(store)) as again:
            assert paths(again) == ["a"]


def test_work_goes_on_while_it_is_rebuilt(store: Store) -> None:
    """Nobody sees an error, and no change made meanwhile is lost."""
    index, _ = open_or_rebuild(store)
    known, done = id_of(store, "a"), threading.Event()
    made = 0
    failed: list[Exception] = []

    def work() -> None:
        nonlocal made
        while not done.is_set():
            path = store.root / "new" / f"c{made}"
            path.mkdir(parents=True)
            (path / "payload.md").write_text("new")
            try:
                refresh(store, index, f"new/c{made}", None)
                index.count(known, reads=1)
            except (OSError, IndexDamaged) as e:
                failed.append(e)
                return
            made += 1
            time.sleep(0.002)

    worker = threading.Thread(target=work)
    worker.start()
    for _ in range(3):
        rebuild(store, index_directory(store), index=index)
    done.set()
    worker.join()
    assert not failed
    assert made
    assert len(index) == 3 + made
    assert index.usage(known).reads == made
    assert compare(store, index) == []
    index.close()


def test_a_rebuild_that_fails_leaves_the_old_one(store: Store) -> None:
    index, _ = open_or_rebuild(store)

    def fail(count: int) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        rebuild(store, index_directory(store), progress=fail, index=index)
    assert paths(index) == ["a", "w/b", "w/c"]
    index.close()
    assert beside(store) == [".gitignore", "index"]


KILLED = """
import sys
from pathlib import Path
from memfs.index.rebuild import index_directory, rebuild
from memfs.vault.store import Store
with Store.open(Path(sys.argv[1])) as store:
    print("going", flush=True)
    while True:
        rebuild(store, index_directory(store))
"""


def test_a_rebuild_killed_at_any_instant_loses_no_usage(store: Store) -> None:
    index, _ = open_or_rebuild(store)
    known = id_of(store, "a")
    index.count(known, reads=9, at=1.0)
    index.close()
    environ = os.environ | {"PYTHONPATH": str(Path(memfs.__file__).parent.parent)}
    for number in range(4):
        with subprocess.Popen(
            [sys.executable, "-c", KILLED, store.root], stdout=subprocess.PIPE, env=environ
        ) as child:
            assert child.stdout is not None
            child.stdout.readline()
            time.sleep(0.25 * number)
            child.kill()
        index, _ = open_or_rebuild(store)
        assert paths(index) == ["a", "w/b", "w/c"]
        assert index.usage(known).reads == 9
        index.close()


def test_a_crash_between_the_two_renames(store: Store) -> None:
    index, _ = open_or_rebuild(store)
    index.set_info("mine", 7)
    index.close()
    directory = index_directory(store)
    directory.rename(directory.with_name("index.old-1234"))
    (store.control_dir / "index.new-1234").mkdir()
    index, reason = open_or_empty(store)
    assert reason is None
    assert index.get_info("mine") == 7
    assert leftovers(directory) == []
    index.close()


def test_differences_are_named(
    store: Store, make_kv: Callable[..., bytes], kv_model: dict[str, str]
) -> None:
    (store.root / "a" / "kv.safetensors").write_bytes(make_kv(b"a"))
    index, _ = open_or_rebuild(store, kv_model)
    assert compare(store, index, kv_model) == []
    assert compare(store, index, None) == []
    (store.root / "a" / "payload.md").write_text("another text")
    (store.root / "new").mkdir()
    (store.root / "new" / "payload.md").write_text("x")
    shutil.rmtree(store.root / "w" / "b")
    known = index.get("w/c")
    assert known is not None
    (store.root / "w" / "c" / "meta.json").write_text("{")
    found = {(difference.path, difference.what) for difference in compare(store, index, kv_model)}
    assert {
        ("a", "payload_sha256"),
        ("a", "kv_state"),
        ("new", "missing"),
        ("w/b", "gone"),
        ("w/c", "meta_reason"),
    } <= found
    assert ("w/c", "id") not in found
    rescan(store, index, kv_model)
    assert compare(store, index, kv_model) == []
    index.close()


def test_what_settles_is_no_difference(store: Store) -> None:
    index, _ = open_or_rebuild(store)
    (store.root / "a" / "payload.md").write_text("another text")
    timer = threading.Timer(0.1, refresh, (store, index, "a", None))
    timer.start()
    assert compare(store, index, settle_s=1.0) == []
    timer.join()
    index.close()


def test_a_difference_in_the_keys_is_named(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    index, _ = open_or_rebuild(store)
    index._env.write(lambda txn: txn.put(b"tag=x", b"a", db=index._env.db["facets"]))
    (found,) = compare(store, index)
    assert isinstance(found, Difference)
    assert (found.path, found.what) == ("", "keys")
    index.close()
