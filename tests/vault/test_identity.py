"""A cube keeps its id through rename and copy; a copy is told apart; no header is lost."""

from __future__ import annotations

import json
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from memfs.cube import metadata
from memfs.vault.facts import CubeFacts, inspect
from memfs.vault.identity import adopt, read_meta
from memfs.vault.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path) as opened:
        yield opened


def make(store: Store, path: str, *, header: bool = True) -> CubeFacts:
    (store.root / path).mkdir(parents=True)
    (store.root / path / "payload.md").write_text("text")
    if header:
        meta = metadata.new(title=path)
        (store.root / path / "meta.json").write_bytes(metadata.render(meta))
    return look(store, path)


def look(store: Store, path: str) -> CubeFacts:
    facts = inspect(store, path, None, None)
    assert facts is not None
    return facts


def nobody(_: str) -> None:
    return None


def test_a_cube_without_a_header_gets_one(store: Store) -> None:
    facts = make(store, "work/law", header=False)
    (store.root / "work/law/payload.md").chmod(0o604)
    found = adopt(store, "work/law", facts, nobody)
    meta = read_meta(store, "work/law")
    assert found.id == metadata.cube_id(meta)
    assert found.title == meta["descriptive"]["title"] == "law"
    status = store.stat("work/law/meta.json")
    assert stat.S_IMODE(status.st_mode) == 0o604
    looked = look(store, "work/law")
    assert (looked.id, looked.title, looked.created) == (found.id, found.title, found.created)
    assert adopt(store, "work/law", found, nobody) == found
    assert store.stat("work/law/meta.json").st_ino == status.st_ino


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_the_header_is_the_texts_owners(store: Store) -> None:
    make(store, "law", header=False)
    os.chown(store.root / "law" / "payload.md", 4321, 1234)
    adopt(store, "law", look(store, "law"), nobody)
    found = store.stat("law/meta.json")
    assert (found.st_uid, found.st_gid) == (4321, 1234)


def test_a_cube_without_a_text_takes_the_directorys_mode(store: Store) -> None:
    (store.root / "law" / "adapter").mkdir(parents=True)
    (store.root / "law").chmod(0o750)
    (store.root / "law" / "payload.md").symlink_to("nowhere")
    adopt(store, "law", look(store, "law"), nobody)
    assert stat.S_IMODE(store.stat("law/meta.json").st_mode) == 0o640


def test_a_name_that_is_not_utf8_makes_a_title(store: Store) -> None:
    path = os.fsdecode(b"caf\xe9")
    facts = adopt(store, path, make(store, path, header=False), nobody)
    assert facts.title == "caf�"


def test_a_cube_that_lost_its_header_keeps_its_id(store: Store) -> None:
    facts = make(store, "law")
    (store.root / "law" / "meta.json").unlink()
    lost = inspect(store, "law", facts, None)
    assert lost is not None
    found = adopt(store, "law", lost, lambda _: "law")
    assert found.id == facts.id == metadata.cube_id(read_meta(store, "law"))


def test_but_not_where_another_cube_has_it_now(store: Store) -> None:
    facts = make(store, "law")
    shutil.move(store.root / "law" / "meta.json", store.root / "kept")
    lost = inspect(store, "law", facts, None)
    assert lost is not None
    make(store, "other", header=False)
    shutil.move(store.root / "kept", store.root / "other" / "meta.json")
    found = adopt(store, "law", lost, lambda _: "other")
    assert found.id != facts.id


def test_a_cube_from_another_machine_keeps_its_id(store: Store) -> None:
    facts = make(store, "law")
    before = store.stat("law/meta.json")
    assert adopt(store, "law", facts, nobody) == facts
    assert store.stat("law/meta.json").st_ino == before.st_ino


def test_a_copy_gets_an_id_of_its_own(store: Store) -> None:
    original = make(store, "law")
    shutil.copytree(store.root / "law", store.root / "copy")
    meta = read_meta(store, "copy") | {"mine": [1, 2]}
    (store.root / "copy" / "meta.json").write_text(json.dumps(meta))
    found = adopt(store, "copy", look(store, "copy"), lambda _: "law")
    meta = read_meta(store, "copy")
    assert found.id == metadata.cube_id(meta) != original.id
    assert meta["descriptive"]["origin"]["copied_from"] == original.id
    assert meta["mine"] == [1, 2]
    assert look(store, "law").id == original.id
    assert adopt(store, "law", original, lambda _: "law") == original


def test_a_hard_linked_copy_leaves_the_original(store: Store) -> None:
    original = make(store, "law")
    shutil.copytree(store.root / "law", store.root / "copy", copy_function=os.link)
    found = adopt(store, "copy", look(store, "copy"), lambda _: "law")
    assert found.id != original.id == look(store, "law").id


@pytest.mark.parametrize("gone", ["moved", "other id", "invalid", "symlink"])
def test_a_cube_that_was_moved_keeps_its_id(store: Store, gone: str) -> None:
    """The index may still know the old path, where that cube is no more."""
    facts = make(store, "law")
    (store.root / "law").rename(store.root / "new")
    if gone != "moved":
        make(store, "law")
    if gone == "invalid":
        (store.root / "law" / "meta.json").write_text("{")
    if gone == "symlink":
        (store.root / "law" / "meta.json").unlink()
        (store.root / "law" / "meta.json").symlink_to("../new/meta.json")
    assert adopt(store, "new", look(store, "new"), lambda _: "law").id == facts.id


@pytest.mark.parametrize("kind", ["text", "symlink"])
def test_an_invalid_header_is_never_rewritten(store: Store, kind: str) -> None:
    make(store, "law", header=False)
    path = store.root / "law" / "meta.json"
    if kind == "text":
        path.write_text("{ half of a header")
    else:
        path.symlink_to("payload.md")
    before = path.lstat()
    facts = look(store, "law")
    assert adopt(store, "law", facts, nobody) == facts
    assert path.lstat() == before


def test_a_header_that_just_came_is_not_replaced(store: Store) -> None:
    facts = make(store, "law", header=False)
    other = metadata.render(metadata.new(title="mine"))
    (store.root / "law" / "meta.json").write_bytes(other)
    assert adopt(store, "law", facts, nobody) == facts
    assert (store.root / "law" / "meta.json").read_bytes() == other


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to become another user")
def test_where_nothing_can_be_written(store: Store) -> None:
    store.root.chmod(0o755)
    plain = make(store, "plain", header=False)
    original = make(store, "law")
    shutil.copytree(store.root / "law", store.root / "copy")
    copy = look(store, "copy")
    os.seteuid(65534)
    try:
        assert adopt(store, "plain", plain, nobody) == plain
        found = adopt(store, "copy", copy, lambda _: "law")
    finally:
        os.seteuid(0)
    assert found.id is None
    # It is tried again at the next look.
    again = inspect(store, "copy", found, None)
    assert again is not None
    assert again.id == original.id
    assert adopt(store, "copy", again, lambda _: "law").id not in (None, original.id)


def test_ids_are_random(store: Store) -> None:
    ids = {adopt(store, f"c{i}", make(store, f"c{i}", header=False), nobody).id for i in range(20)}
    assert len(ids) == 20
    assert all(uuid.UUID(cube_id).version == 4 for cube_id in ids if cube_id)
