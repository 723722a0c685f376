"""Damage to versions is found, by digest, and set aside."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from memfs.cube import metadata
from memfs.vault.store import Store
from memfs.vault.versions import making, records
from memfs.vault.versions.check import problems
from memfs.vault.versions.look import look
from memfs.vault.versions.records import LARGE, Version

ID = "01234567-89ab-4cde-8f01-23456789abcd"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    (tmp_path / "store/law/adapter").mkdir(parents=True)
    with Store.open(tmp_path / "store") as store:
        yield store


@pytest.fixture
def version(store: Store) -> Version:
    cube = store.root / "law"
    (cube / "payload.md").write_text("one")
    (cube / "adapter/adapter_config.json").write_text("{}")
    meta = metadata.new(title="law")
    meta["descriptive"]["id"] = ID
    (cube / "meta.json").write_bytes(metadata.render(meta))
    for text in ("one", "two"):
        (cube / "payload.md").write_text(text)
        previous = records.newest(store, ID)
        present = look(store, "law", previous)
        assert present is not None
        made = making.make(store, ID, present, previous, budget=1 << 30, patient=True)
        assert made is not None
    return made


def rewritten(file: Path, data: bytes) -> None:
    file.unlink()  # it may be another version's too
    file.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "payload.md is not what it was": lambda d: rewritten(d / "payload.md", b"owt"),
    "payload.md has 1 bytes, and had 3": lambda d: rewritten(d / "payload.md", b"t"),
    "lacks meta.json": lambda d: (d / "meta.json").unlink(),
    "lacks adapter/adapter_config.json": lambda d: shutil.rmtree(d / "adapter"),
    "has a foreign litter": lambda d: (d / "litter").touch(),
    "version.json": lambda d: rewritten(d / "version.json", b"{"),
    "cannot be read": lambda d: (d / "version.json").unlink(),
    "never finished": lambda d: d.rename(d.with_name(".memfs-tmp-1")),
    "not the name of a version": lambda d: d.rename(d.with_name("yesterday")),
    "no directory of a cube's": lambda d: d.parent.rename(d.parent.with_name("law")),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_each_kind_is_found_and_set_aside(store: Store, version: Version, what: str) -> None:
    assert list(problems(store)) == []
    DAMAGE[what](store.root / version.directory)
    (found,) = problems(store)
    assert what in found.what
    assert found.area == "versions"
    assert found.mend is not None
    before = {p.relative_to(store.root / found.path) for p in (store.root / found.path).rglob("*")}
    said = found.mend()
    aside = store.root / said.removeprefix("set aside in ")
    assert {path.relative_to(aside) for path in aside.rglob("*")} == before
    assert list(problems(store)) == []


def test_beside_a_mount_what_is_unfinished_is_well(store: Store, version: Version) -> None:
    (store.root / version.directory).rename(store.root / records.ROOT / ID / ".memfs-tmp-1")
    assert list(problems(store, live=True)) == []
    assert len(list(problems(store))) == 1


def test_a_deletion_and_the_mark_are_well(store: Store, version: Version) -> None:
    making.mark(store)
    making.bury(store, version, None)
    assert list(problems(store)) == []
    counts: list[int] = []
    assert list(problems(store, progress=counts.append)) == []
    assert counts == [1, 2, 3]


def with_weights(store: Store) -> Version:
    """A version whose adapter is still the cube's own file."""
    (store.root / "law/adapter/adapter_model.safetensors").write_bytes(b"a" * LARGE)
    previous = records.newest(store, ID)
    present = look(store, "law", previous)
    assert present is not None
    made = making.make(store, ID, present, previous, budget=1 << 30, patient=False)
    assert made is not None
    return made


def test_what_a_kill_left_of_a_copy_is_named(store: Store, version: Version) -> None:
    for left in (".memfs-tmp-1", "adapter/.memfs-tmp-2"):
        (store.root / version.directory / left).touch()
        assert list(problems(store, live=True)) == []
        (found,) = problems(store)
        assert found.path == f"{version.directory}/{left}"
        assert found.mend is not None
        found.mend()
        assert list(problems(store)) == []
    assert records.stamps(store, ID)[-1] == version.stamp


def test_a_version_that_changed_with_its_cube_is_found(store: Store, version: Version) -> None:
    shared = with_weights(store)
    name = "adapter/adapter_model.safetensors"
    if not shared.files[name].linked:
        pytest.skip("this disk shares blocks")
    assert list(problems(store)) == []
    with (store.root / "law" / name).open("r+b") as file:
        file.write(b"b")
    (found,) = problems(store)
    assert f"{name} was changed" in found.what
    assert found.mend is not None
    found.mend()
    assert not records.read(store, ID, shared.stamp).files[name].kept
    assert list(problems(store)) == []


def test_without_a_digest_the_time_tells(store: Store, version: Version) -> None:
    shared = with_weights(store)
    name = "adapter/adapter_model.safetensors"
    own = dataclasses.replace(shared.files[name], linked=False)
    file = store.root / shared.directory / records.DESCRIPTION
    changed = dataclasses.replace(shared, files={**shared.files, name: own})
    rewritten(file, json.dumps(changed.to_json()).encode())
    assert list(problems(store)) == []
    with (store.root / shared.directory / name).open("r+b") as opened:
        opened.write(b"b")
    (found,) = problems(store)
    assert "its time is another" in found.what
