"""``memfs fsck``: finds every kind of damage by its name, mends it, and loses not a byte."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from memfs.cli import main as cli
from memfs.cube import metadata
from memfs.index.lmdb_index import Index
from memfs.index.rebuild import index_directory
from memfs.index.refresh import rescan
from memfs.vault.lock import lock
from memfs.vault.publish import publishing
from memfs.vault.store import Store

ADAPTER = "adapter/adapter_model.safetensors"


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, make_kv: Callable[..., bytes]) -> Path:
    """A store in which nothing is wrong, with an index: the files of one cube, or a text alone."""
    root = tmp_path_factory.mktemp("whole") / "store"
    for path in ("law", "work/note", "work/other"):
        cube = root / path
        cube.mkdir(parents=True)
        text = f"The text of {path}.\n".encode()
        (cube / "payload.md").write_bytes(text)
        (cube / "kv.safetensors").write_bytes(make_kv(text))
        (cube / "adapter").mkdir()
        (cube / ADAPTER).write_bytes(save({"lora": np.full((2, 2), 1, np.float32)}))
        meta = metadata.new(title=path)
        meta["descriptive"]["tags"] = [path]
        (cube / "meta.json").write_bytes(metadata.render(meta))
    (root / "work/notes.txt").write_text("no cube's file\n")
    with Store.open(root) as store, Index.open(index_directory(store)) as index:
        rescan(store, index, None)
    return root


@pytest.fixture
def root(whole: Path, tmp_path: Path) -> Path:
    return copied(whole, tmp_path / "store")


def copied(whole: Path, root: Path) -> Path:
    """A copy with an index that knows the files by their own times and inodes."""
    shutil.copytree(whole, root, symlinks=True)
    with Store.open(root) as store, Index.open(index_directory(store)) as index:
        rescan(store, index, None)
    return root


Run = Callable[..., tuple[int, Any]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*args: object) -> tuple[int, Any]:
        capsys.readouterr()
        status = cli.main(["fsck", "--json", *map(str, args)])
        out = capsys.readouterr().out
        return status, json.loads(out)

    return call


def contents(root: Path) -> set[str]:
    """Digests of all that is in a store, but for its index and lock."""
    found = set()
    for directory, _, names in os.walk(root):
        own = Path(directory).relative_to(root).parts
        if own[:1] == (".memfs",) and own[1:2] not in (("aside",), ("unlinked",)):
            continue
        for name in names:
            path = Path(directory, name)
            if path.is_symlink():
                found.add(f"to {os.readlink(path)}")
            elif path.is_file():
                found.add(hashlib.sha256(path.read_bytes()).hexdigest())
    return found


def sizes_and_times(root: Path) -> dict[str, tuple[int, int, int]]:
    return {
        str(path): (path.lstat().st_ino, path.lstat().st_size, path.lstat().st_mtime_ns)
        for path in root.rglob("*")
        if path.name not in ("lock", "lock.mdb")
    }


class Damage(NamedTuple):
    """Something to do to a store, and what fsck has to say of it."""

    do: Callable[[Path], object]
    area: str
    path: str
    says: str


def flipped(path: Path, place: int) -> None:
    """One bit of a file is another, as a disk would do it."""
    with path.open("r+b") as file:
        file.seek(place, os.SEEK_SET if place >= 0 else os.SEEK_END)
        byte = file.read(1)
        if not byte:
            raise ValueError(f"{path} was cut short before")
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))


def rotten(path: Path) -> None:
    """The same as ``flipped``, and the file's times do not say so, as far as a test can do that."""
    times = path.stat()
    flipped(path, 0)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    store = next(p for p in path.parents if (p / ".memfs").is_dir())
    cube = str(path.parent.relative_to(store))
    with Index.open(store / ".memfs/index") as index:
        known = index.get(cube)
        assert known is not None
        assert known.payload_sig is not None
        sig = known.payload_sig._replace(ctime_ns=path.stat().st_ctime_ns)
        index.put(cube, known.__class__(**{**known.__dict__, "payload_sig": sig}))


def replaced(path: Path, make: Callable[[Path], object]) -> None:
    shutil.move(path, path.with_name("moved-" + path.name))
    make(path)


def edited(path: Path, **fields: object) -> None:
    meta = json.loads(path.read_text())
    path.write_text(json.dumps(meta | fields))


def copied_cube(root: Path) -> None:
    shutil.copytree(root / "law", root / "copy")


def unlinked(root: Path) -> None:
    (root / ".memfs/unlinked").mkdir()
    (root / ".memfs/unlinked/.fuse_hidden0000000000000001").write_text("it was open")


def rejected(root: Path) -> None:
    (root / "law/meta.json.rejected").write_text("{}")
    os.utime(root / "law/meta.json", (1e9, 1e9))


def without_header(root: Path) -> None:
    (root / "law/meta.json").unlink()


DAMAGES = {
    "a leftover": Damage(
        lambda root: (root / "law/.memfs-tmp-0123").write_text("half"),
        *("files", "law/.memfs-tmp-0123", "what a crash left"),
    ),
    "a leftover in a collection": Damage(
        lambda root: (root / ".memfs-tmp-0123").mkdir(),
        *("files", ".memfs-tmp-0123", "what a crash left"),
    ),
    "an unlinked file": Damage(
        unlinked, "files", ".memfs/unlinked/.fuse_hidden0000000000000001", "deleted while it was"
    ),
    "a text that is a symlink": Damage(
        lambda root: replaced(root / "law/payload.md", lambda p: p.symlink_to("moved-payload.md")),
        *("files", "law/payload.md", "it is a symlink"),
    ),
    "a text that is a directory": Damage(
        lambda root: replaced(root / "law/payload.md", Path.mkdir),
        *("files", "law/payload.md", "it is a directory"),
    ),
    "a KV cache that is a pipe": Damage(
        lambda root: replaced(root / "law/kv.safetensors", os.mkfifo),
        *("files", "law/kv.safetensors", "pipe"),
    ),
    "a header that is a symlink": Damage(
        lambda root: replaced(root / "law/meta.json", lambda p: p.symlink_to(root / "gone")),
        *("files", "law/meta.json", "it is a symlink"),
    ),
    "an adapter that is a directory": Damage(
        lambda root: replaced(root / "law" / ADAPTER, Path.mkdir),
        *("files", f"law/{ADAPTER}", "it is a directory"),
    ),
    "a header that is no JSON": Damage(
        lambda root: (root / "law/meta.json").write_text("{"), "metadata", "law/meta.json", "line 1"
    ),
    "an empty header": Damage(
        lambda root: os.truncate(root / "law/meta.json", 0), "metadata", "law/meta.json", "line 1"
    ),
    "a header that breaks the schema": Damage(
        lambda root: edited(root / "law/meta.json", governance={"priority": "high"}),
        *("metadata", "law/meta.json", "governance.priority"),
    ),
    "a missing header": Damage(without_header, "metadata", "law/meta.json", "no header"),
    "a copied id": Damage(copied_cube, "metadata", "copy/meta.json", "it has the id of law"),
    "a refused header": Damage(
        rejected, "metadata", "law/meta.json.rejected", "a header that was refused"
    ),
    "a KV cache with another bit": Damage(
        lambda root: flipped(root / "law/kv.safetensors", -1),
        *("digests", "law/kv.safetensors", "do not match their checksum"),
    ),
    "a KV cache with another header": Damage(
        lambda root: flipped(root / "law/kv.safetensors", 9), "digests", "law/kv.safetensors", ""
    ),
    "a KV cache cut short": Damage(
        lambda root: os.truncate(root / "law/kv.safetensors", 1000),
        *("digests", "law/kv.safetensors", ""),
    ),
    "an empty KV cache": Damage(
        lambda root: os.truncate(root / "law/kv.safetensors", 0),
        *("digests", "law/kv.safetensors", "0 bytes"),
    ),
    "an adapter cut short": Damage(
        lambda root: os.truncate(root / "law" / ADAPTER, 60), "digests", f"law/{ADAPTER}", ""
    ),
    "an index cut short": Damage(
        lambda root: os.truncate(root / ".memfs/index/data.mdb", 3 * 4096),
        *("index", ".memfs/index", ""),
    ),
    "an index of zeros": Damage(
        lambda root: (root / ".memfs/index/data.mdb").write_bytes(bytes(40960)),
        *("index", ".memfs/index", ""),
    ),
    "an index that is none": Damage(
        lambda root: replaced(root / ".memfs/index", Path.touch), "index", ".memfs/index", ""
    ),
    "an index of another boot": Damage(
        lambda root: (root / ".memfs/index/unclean").write_text("another-boot"),
        *("index", ".memfs/index", "the machine stopped"),
    ),
    "half an index": Damage(
        lambda root: (root / ".memfs/index.new-01234567").mkdir(),
        *("index", ".memfs/index.new-01234567", "half made"),
    ),
    "an index half replaced": Damage(
        lambda root: (root / ".memfs/index").rename(root / ".memfs/index.old-01234567"),
        *("index", ".memfs/index.old-01234567", "half replaced"),
    ),
    "a text changed unseen": Damage(
        lambda root: (root / "law/payload.md").write_text("Other."),
        *("index", "law", "payload_sha256 is"),
    ),
    "a cube gone unseen": Damage(
        lambda root: shutil.move(root / "law", root / ".memfs/aside"), "index", "law", "is gone"
    ),
    "a cube come unseen": Damage(
        lambda root: (root / "work/note").rename(root / "new"), "index", "new", "does not know it"
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_every_damage_is_named_and_mended(root: Path, run: Run, name: str) -> None:
    assert run(root) == (0, said_of(root))
    damage = DAMAGES[name]
    damage.do(root)
    before, content = sizes_and_times(root), contents(root)
    status, said = run(root)
    assert status == 1
    found = [p for p in said["problems"] if (p["area"], p["path"]) == (damage.area, damage.path)]
    assert len(found) == 1, said
    assert damage.says in found[0]["what"]
    assert found[0]["mendable"]
    assert sizes_and_times(root) == before, "a check changes nothing"
    status, said = run("--repair", root)
    assert (status, said["left"]) == (0, 0), said
    assert run(root)[1]["problems"] == []
    assert content <= contents(root)


def said_of(root: Path, cubes: int = 3) -> dict[str, Any]:
    return {"store": str(root), "mountpoint": None, "cubes": cubes, "problems": [], "left": 0}


@given(names=st.lists(st.sampled_from(sorted(DAMAGES)), min_size=2, max_size=6, unique=True))
@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_many_damages_at_once(
    whole: Path, tmp_path_factory: pytest.TempPathFactory, run: Run, names: list[str]
) -> None:
    root = copied(whole, tmp_path_factory.mktemp("many") / "store")
    for name in names:
        try:
            DAMAGES[name].do(root)
        except (OSError, ValueError, TypeError):
            pass  # what it would damage has been damaged before
    content = contents(root)
    assert run(root)[0] == 1
    status, said = run("--repair", root)
    assert (status, said["left"]) == (0, 0), said
    assert run(root)[1]["problems"] == []
    assert content <= contents(root)


@given(data=st.data())
@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_files_of_any_bytes(
    whole: Path, tmp_path_factory: pytest.TempPathFactory, run: Run, data: st.DataObject
) -> None:
    root = copied(whole, tmp_path_factory.mktemp("bytes") / "store")
    for name in ("meta.json", "kv.safetensors", ADAPTER, "payload.md"):
        raw = bytearray((root / "law" / name).read_bytes())
        for _ in range(data.draw(st.integers(0, 3))):
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
        del raw[data.draw(st.one_of(st.none(), st.integers(0, len(raw)))) or len(raw) :]
        (root / "law" / name).write_bytes(raw)
    content = contents(root)
    run(root)
    assert run("--repair", root)[0] == 0
    assert run(root)[1]["problems"] == []
    assert content <= contents(root)


def test_a_disk_that_rots_is_named_and_the_text_is_left(root: Path, run: Run) -> None:
    rotten(root / "law/payload.md")
    content = (root / "law/payload.md").read_bytes()
    status, said = run("--repair", root)
    assert status == 1
    (found,) = [p for p in said["problems"] if p["area"] == "digests"]
    assert (found["path"], found["mendable"]) == ("law/payload.md", False)
    assert "its bytes changed and its times did not" in found["what"]
    assert (root / "law/payload.md").read_bytes() == content


def test_a_broken_header_comes_back_as_it_was_known(root: Path, run: Run) -> None:
    path = root / "law/meta.json"
    before = metadata.parse(path.read_bytes())
    path.write_text("nothing")
    status, said = run("--repair", root)
    assert status == 0
    moved = said["problems"][0]["mended"].split("set aside as ")[1].split(";")[0]
    assert (root / moved).read_text() == "nothing"
    after = metadata.parse(path.read_bytes())
    assert after["descriptive"]["tags"] == ["law"]
    for name in ("id", "title", "created", "type"):
        assert after["descriptive"][name] == before["descriptive"][name]


def test_the_id_is_saved_from_a_damaged_index(root: Path, run: Run) -> None:
    before = metadata.parse((root / "law/meta.json").read_bytes())
    (root / "law/meta.json").unlink()
    flipped(root / ".memfs/index/lock.mdb", 0)
    (root / ".memfs/index/unclean").write_text("another-boot")
    assert run("--repair", root)[0] == 0
    after = metadata.parse((root / "law/meta.json").read_bytes())
    assert after["descriptive"]["id"] == before["descriptive"]["id"]


def test_a_broken_trail_is_said_and_left(root: Path, run: Run) -> None:
    (root / ".memfs/trail").mkdir(exist_ok=True)
    file = root / ".memfs/trail/000000000001.jsonl"
    file.write_text("not a line of it\n")
    status, said = run("--repair", root)
    assert (status, said["left"]) == (1, len(said["problems"]))
    assert {p["area"] for p in said["problems"]} == {"trail"}
    assert file.read_text() == "not a line of it\n"


def test_a_file_that_is_being_published_is_no_leftover(root: Path, run: Run) -> None:
    with Store.open(root) as store, publishing(store, "law/new") as (fd, _):
        os.write(fd, b"half")
        assert run(root)[0] == 0
    assert (root / "law/new").read_bytes() == b"half"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_said(root: Path, run: Run) -> None:
    (root / "law/payload.md").chmod(0)
    (root / "work").chmod(0)
    _, said = run(root)
    assert {p["path"] for p in said["problems"]} >= {"law/payload.md", "work"}


def test_a_look_at_a_plain_directory_leaves_nothing(tmp_path: Path, run: Run) -> None:
    (tmp_path / "store/any").mkdir(parents=True)
    assert run(tmp_path / "store") == (0, said_of(tmp_path / "store", 0))
    assert os.listdir(tmp_path / "store") == ["any"]
    assert run(tmp_path / "missing")[0] == 3


def test_a_store_in_use_is_left_alone(root: Path, run: Run) -> None:
    with Store.open(root) as store, lock(store, "is mounted at /mnt/x"):
        status, said = run("--repair", root)
        assert status == 9
        assert "is mounted at /mnt/x" in said["error"]["message"]


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., str]]:
    def call(*args: object) -> str:
        capsys.readouterr()
        cli.main(["fsck", *map(str, args)])
        return capsys.readouterr().out

    yield call


def test_what_people_read(root: Path, printed: Callable[..., str]) -> None:
    assert printed(root) == "3 cubes: nothing is wrong\n"
    (root / "law/meta.json").write_text("{")
    (root / "\x1b[31m").mkdir()
    (root / "\x1b[31m/.memfs-tmp-1").touch()
    first, second, third, last = printed(root).splitlines()
    assert first == "\\x1b[31m/.memfs-tmp-1: what a crash left of writing a file [files]"
    assert second.startswith("law/meta.json: line 1, column 2: ")
    assert third.startswith("law: meta_reason is None in the index, line 1")
    assert last == "3 cubes: 3 problems; memfs fsck --repair mends 3"
    lines = printed("--repair", root).splitlines()
    assert lines[1].startswith("  mended: set aside as .memfs/aside/")
    assert lines[-1] == "3 cubes: 3 problems, all mended"
    assert printed(root) == "3 cubes: nothing is wrong\n"
