"""The index answers as a plain dictionary of facts would, through any sequence of changes."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from memfs.errors import IndexDamaged
from memfs.index.environment import Environment
from memfs.index.lmdb_index import Index
from memfs.index.records import CUT, DATABASES, Usage
from memfs.vault.facts import CubeFacts
from memfs.vault.sig import Sig

IDS = [str(uuid.UUID(int=i)) for i in range(4)]


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Index]:
    with Index.open(tmp_path / "index") as opened:
        yield opened


def facts(**fields: object) -> CubeFacts:
    return CubeFacts(**fields)  # type: ignore[arg-type]


def test_what_is_put_is_got(index: Index) -> None:
    whole = facts(
        id=IDS[0],
        title="Ü\ud800",
        tags=("a", "b"),
        kv_model={"x": "y"},
        payload_sig=Sig(1, 2, 3, 4),
    )
    assert index.get("a") is None
    assert index.by_id(IDS[0]) is None
    assert index.put("work/a", whole)
    assert index.get("work/a") == whole
    assert index.by_id(IDS[0]) == ("work/a", whole)
    assert len(index) == 1
    index.put("work/a", facts(id=IDS[1]))
    assert index.by_id(IDS[0]) is None
    assert index.by_id(IDS[1]) == ("work/a", facts(id=IDS[1]))
    assert index.remove("work/a")
    assert not index.remove("work/a")
    assert len(index) == 0
    assert not index.key_errors()


def test_an_id_of_two_paths_is_the_firsts_until_it_goes(index: Index) -> None:
    assert index.put("b", facts(id=IDS[0]))
    assert not index.put("a", facts(id=IDS[0]))
    assert not index.put("c", facts(id=IDS[0], title="x"))
    assert index.by_id(IDS[0]) == ("b", facts(id=IDS[0]))
    assert index.paths_of(IDS[0]) == ["b", "a", "c"]
    assert index.shared_ids() == [IDS[0]]
    index.remove("b")
    assert index.paths_of(IDS[0]) == ["a", "c"]
    index.put("a", facts(id=IDS[1]))
    assert index.paths_of(IDS[0]) == ["c"]
    assert index.shared_ids() == []
    assert index.put("c", facts(id=IDS[0], title="y"))
    assert index.paths_of(IDS[2]) == []


def test_a_collection_is_moved_at_once(index: Index) -> None:
    for i, path in enumerate(("w/a", "w/b/c", "w", "wx")):
        index.put(path, facts(id=IDS[i]))
    assert index.move("w", "deep/v") == 3
    assert dict(index.under("deep")) == {
        "deep/v": facts(id=IDS[2]),
        "deep/v/a": facts(id=IDS[0]),
        "deep/v/b/c": facts(id=IDS[1]),
    }
    assert index.by_id(IDS[1]) == ("deep/v/b/c", facts(id=IDS[1]))
    assert index.get("wx") is not None
    assert index.move("missing", "x") == 0
    assert index.remove_under("deep") == 3
    assert [path for path, _ in index.under("")] == ["wx"]
    assert not index.key_errors()


def test_paths_longer_than_a_key(index: Index) -> None:
    """LMDB's keys have 511 bytes, a path 4,095."""
    stem = "/".join(["d" * 200] * 6)
    paths = [f"{stem}/{name}" for name in ("a", "b", "b/c", "é" * 100)]
    for i, path in enumerate(paths):
        index.put(path, facts(id=IDS[i], tags=("long",)))
    assert [index.get(path) is not None for path in paths] == [True] * 4
    assert index.get(f"{stem}/z") is None
    assert {path for path, _ in index.under(stem)} == set(paths)
    assert {path for path, _ in index.under(paths[1])} == {paths[1], paths[2]}
    assert {path for path, _ in index.under("d" * 200)} == set(paths)
    assert {path for path, _ in index.find(tag="long")} == set(paths)
    assert index.by_id(IDS[2]) == (paths[2], facts(id=IDS[2], tags=("long",)))
    assert index.move(stem, "s") == 4
    assert {path for path, _ in index.under("s")} == {p.replace(stem, "s") for p in paths}
    assert not index.key_errors()


def test_tags_longer_than_a_key_and_strange_ones(index: Index) -> None:
    tags = ["\U0001f600" * 128, "\U0001f600" * 127, "\ud800", "a\0b", "=", "é"]
    for i, tag in enumerate(tags):
        index.put(f"c{i}", facts(tags=(tag,)))
    for i, tag in enumerate(tags):
        assert [path for path, _ in index.find(tag=tag)] == [f"c{i}"]


def test_names_that_are_not_utf8(index: Index) -> None:
    name = os.fsdecode(b"caf\xe9/\xff")
    index.put(name, facts(id=IDS[0]))
    assert index.by_id(IDS[0]) == (name, facts(id=IDS[0]))
    assert [path for path, _ in index.under(os.fsdecode(b"caf\xe9"))] == [name]


def test_finding(index: Index) -> None:
    index.put("a", facts(kv_state="ready", tags=("x", "y"), uid=1, changed=100.5))
    index.put("b", facts(kv_state="stale", tags=("x",), uid=1, changed=200.0))
    index.put("c", facts(kv_state="ready", uid=2, changed=-5.0))

    def paths(**asked: object) -> list[str]:
        return sorted(path for path, _ in index.find(**asked))  # type: ignore[arg-type]

    assert paths() == ["a", "b", "c"]
    assert paths(kv_state="ready") == ["a", "c"]
    assert paths(tag="x") == ["a", "b"]
    assert paths(owner=1) == ["a", "b"]
    assert paths(pinned=True) == []
    assert paths(owner=1, kv_state="ready", tag="y") == ["a"]
    assert paths(tag="z") == []
    assert paths(since=100.5) == ["a", "b"]
    assert paths(since=100.6) == ["b"]
    assert paths(until=200.0) == ["a", "c"]
    assert paths(since=0.0, until=200.1, kv_state="stale") == ["b"]
    index.put("b", facts(kv_state="stale", pinned=True))
    assert paths(pinned=True) == ["b"]
    index.put("a", facts(kv_state="foreign"))
    assert paths(kv_state="ready") == ["c"]
    assert paths(tag="y") == []
    assert not index.key_errors()


def test_an_iterator_does_not_stand_in_the_way(index: Index) -> None:
    """What is found may be changed while it is gone through, and the map may grow."""
    index.put_many((f"c{i:04}", facts(tags=("x",))) for i in range(1000))
    for path, found in index.under(""):
        index.put(path, CubeFacts(title="x" * 2000, tags=found.tags))
    for path, _ in index.find(tag="x"):
        index.remove(path)
    assert len(index) == 0


def test_usage(index: Index) -> None:
    assert index.usage(IDS[0]) == Usage(0, 0, None)
    assert not index.has_usage(IDS[0])
    index.count(IDS[0], reads=2, at=50.0)
    index.count(IDS[0], questions=1, at=40.0)
    assert index.usage(IDS[0]) == Usage(2, 1, 50.0)
    assert list(index.all_usage()) == [(IDS[0], Usage(2, 1, 50.0), True)]
    index.mark_written(IDS[0], Usage(1, 1, 50.0))  # it went on meanwhile
    assert list(index.all_usage()) == [(IDS[0], Usage(2, 1, 50.0), True)]
    index.mark_written(IDS[0], Usage(2, 1, 50.0))
    assert list(index.all_usage()) == [(IDS[0], Usage(2, 1, 50.0), False)]
    index.set_usage(IDS[0], Usage(9, 9, None))
    index.merge_usage([(IDS[0], Usage(10, 3, 7.0), True), (IDS[1], Usage(1, 0, None), False)])
    assert index.usage(IDS[0]) == Usage(10, 9, 7.0)
    assert index.usage(IDS[1]) == Usage(1, 0, None)


def test_info(index: Index) -> None:
    assert index.get_info("model") is None
    index.set_info("model", {"a": ["b"]})
    assert index.get_info("model") == {"a": ["b"]}


def test_the_map_grows_by_itself(tmp_path: Path) -> None:
    with Index.open(tmp_path / "index", map_size=1 << 20) as index:
        index.put_many((f"c{i}", facts(title="x" * 1000)) for i in range(5000))
        assert len(index) == 5000
        index.set_info("large", "x" * (8 << 20))
        assert not index.key_errors()
    with Index.open(tmp_path / "index", map_size=1 << 20) as index:
        assert len(index) == 5000


READER = """
import sys
from pathlib import Path
from memfs.index.lmdb_index import Index
index = Index.open(Path(sys.argv[1]), read_only=True)
print(len(index), flush=True)
for line in sys.stdin:
    print(len(index), index.get(f"c{len(index) - 1}") is not None, flush=True)
"""


def test_another_process_reads_while_it_grows(tmp_path: Path) -> None:
    with Index.open(tmp_path / "index", map_size=1 << 20) as index:
        index.put("c0", facts())
        with subprocess.Popen(
            [sys.executable, "-c", READER, tmp_path / "index"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as reader:
            assert reader.stdin is not None
            assert reader.stdout is not None
            assert reader.stdout.readline() == "1\n"
            index.put_many((f"c{i}", facts(title="x" * 1000)) for i in range(3000))
            reader.stdin.write("\n")
            reader.stdin.flush()
            assert reader.stdout.readline() == "3000 True\n"
            reader.stdin.close()


def test_a_read_only_index_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Index.open(tmp_path / "index", read_only=True)
    with Index.open(tmp_path / "index") as index:
        index.put("a", facts())
    with Index.open(tmp_path / "index", read_only=True) as index:
        assert index.get("a") == facts()
        with pytest.raises(OSError):
            index.put("b", facts())


def test_many_threads_at_once(index: Index) -> None:

    def work(number: int) -> None:
        for i in range(150):
            path = f"t{number}/c{i}"
            index.put(path, facts(title="x" * 3000, tags=("all",)))
            assert index.get(path) is not None
            index.count(IDS[0], reads=1)
            if i % 50 == 0:
                assert sum(1 for _ in index.under(f"t{number}")) == i + 1

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))
    assert len(index) == 900
    assert index.usage(IDS[0]).reads == 900
    assert not index.key_errors()


def test_a_closed_index_says_so(index: Index) -> None:
    index.close()
    index.close()
    for call in (lambda: index.get("a"), lambda: index.put("a", facts()), index.sync):
        with pytest.raises(OSError, match="closed"):
            call()


def test_an_index_of_another_format_is_not_used(tmp_path: Path) -> None:
    with Index.open(tmp_path / "index") as index:
        index.set_info("format", 0)
    with pytest.raises(IndexDamaged, match="format"):
        Index.open(tmp_path / "index")


def test_a_damaged_record_is_an_error_and_never_an_answer(tmp_path: Path) -> None:
    with Index.open(tmp_path / "index") as index:
        index.put("a", facts(title="alpha", id=IDS[0]))
        index.put("b", facts(title="beta"))
        index.count(IDS[0], reads=1)
    environment = Environment(tmp_path / "index", DATABASES)

    def change(txn: object) -> None:
        db = environment.db
        value = txn.get(b"a", db=db["cubes"])  # type: ignore[attr-defined]
        txn.put(b"a", value.replace(b"alpha", b"Alpha"), db=db["cubes"])  # type: ignore[attr-defined]
        txn.put(b"c", txn.get(b"b", db=db["cubes"]), db=db["cubes"])  # type: ignore[attr-defined]
        usage = bytearray(txn.get(IDS[0].encode(), db=db["usage"]))  # type: ignore[attr-defined]
        usage[-3] ^= 1
        txn.put(IDS[0].encode(), bytes(usage), db=db["usage"])  # type: ignore[attr-defined]

    environment.write(change)
    environment.close()
    with Index.open(tmp_path / "index") as index:
        assert index.get("b") == facts(title="beta")
        for call in (
            lambda: index.get("a"),
            lambda: index.by_id(IDS[0]),
            lambda: index.get("c"),  # a whole record under another's key
            lambda: list(index.under("")),
            lambda: index.put("a", facts()),
            lambda: index.usage(IDS[0]),
        ):
            with pytest.raises(IndexDamaged):
                call()


@pytest.mark.parametrize("kind", ["symlink", "data", "lock", "hard link"])
def test_an_index_of_links_is_not_opened(tmp_path: Path, kind: str) -> None:
    """A store from elsewhere may bring them: LMDB would write through them."""
    with Index.open(tmp_path / "real") as index:
        index.put("a", facts())
    if kind == "symlink":
        (tmp_path / "index").symlink_to("real")
    else:
        (tmp_path / "index").mkdir()
        name = "lock.mdb" if kind == "lock" else "data.mdb"
        if kind == "hard link":
            (tmp_path / "index" / name).hardlink_to(tmp_path / "real" / name)
        else:
            (tmp_path / "index" / name).symlink_to(tmp_path / "real" / name)
    with pytest.raises(IndexDamaged):
        Index.open(tmp_path / "index")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("only root mounts")
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", disk]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_is_an_error_that_passes(small_disk: Path) -> None:
    with Index.open(small_disk / "index") as index:
        index.put("a", facts(title="kept"))
        with pytest.raises(OSError, match="No space"):
            for i in range(10_000):
                index.put(f"b{i}", facts(title="x" * 2000))
        assert index.get("a") == facts(title="kept")
        assert len(index) > 100
        index.remove_under("b1")
        (small_disk / "other").unlink(missing_ok=True)
        assert not index.key_errors()
        subprocess.run(["mount", "-o", "remount,size=8m", small_disk], check=True)
        index.put("c", facts())
        assert index.get("c") == facts()
    with Index.open(small_disk / "index") as index:
        assert index.get("a") == facts(title="kept")
        assert not index.key_errors()


def test_an_exchange_on_a_full_disk_is_made_up_for(small_disk: Path) -> None:
    with Index.open(small_disk / "index") as index:
        index.put("a", facts(title="kept"))
        with pytest.raises(OSError, match="No space"), index.exchanged():
            filler = small_disk / "other"
            with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                while file.write(bytes(4096)):
                    pass
        with pytest.raises(OSError, match="No space"):
            index.get("a")
        filler.unlink()
        assert index.get("a") == facts(title="kept")
    with pytest.raises(OSError, match="closed"):
        index.get("a")


PATHS = st.sampled_from(["a", "a/b", "a/b/c", "ab", "a-b", "b", "b/" + "x" * 250, "b/" + "x" * CUT])
SOME_FACTS = st.builds(
    CubeFacts,
    id=st.none() | st.sampled_from(IDS),
    tags=st.sets(st.sampled_from("xyz")).map(lambda tags: tuple(sorted(tags))),
    kv_state=st.sampled_from(["none", "ready", "stale"]),
    uid=st.integers(0, 1),
    changed=st.sampled_from([0.0, 1.0, 2.5]),
)


class Model(RuleBasedStateMachine):
    """The index beside a dictionary."""

    @initialize()
    def opened(self) -> None:
        import tempfile

        self.directory = Path(tempfile.mkdtemp(prefix="memfs-test-"))
        self.index = Index.open(self.directory / "index", temporary=True, map_size=1 << 20)
        self.known: dict[str, CubeFacts] = {}

    @rule(path=PATHS, found=SOME_FACTS)
    def put(self, path: str, found: CubeFacts) -> None:
        self.index.put(path, found)
        self.known[path] = found

    @rule(path=PATHS)
    def remove(self, path: str) -> None:
        assert self.index.remove(path) == (self.known.pop(path, None) is not None)

    @rule(prefix=PATHS)
    def remove_under(self, prefix: str) -> None:
        gone = [p for p in self.known if p == prefix or p.startswith(prefix + "/")]
        assert self.index.remove_under(prefix) == len(gone)
        for path in gone:
            del self.known[path]

    @rule(old=PATHS, new=st.sampled_from(["n", "a/b/n", "n/m"]))
    def move(self, old: str, new: str) -> None:
        moved = [p for p in self.known if p == old or p.startswith(old + "/")]
        assert self.index.move(old, new) == len(moved)
        found = {new + path[len(old) :]: self.known.pop(path) for path in moved}
        self.known |= found

    @rule()
    def reopen(self) -> None:
        with self.index.exchanged():
            pass

    @invariant()
    def says_the_same(self) -> None:
        index, known = self.index, self.known
        assert len(index) == len(known)
        assert dict(index.under("")) == known
        for prefix in ("a", "a/b", "b"):
            assert dict(index.under(prefix)) == {
                p: f for p, f in known.items() if p == prefix or p.startswith(prefix + "/")
            }
        for tag in "xyz":
            assert dict(index.find(tag=tag, since=1.0)) == {
                p: f for p, f in known.items() if tag in f.tags and f.changed >= 1.0
            }
        assert dict(index.find(kv_state="ready", owner=1, until=2.5)) == {
            p: f
            for p, f in known.items()
            if f.kv_state == "ready" and f.uid == 1 and f.changed < 2.5
        }
        for cube_id in IDS:
            paths = index.paths_of(cube_id)
            assert sorted(paths) == sorted(p for p, f in known.items() if f.id == cube_id)
            owner = index.by_id(cube_id)
            assert (owner[0] if owner else None) == (paths[0] if paths else None)
        assert not index.key_errors()

    def teardown(self) -> None:
        if hasattr(self, "index"):
            self.index.close()
            self.directory.rmdir()


TestAgainstADictionary = Model.TestCase
TestAgainstADictionary.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)
