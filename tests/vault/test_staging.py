"""What is put together aside: read-only directories are moved and removed, nothing is left."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from memfs.cube import layout
from memfs.errors import NotAllowed
from memfs.vault.publish import remove_leftover
from memfs.vault.staging import incoming, new_directory, put, way
from memfs.vault.store import Store
from memfs.vault.versions.records import Parent
from tests.users import as_user, needs_root

USER = 1234


@pytest.fixture
def root(public: Path) -> Iterator[Path]:
    """A store that is a user's."""
    (public / "store").mkdir()
    os.chown(public / "store", USER, USER)
    yield public / "store"
    shutil.rmtree(public / "store")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def read_only_tree(root: Path, link: Path) -> None:
    (root / "a/b/c").mkdir(parents=True)
    (root / "a/b/c/file").write_text("x")
    (root / "a/b/link").symlink_to(link)
    for name, bits in (("a/b/c", 0o555), ("a/b", 0o111), ("a", 0), ("", 0o555)):
        (root / name).chmod(bits)


@needs_root
def test_what_is_read_only_does_not_stay(root: Path) -> None:
    def left() -> list[str]:
        (root / "kept").mkdir(mode=0o500)
        with Store.open(root) as store:
            with incoming(store, "") as aside:
                read_only_tree(root / aside, root / "kept")
            leftover = root / f"{layout.INCOMING}x"
            leftover.mkdir()
            read_only_tree(leftover, root / "kept")
            assert remove_leftover(store, leftover.name, time.time() + 1)
            return sorted(os.listdir(root))

    assert as_user(USER, left) == [".memfs", "kept"]
    assert mode(root / "kept") == 0o500


@needs_root
def test_a_mode_is_given_to_what_was_made_and_not_to_a_name(root: Path) -> None:
    """Whoever may write a collection may put another directory, or a link, where one was moved."""
    (root.parent / "secret").mkdir(mode=0o700)
    with Store.open(root) as store:
        with new_directory(store, "a", Parent(USER, USER, 0o555)):
            assert mode(root / "a") == 0o755
            put(store, "a", "b")
            (root / "a").symlink_to(root.parent / "secret")
        assert mode(root / "b") == 0o555
        assert (root / "b").stat().st_uid == USER
    assert mode(root.parent / "secret") == 0o700


@needs_root
def test_the_way_is_made_with_the_rights_it_had_or_not_at_all(root: Path) -> None:
    like = {"x": Parent(USER, USER, 0o750), "x/y": Parent(USER, USER, 0o555)}

    def body() -> None:
        with Store.open(root) as store:
            with pytest.raises(ZeroDivisionError), way(store, "x/y/z", like.get):
                assert mode(root / "x/y") == 0o755
                raise ZeroDivisionError
            assert os.listdir(root) == [".memfs"]
            with way(store, "x/y/z", like.get):
                (root / "x/y/z").mkdir()
            (root / "file").write_text("")
            with pytest.raises(NotAllowed, match="file is not a directory"), way(store, "file/z"):
                pass

    as_user(USER, body)
    assert (mode(root / "x"), mode(root / "x/y")) == (0o750, 0o555)


@needs_root
def test_rights_go_to_no_other_group(root: Path) -> None:
    def body() -> None:
        with Store.open(root) as store, new_directory(store, "a", Parent(USER, 4321, 0o2770)):
            pass

    as_user(USER, body)
    assert mode(root / "a") & 0o077 == 0


def test_what_is_deeper_than_can_be_walked_is_an_error_and_no_end(tmp_path: Path) -> None:
    with Store.open(tmp_path) as store:
        name = f"{layout.INCOMING}x"
        os.mkdir(tmp_path / name)
        fd = os.open(tmp_path / name, os.O_RDONLY)
        for _ in range(1500):
            os.mkdir("d", dir_fd=fd)
            below = os.open("d", os.O_RDONLY, dir_fd=fd)
            os.close(fd)
            fd = below
        os.close(fd)
        assert not remove_leftover(store, name, time.time() + 1)
        subprocess.run(["rm", "-r", tmp_path / name], check=True)
