"""``memfs index``: its answers and exit codes, whether the store is mounted or not."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from memfs.cube import metadata
from memfs.index.lmdb_index import Index
from memfs.index.rebuild import index_directory
from memfs.vault.lock import lock
from memfs.vault.store import Store
from tests.waiting import until

from .conftest import Run, needs_fuse


@pytest.fixture
def store(tmp_path: Path) -> Path:
    root = tmp_path / "store"
    for name, tags in (("law", ["x", "y"]), ("work/note", ["x"]), ("work/other", [])):
        (root / name).mkdir(parents=True)
        (root / name / "payload.md").write_text(name)
        meta = metadata.new(title=name)
        meta["descriptive"]["tags"] = tags
        (root / name / "meta.json").write_bytes(metadata.render(meta))
    return root


@pytest.fixture
def run(run: Run) -> Run:
    return functools.partial(run, "index")


def from_json(run: Run, *args: object) -> tuple[int, Any]:
    status, out, _ = run(*args, "--json")
    return status, json.loads(out)


def test_it_is_rebuilt_and_then_it_is_sound(store: Path, run: Run) -> None:
    status, out, _ = run("rebuild", store)
    assert (status, out.split(" in ")[0]) == (0, "3 cubes indexed")
    assert run("check", store)[:2] == (0, "3 cubes: the index says what the files say\n")
    status, said = from_json(run, "rebuild", store)
    assert status == 0
    assert (said["store"], said["cubes"], said["copies"]) == (str(store), 3, 0)
    assert from_json(run, "check", store) == (
        0,
        {"store": str(store), "cubes": 3, "differences": []},
    )


def test_differences_are_an_exit_code(store: Path, run: Run) -> None:
    run("rebuild", store)
    shutil.rmtree(store / "law")
    (store / "work" / "note" / "payload.md").write_text("new")
    status, out, _ = run("check", store)
    assert status == 1
    assert "law" in out
    assert "gone" in out
    assert f"memfs index rebuild {store}" in out
    status, said = from_json(run, "check", store)
    assert status == 1
    assert {(found["path"], found["what"]) for found in said["differences"]} >= {
        ("law", "gone"),
        ("work/note", "payload_sha256"),
    }
    run("rebuild", store)
    assert run("check", store)[0] == 0


def test_a_copy_is_told(store: Path, run: Run) -> None:
    shutil.copytree(store / "law", store / "copy")
    assert "copies that got an id of their own: 1" in run("rebuild", store)[1]


def test_damage_is_an_error_that_says_what_mends_it(store: Path, run: Run) -> None:
    run("rebuild", store)
    os.truncate(store / ".memfs" / "index" / "data.mdb", 3 * 4096)
    for action in ("check", "find"):
        status, _, err = run(action, store)
        assert status == 1
        assert "the index is damaged" in err
        assert f"memfs index rebuild {store}" in err
    assert from_json(run, "check", store)[1]["error"]["type"] == "IndexDamaged"
    assert run("rebuild", store)[0] == 0
    assert run("check", store)[0] == 0


def test_where_there_is_none(store: Path, tmp_path: Path, run: Run) -> None:
    assert run("check", store)[0] == 3
    assert not (store / ".memfs").exists()  # a look leaves nothing behind
    assert run("check", tmp_path / "missing")[0] == 3
    assert run("rebuild", tmp_path / "missing")[0] == 3


def test_a_store_in_use_is_left_alone(store: Path, run: Run) -> None:
    run("rebuild", store)
    with Store.open(store) as opened, lock(opened, "is mounted at /mnt/x"):
        status, _, err = run("rebuild", store)
        assert status == 9
        assert "is mounted at /mnt/x" in err
        assert run("check", store)[0] == 0


def test_finding(store: Path, run: Run) -> None:
    run("rebuild", store)
    os.utime(store / "law" / "payload.md", (1e9, 1e9))
    run("rebuild", store)

    def paths(*args: str) -> list[str]:
        status, found = from_json(run, "find", store, *args)
        assert status == 0
        return [cube["path"] for cube in found]

    assert paths() == ["law", "work/note", "work/other"]
    assert paths("--tag", "x") == ["law", "work/note"]
    assert paths("--tag", "x", "--since", "1h") == ["work/note"]
    assert paths("--until", "2002-01-01") == ["law"]
    assert paths("--since", "2001-09-09T01:46:39Z", "--until", "2001-09-09T01:46:41Z") == ["law"]
    assert paths("--kv", "none", "--owner", str(os.getuid())) == ["law", "work/note", "work/other"]
    assert paths("--owner", "4294967294") == []
    assert run("find", store, "--tag", "y")[1].splitlines()[1].split() == [
        "law",
        "none",
        "-",
        "2001-09-09T01:46:40Z",
        "x,",
        "y",
    ]
    assert run("find", store, "--tag", "z")[:2] == (0, "")
    assert run("find", store, "--since", "soon")[0] == 7
    assert run("find", store, "--owner", "no-such-user-here")[0] == 7


def test_the_last_known_model_judges(
    store: Path, run: Run, make_kv: Callable[..., bytes], kv_model: dict[str, str]
) -> None:
    (store / "law" / "kv.safetensors").write_bytes(make_kv(b"law"))
    run("rebuild", store)
    assert from_json(run, "find", store, "--kv", "unchecked")[1][0]["path"] == "law"
    with Store.open(store) as opened, Index.open(index_directory(opened)) as index:
        index.set_info("model", kv_model)
    run("rebuild", store)
    (found,) = from_json(run, "find", store, "--kv", "ready")[1]
    assert (found["path"], found["kv_tokens"]) == ("law", 3)
    assert run("check", store)[0] == 0


@pytest.fixture
def mountpoint(store: Path, tmp_path: Path) -> Iterator[Path]:
    directory = tmp_path / "mem"
    environ = os.environ | {"MEMFS_AUTOSTART": "off"}
    memfs = [sys.executable, "-m", "memfs.cli.main"]
    subprocess.run([*memfs, "mount", store, directory], check=True, env=environ, timeout=60)
    yield directory
    subprocess.run([*memfs, "umount", directory], check=True, env=environ, timeout=60)


@needs_fuse
def test_a_mounted_store(store: Path, mountpoint: Path, run: Run) -> None:
    until(lambda: run("check", mountpoint)[0] == 0)  # the mount fills its first index meanwhile
    (mountpoint / "new").mkdir()
    (mountpoint / "new" / "payload.md").write_text("text")
    (store / "beside").mkdir()
    (store / "beside" / "payload.md").write_text("text")
    for place in (mountpoint, mountpoint / "law", store):
        status, out, err = run("check", place)
        assert (status, out, err) == (0, "5 cubes: the index says what the files say\n", "")
    status, said = from_json(run, "rebuild", mountpoint)
    assert (status, said["cubes"]) == (0, 5)
    assert run("rebuild", store)[1].startswith("5 cubes indexed")
    assert run("check", store)[0] == 0
    assert [cube["path"] for cube in from_json(run, "find", mountpoint, "--tag", "y")[1]] == ["law"]
    assert (mountpoint / "new" / "payload.md").read_text() == "text"


@needs_fuse
def test_a_damaged_index_is_mended_under_the_mount(store: Path, mountpoint: Path, run: Run) -> None:
    until(lambda: run("check", store)[0] == 0)
    with (store / ".memfs" / "index" / "data.mdb").open("r+b") as file:
        data = file.read()
        assert b'"work/note"' in data
        file.seek(0)
        file.write(data.replace(b'"work/note"', b'"work/n_te"'))
    assert run("check", store)[0] == 1
    assert run("rebuild", store)[0] == 0
    assert run("check", store)[0] == 0
