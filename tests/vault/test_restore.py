"""Bringing cubes back into a store that is not mounted: whose they are, and what is on the way."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from memfs.cube import metadata
from memfs.errors import VersionDamaged
from memfs.vault.store import Store
from memfs.vault.versions import making, records
from memfs.vault.versions.look import look
from memfs.vault.versions.records import Version
from memfs.vault.versions.restore import restore
from tests.users import as_user, needs_root

USER = 1234
FILES = (
    "payload.md",
    "meta.json",
    "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
)


@pytest.fixture
def root(public: Path) -> Iterator[Path]:
    """A store that is a user's, with a cube in a collection of a collection."""
    root = public / "store"
    (root / "work/old/law/adapter").mkdir(parents=True)
    meta = metadata.new(title="law")
    (root / "work/old/law/meta.json").write_bytes(metadata.render(meta))
    metadata.parse(metadata.render(meta))  # the schema is imported while that can be read
    for name in FILES:
        if name != "meta.json":
            (root / "work/old/law" / name).write_text(name)
    for path in (root, *root.rglob("*")):
        os.chown(path, USER, USER)
    yield root


def kept(root: Path) -> Version:
    """The cube as it is now, as a version."""
    with Store.open(root) as store:
        cube_id = metadata.cube_id(metadata.parse((root / "work/old/law/meta.json").read_bytes()))
        present = look(store, "work/old/law", None)
        assert present is not None
        version = making.make(store, cube_id, present, None, budget=1 << 30, patient=True)
        assert version is not None
        return records.read(store, cube_id, version.stamp)


def brought_back(root: Path, version: Version, path: str = "work/old/law") -> None:
    with Store.open(root) as store:
        restore(store, version.directory, version, path)


def rights(root: Path) -> dict[str, tuple[int, int, str]]:
    """Owner, group and mode of all that is in a store."""
    found = {}
    for path in (root, *root.rglob("*")):
        if ".memfs" not in path.parts:
            status = path.lstat()
            name = str(path.relative_to(root))
            found[name] = (status.st_uid, status.st_gid, stat.filemode(status.st_mode))
    return found


@needs_root
@pytest.mark.parametrize("user", [USER, 0])
def test_read_only_directories_come_back_with_the_modes_and_owners_they_had(
    root: Path, user: int
) -> None:
    for name in ("work/old/law/adapter", "work/old/law", "work/old"):
        (root / name).chmod(0o555)
    (root / "work").chmod(0o1775)
    before = rights(root)
    version = as_user(USER, lambda: kept(root))
    shutil.rmtree(root / "work")
    as_user(user, lambda: brought_back(root, version))
    assert rights(root) == before
    for name in FILES:
        assert (root / "work/old/law" / name).stat().st_size


@needs_root
@pytest.mark.parametrize("user", [USER, 0])
def test_where_the_way_is_not_known_it_is_the_cubes_owners(root: Path, user: int) -> None:
    (root / "work/old/law").chmod(0o550)
    version = as_user(USER, lambda: kept(root))
    as_user(user, lambda: brought_back(root, version, "new/place/law"))
    for name in ("new", "new/place"):
        assert rights(root)[name] == (USER, USER, "drwxr-x---")
    assert rights(root)["new/place/law"] == (USER, USER, "dr-xr-x---")


@needs_root
def test_an_adapter_that_root_brings_back_is_the_owners(root: Path) -> None:
    version = as_user(USER, lambda: kept(root))
    before = rights(root)
    shutil.rmtree(root / "work/old/law/adapter")
    brought_back(root, version)
    assert rights(root) == before


@needs_root
def test_what_fails_leaves_nothing(root: Path) -> None:
    (root / "work/old").chmod(0o555)
    version = as_user(USER, lambda: kept(root))
    shutil.rmtree(root / "work")
    (root / version.directory / "adapter/adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError):
        as_user(USER, lambda: brought_back(root, version))
    assert os.listdir(root) == [".memfs"]


@needs_root
def test_a_forged_description_makes_no_program_of_roots(root: Path) -> None:
    version = as_user(USER, lambda: kept(root))
    files = {name: replace(entry, uid=0, mode=0o6755) for name, entry in version.files.items()}
    shutil.rmtree(root / "work")
    brought_back(root, replace(version, files=files))
    assert rights(root)["work/old/law/payload.md"] == (0, USER, "-rwxr-xr-x")
    with pytest.raises(VersionDamaged, match="no parents"):
        brought_back(root, replace(version, parents=()))
